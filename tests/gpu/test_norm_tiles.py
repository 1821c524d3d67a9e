"""Norms inside products, their squares given or not, in each tile that a model's sizes choose on a GPU of 132 SMs."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastattn import ops
from fastattn.nn import interleave_gate_up

pytestmark = pytest.mark.gpu
SIZES = (  # M, N, K
    (100, 28672, 1032),  # 64 x 224
    (256, 6144, 4096),  # 128 x 96
    (256, 4096, 14336),  # stream-K in 128 x 128, beside the norms' kernel
    (640, 4096, 14336),  # 128 x 256, behind it
    (5000, 6144, 520),  # turns
    (48, 4096, 2056),  # few rows, that kernel in front
    (256, 8192, 8192),  # 128 x 128
    (509, 6144, 4096),  # 128 x 192 in turns, one tile a pair
    (384, 28672, 1032),  # three groups
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["rms", "rms_given", "layer"])
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_a_norm_is_as_exact_as_before_the_product(m: int, n: int, k: int, kind: str, dtype: torch.dtype) -> None:
    """The 2x rule beside torch's norm and product; and two runs are bitwise equal."""
    torch.manual_seed(m)
    x = (torch.randn(m, k, device="cuda") * 3 + 2).to(dtype)
    weight = (torch.randn(n, k, device="cuda") * k**-0.5).to(dtype)
    bias = torch.randn(n, device="cuda").to(dtype)

    def normed(rows: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(rows, (k,)) if kind == "layer" else F.rms_norm(rows, (k,), eps=1e-6)

    def ours() -> torch.Tensor:
        if kind == "layer":
            return ops.layer_norm_linear(x, weight, weight.double().sum(1).float(), bias)
        parts = F.pad(x.float().square(), (0, -k % 32)).unflatten(-1, (-1, 32)).sum(-1)
        return ops.rms_norm_linear(x, weight, bias, sums_of_squares=parts if kind == "rms_given" else None)

    exact = F.linear(normed(x.double()), weight.double(), bias.double())
    of_torch = (F.linear(normed(x), weight, bias).double() - exact).abs()
    got = ours()
    error = (got.double() - exact).abs()
    assert error.max() <= 2 * of_torch.max()
    assert error.square().mean().sqrt() <= 2 * of_torch.square().mean().sqrt()
    assert torch.equal(got, ours())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["", "rms", "rms_given"])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(100, 37888, 1032), (72, 22016, 520), (100, 28672, 1032), (128, 16384, 2048)]
)
def test_gates_of_65_to_128_rows(m: int, n: int, k: int, kind: str, dtype: torch.dtype) -> None:
    """64 x 192 twice, and 64 x 256: the 2x rule beside torch's products and activation; two runs are bitwise equal."""
    torch.manual_seed(m)
    x = (torch.randn(m, k, device="cuda") * 3).to(dtype)
    gate, up = ((torch.randn(n // 2, k, device="cuda") * k**-0.5).to(dtype) for _ in range(2))
    weight = interleave_gate_up(gate, up)

    def plain(rows: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(rows, (k,), eps=1e-6) if kind else rows
        return F.silu(F.linear(normed, gate)) * F.linear(normed, up)

    def ours() -> torch.Tensor:
        if not kind:
            return ops.gated_linear(x, weight)
        parts = F.pad(x.float().square(), (0, -k % 32)).unflatten(-1, (-1, 32)).sum(-1)
        return ops.rms_norm_gated_linear(x, weight, sums_of_squares=parts if kind == "rms_given" else None)

    exact, got = plain(x.double(), gate.double(), up.double()), ours()
    of_torch, error = (plain(x, gate, up).double() - exact).abs(), (got.double() - exact).abs()
    assert error.max() <= 2 * of_torch.max()
    assert error.square().mean().sqrt() <= 2 * of_torch.square().mean().sqrt()
    assert torch.equal(got, ours())
