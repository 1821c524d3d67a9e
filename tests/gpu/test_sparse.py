"""Products with 2:4 sparse weights on a GPU: every tile, sizes around them, and the places of metadata, one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastattn import ops
from tests.harness.generators import Gen
from tests.harness.sparse_calls import sparse_24

pytestmark = pytest.mark.gpu
FP8 = torch.float8_e4m3fn
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, FP8], ids=str)


def run(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, fast_accum: bool = False
) -> Tensor:
    values, metadata = ops.pack_sparse_24(weight)
    if x.dtype is torch.int8:
        return ops.sparse_int8_linear(x, x_scale, values, metadata, weight_scale, bias, out_dtype=torch.bfloat16)
    if x.dtype is FP8:
        return ops.sparse_fp8_linear(
            x, x_scale, values, metadata, weight_scale, bias, out_dtype=torch.bfloat16, fast_accum=fast_accum
        )
    return ops.sparse_linear(x, values, metadata, bias)


@each_dtype
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 4096, 2048), (16, 520, 1056), (33, 136, 96), (64, 264, 2080), (100, 1544, 928), (257, 328, 1120), (384, 2056, 928),
     (1021, 520, 416), (2050, 1032, 544), (9, 33, 68)],
)  # fmt: skip
def test_products(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> None:
    """Also of a matrix with other numbers between its rows; twice the same bits. What the tensor cores drop of a product in fp8 is at
    most 2⁻¹³ of the sum at each step of 64 columns, of four or, with fast_accum, of all of them."""
    gen = Gen(device, seed=m)
    x, weight = gen.randn(m, k), sparse_24(gen, n, k)
    ones = [torch.ones(size, device=device) for size in (m, n)]
    x_scale, weight_scale = ones if dtype.itemsize == 2 else (gen.rand(m) * 0.02, gen.rand(n) + 0.1)
    if dtype is torch.int8:
        x, weight = (t.mul(40).round().clamp(-127, 127) for t in (x, weight))
    bias = gen.randn(n, dtype=torch.bfloat16 if dtype.itemsize == 1 else dtype)
    gapped = torch.full((m, k + 32), 99.0, device=device).to(dtype)
    gapped[:, :k] = x.to(dtype)
    weight = weight.to(dtype)
    rows, columns = gapped[:, :k].double() * x_scale[:, None], weight.double() * weight_scale[:, None]
    exact, size = rows @ columns.t() + bias.double(), rows.abs() @ columns.abs().t()
    for fast_accum in (False, True) if dtype is FP8 else (False,):
        outs = [run(t, weight, x_scale, weight_scale, bias, fast_accum) for t in (gapped[:, :k], gapped[:, :k].clone())]
        assert torch.equal(*outs)
        kind = torch.finfo(outs[0].dtype)
        lost = 2**-20 + (2**-13 * (k / 64 if fast_accum else 4) + 2**-18 if dtype is FP8 else 0)
        allowed = exact.abs() * kind.eps + kind.smallest_normal * kind.eps + size * lost
        assert bool(((outs[0].double() - exact).abs() <= allowed).all())


@each_dtype
@pytest.mark.parametrize("k", [544, 1024])
def test_products_with_unit_vectors_are_the_weight(k: int, dtype: torch.dtype, device: str) -> None:
    """Each number in its place, and zeros where none is stored, in tiles for few rows and for many."""
    weight = (sparse_24(Gen(device, seed=k), 264, k) * 8).round().clamp(-15, 15).to(dtype)
    units = torch.eye(k, device=device).to(dtype)
    for rows in (units, units[: k // 2], *units.split(100)[:1], *units.split(50)[:1], *units.split(10)[-1:]):
        ones = torch.ones(len(rows), device=device)
        out = run(rows, weight, ones, torch.ones(264, device=device), None)
        assert torch.equal(out.double(), rows.double() @ weight.double().t())
