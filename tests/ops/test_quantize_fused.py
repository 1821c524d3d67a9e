"""Quantizers with a gated activation or a norm in front: what that operator and the quantizer behind it give, bit by bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastattn import ops
from tests.harness.compare import assert_equal
from tests.harness.generators import Gen, gapped

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": ops.swiglu,
    "gelu_tanh": ops.geglu,
    "gelu": lambda x: ops.geglu(x, "none"),
}
QUANTIZERS = (ops.quantize_int8, ops.quantize_int8_asymmetric, ops.quantize_fp8, ops.quantize_fp8_groups)


@pytest.mark.parametrize("quantize", QUANTIZERS, ids=lambda op: op.__name__)
def test_as_the_two_operators_one_after_the_other(quantize: Callable[..., tuple[Tensor, ...]], device: str) -> None:
    gen = Gen(device, seed=3)
    for dtype in (torch.bfloat16, torch.float16) if device == "cuda" else (torch.float32, torch.bfloat16):
        # Vectors and not, groups cut short, rows that registers do not hold.
        for rows, columns in ((3, 64), (1, 8), (0, 16), (33, 129), (5, 264), (4, 0), (2, 17000)):
            x = gen.randn(rows, 2 * columns, dtype=dtype)
            if columns > 3 and rows > 2:
                x[0, 1], x[1, columns + 2], x[2] = torch.nan, torch.inf, 0
            for activation, gated in ACTIVATIONS.items():
                for name, given in (("", x), (" with gaps", gapped(x))):
                    results, expected = quantize(given, activation=activation), quantize(gated(x))
                    for got, wanted in zip(results, expected, strict=True):
                        kind = f"{dtype} {rows} x {columns} {activation}{name}"
                        assert got.dtype is wanted.dtype and got.is_contiguous(), kind
                        if got.dtype is torch.float8_e4m3fn:
                            got, wanted = got.float(), wanted.float()
                        assert_equal(got, wanted, kind)


@pytest.mark.parametrize("activation", ["", "silu"])
@pytest.mark.parametrize("quantize", [ops.quantize_int8, ops.quantize_fp8], ids=lambda op: op.__name__)
def test_many_rows_get_what_a_few_of_them_get(
    quantize: Callable[..., tuple[Tensor, ...]], activation: str, device: str
) -> None:
    """Of long rows a GPU's CTAs take one after the other, if there are more of them than run at once."""
    gen = Gen(device, seed=6)
    for rows, columns in ((1201, 11000), (600, 14336)) if device == "cuda" else ((7, 40),):
        for dtype in (torch.bfloat16, torch.float16):
            x = gen.randn(rows, columns * (2 if activation else 1), dtype=dtype)
            x[0, 1], x[3], x[rows - 1, columns - 1] = torch.nan, 0, torch.inf
            for given in (x, gapped(x)):
                results = quantize(given, activation=activation or None)
                few = [
                    quantize(part, activation=activation or None) for part in x.split(100 if device == "cuda" else 2)
                ]
                for got, wanted in zip(results, zip(*few, strict=True), strict=True):
                    assert_equal(got.float(), torch.cat([w.float() for w in wanted]), f"{dtype} {rows} x {columns}")


@pytest.mark.parametrize("quantize", QUANTIZERS, ids=lambda op: op.__name__)
def test_opcheck(quantize: Callable[..., tuple[Tensor, ...]], device: str) -> None:
    op = getattr(torch.ops.fastattn, quantize.__name__).default
    torch.library.opcheck(op, (Gen(device, seed=4).randn(3, 48, dtype=torch.bfloat16), "silu"))


NORM_QUANTIZERS = ((ops.rms_norm_quantize_int8, ops.quantize_int8), (ops.rms_norm_quantize_fp8, ops.quantize_fp8))


@pytest.mark.parametrize(("fused", "quantize"), NORM_QUANTIZERS, ids=("int8", "fp8"))
def test_as_the_norm_and_the_quantizer_one_after_the_other(
    fused: Callable[..., tuple[Tensor, ...]], quantize: Callable[..., tuple[Tensor, ...]], device: str
) -> None:
    gen = Gen(device, seed=5)
    for dtype in (torch.bfloat16, torch.float16) if device == "cuda" else (torch.float32, torch.bfloat16):
        for rows, columns in ((3, 64), (1, 8), (0, 16), (33, 129), (5, 264), (4, 0), (2, 17000), (2, 20001)):
            x, residual = (gen.randn(rows, columns, dtype=dtype) for _ in range(2))
            weight = gen.randn(columns, dtype=dtype)
            if columns > 3 and rows > 2:
                x[0, 1], x[1, 2], x[2], residual[2] = torch.nan, torch.inf, 0, 0
            for name, change in (("", torch.clone), (" with gaps", gapped)):
                kind = f"{dtype} {rows} x {columns}{name}"
                plain = fused(change(x), weight, 1e-5), quantize(ops.rms_norm(x, weight, 1e-5))
                left, right = change(residual), residual.clone()
                added = (
                    fused(change(x), weight, 1e-5, residual=left),
                    quantize(ops.add_rms_norm(x, right, weight, 1e-5)),
                )
                assert_equal(left, right, f"{kind} residual")
                for results, expected in (plain, added):
                    for got, wanted in zip(results, expected, strict=True):
                        assert got.dtype is wanted.dtype and got.is_contiguous(), kind
                        assert_equal(got.float(), wanted.float(), kind)


@pytest.mark.parametrize("fused", [fused for fused, _ in NORM_QUANTIZERS], ids=("int8", "fp8"))
def test_opcheck_of_norms(fused: Callable[..., tuple[Tensor, ...]], device: str) -> None:
    op = getattr(torch.ops.fastattn, fused.__name__).default
    x, residual = (Gen(device, seed=6).randn(3, 48, dtype=torch.bfloat16) for _ in range(2))
    for given in (None, residual):
        torch.library.opcheck(op, (x, given, x[0].clone(), 1e-5))
