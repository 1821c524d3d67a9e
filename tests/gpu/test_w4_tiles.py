"""Weights of 4 bits in tiles: few rows of x, as rows of weight give them and the same again; more columns than shared memory holds of x."""

from __future__ import annotations

import pytest
import torch

from fastattn import ops
from fastattn.reference import quantized as reference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 16, 17])
@pytest.mark.parametrize(("n", "k"), [(16, 64), (272, 960), (4096, 14336), (28672, 4096)])
def test_few_rows_from_tiles(n: int, k: int, rows: int) -> None:
    torch.manual_seed(0)
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    scale = torch.randint(0x20, 0x40, (n, k // 16), dtype=torch.uint8, device="cuda")
    global_scale, bias = torch.rand(n, device="cuda") + 30, torch.randn(n, device="cuda").bfloat16()
    x = torch.randn(rows, k, device="cuda").bfloat16()
    q, x_scale = ops.quantize_fp8(x)
    scale_tiles, _ = ops.pack_w4_scales(scale, 16)
    weight = reference.fp4_weight(packed, scale, 16, k, torch.float64) / global_scale[:, None].double()

    tiles = ops.pack_w4_tiles(packed)
    out = ops.fp4_linear(x, tiles, scale_tiles, 16, global_scale, bias)
    expected = x.double() @ weight.t() + bias.double()
    assert (out.double() - expected).abs().max() <= 2**-8 * expected.abs().max()
    assert torch.equal(out, ops.fp4_linear(x, tiles, scale_tiles, 16, global_scale, bias))

    out = ops.fp4_fp8_linear(
        q, x_scale, ops.pack_w4_tiles(packed, 8), scale_tiles, 16, global_scale, bias, out_dtype=torch.bfloat16
    )
    expected = (q.double() * x_scale[:, None].double()) @ weight.t() + bias.double()
    # Weights are exact up to 16 rows, and above rounded to e4m3.
    assert (out.double() - expected).abs().max() <= (2**-8 if rows <= 16 else 2**-4) * expected.abs().max()

    codes, step = packed.view(torch.int32), (torch.rand(n, k // 64, device="cuda") * 0.1).bfloat16()
    zero_point = torch.randint(-8, 8, (n, k // 64), dtype=torch.int8, device="cuda")
    out = ops.int4_linear(x, ops.pack_w4_tiles(codes), step, 64, zero_point, bias)
    expected = x.double() @ reference.int4_weight(codes, step, zero_point, 64, k).double().t() + bias.double()
    assert (out.double() - expected).abs().max() <= 2**-8 * expected.abs().max()
