"""Products in tiles of 64 rows of x: pairs of CTAs, one group of each, and several of few rows above each other."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastattn import _runtime, ops

DTYPES = (torch.bfloat16, torch.float16)
# M, N, K -> block_m, block_n on a GPU of 132 SMs, in 16 bits and in 8.
SIZES = {
    (33, 584, 592): (64, 96),
    (513, 584, 592): (64, 96),
    (1000, 968, 592): (64, 128),
    (100, 16392, 2064): (64, 128),
    (72, 22024, 1040): (64, 192),
    (100, 28680, 1040): (64, 224),
    (128, 576, 1536): (64, 64),  # few rows, two above each other
}


@pytest.mark.parametrize("element_bytes", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_of_these_tiles(size: tuple[int, int, int], element_bytes: int) -> None:
    config = _runtime.gemm_sm90_config(*size, 132, element_bytes=element_bytes)
    assert (config["block_m"], config["block_n"]) == SIZES[size]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_linear(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The 2x rule beside torch's product; and two runs are bitwise equal."""
    m, n, k = size
    torch.manual_seed(m)
    x, weight = torch.randn(m, k, device="cuda").to(dtype), (torch.randn(n, k, device="cuda") * k**-0.5).to(dtype)
    bias = torch.randn(n, device="cuda").to(dtype)
    exact, got = F.linear(x.double(), weight.double(), bias.double()), ops.linear(x, weight, bias)
    of_torch, error = (F.linear(x, weight, bias).double() - exact).abs(), (got.double() - exact).abs()
    assert error.max() <= 2 * of_torch.max()
    assert error.square().mean().sqrt() <= 2 * of_torch.square().mean().sqrt()
    assert torch.equal(got, ops.linear(x, weight, bias))


@pytest.mark.gpu
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_int8_linear(size: tuple[int, int, int], dtype: torch.dtype, zero_points: bool) -> None:
    """Scales are powers of two and sums fit fp32, so that nothing is rounded but the result."""
    m, n, k = size
    torch.manual_seed(m)
    x, weight = (torch.randint(-8, 9, (rows, k), device="cuda", dtype=torch.int8) for rows in (m, n))
    x_scale, weight_scale = (2.0 ** -torch.randint(4, 7, (rows,), device="cuda").float() for rows in (m, n))
    zero_point = torch.randint(-9, 10, (m,), device="cuda", dtype=torch.int32)
    sums = (x.double() - (zero_point.double()[:, None] if zero_points else 0.0)) @ weight.double().t()
    more = {"x_zero_point": zero_point, "weight_sum": weight.sum(1, dtype=torch.int32)} if zero_points else {}
    got = ops.int8_linear(x, x_scale, weight, weight_scale, out_dtype=dtype, **more)
    assert torch.equal(got, (sums * x_scale.double()[:, None] * weight_scale.double()).to(dtype))
