"""Weights of 4 bits in tiles: few rows of x, as rows of weight give them and the same again; more columns than shared memory holds of x;
up to 64 rows of every format. And many rows, of weights that are in tiles and of those that the call puts in tiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from fastattn import nn, ops
from fastattn.nn.fp4 import Fp4Weight
from fastattn.nn.quantized import Piece
from fastattn.nn.shard import Shard
from fastattn.reference import quantized as reference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 16, 17, 64])
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


_FORMATS = {"nvfp4": (16, 16), "mxfp4": (32, 16), "nvfp4 in order 8": (16, 8), "mxfp4 in order 8": (32, 8)}


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 48, 49, 64])
@pytest.mark.parametrize(("n", "k"), [(16, 64), (272, 960), (4112, 4160), (2064, 14400), (14352, 1088)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*_FORMATS, "int4", "int4 with zero points"])
def test_up_to_64_rows(name: str, dtype: torch.dtype, n: int, k: int, rows: int) -> None:
    torch.manual_seed(rows + n)
    x, bias = torch.randn(rows, k, device="cuda").to(dtype), torch.randn(n, device="cuda").to(dtype)
    call: Callable[..., torch.Tensor]
    if name in _FORMATS:
        group_size, order = _FORMATS[name]
        packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        # e4m3 with the least ones too; powers of two as far apart as the products of fp16 hold them
        low, high = (0, 0x40) if group_size == 16 else (112, 124)
        scale = torch.randint(low, high, (n, k // group_size), dtype=torch.uint8, device="cuda")
        global_scale = torch.rand(n, device="cuda") + 30
        weight = reference.fp4_weight(packed, scale, group_size, k, torch.float64) / global_scale[:, None].double()
        scales = ops.pack_w4_scales(scale, group_size, global_scale)
        call = partial(ops.fp4_linear, x, ops.pack_w4_tiles(packed, order), scales[0], group_size, scales[1], bias)
        if order == 8:
            if rows > 16:
                with pytest.raises(ValueError, match="expected at most 16 rows with tile_order 8"):
                    call(tile_order=order)
                return
            call = partial(call, tile_order=order)
    else:
        codes = torch.randint(-(2**31), 2**31 - 1, (n, k // 8), dtype=torch.int32, device="cuda")
        step = (torch.rand(n, k // 64, device="cuda") * 0.01).to(dtype)
        zero_point = torch.randint(-8, 8, step.shape, dtype=torch.int8, device="cuda") if "zero" in name else None
        weight = reference.int4_weight(codes, step, zero_point, 64, k).double()
        call = partial(ops.int4_linear, x, ops.pack_w4_tiles(codes), step, 64, zero_point, bias)
    expected, size = x.double() @ weight.t() + bias.double(), x.double().abs() @ weight.abs().t()
    out = call()
    half_ulp = torch.finfo(dtype).eps / 2
    # Rounded once, from sums in fp32 whose products and parts the tensor cores cut off at 2⁻²³ of the largest.
    assert bool(((out.double() - expected).abs() <= expected.abs() * half_ulp * 1.001 + size * 2.0**-19 + 1e-6).all())
    assert torch.equal(out, call())


@pytest.mark.parametrize("group_size", [16, 32])
def test_a_w4a8_layer_quantizes_more_than_16_rows(group_size: int) -> None:
    torch.manual_seed(3)
    n, k = 272, 960
    layer = nn.Fp4Scheme(group_size, fp8_activations=True).weight(n, k, [Piece("w", 0, slice(0, n), Shard.whole(n))])
    assert isinstance(layer, Fp4Weight)
    layer.codes.data.copy_(torch.randint(0, 256, layer.codes.shape))
    layer.scale.data.copy_(torch.randint(90, 120, layer.scale.shape))
    layer.stored_global_scale = None
    if layer.global_scale is not None:
        layer.global_scale.data.copy_(torch.rand(n) + 30)
    layer.cuda().pack()
    weight = layer.codes, layer.scale, group_size, layer.global_scale
    x = torch.randn(17, k, device="cuda").bfloat16()
    few = x.view(17, 1, k)[:16]
    assert torch.equal(layer(few, None), ops.fp4_linear(few, *weight, tile_order=8))
    assert torch.equal(layer(x, None), ops.fp4_fp8_linear(*ops.quantize_fp8(x), *weight, out_dtype=x.dtype))


@pytest.mark.parametrize("rows", [33, 300, 1100])
@pytest.mark.parametrize(("n", "k"), [(272, 960), (6144, 4096)])
@pytest.mark.parametrize("group_size", [16, 32])
def test_many_rows(n: int, k: int, group_size: int, rows: int) -> None:
    torch.manual_seed(1)
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    low, high = (0x20, 0x40) if group_size == 16 else (118, 124)
    scale = torch.randint(low, high, (n, k // group_size), dtype=torch.uint8, device="cuda")
    global_scale, bias = torch.rand(n, device="cuda") + 30, torch.randn(n, device="cuda").bfloat16()
    x = torch.randn(rows, k, device="cuda").bfloat16()
    q, x_scale = ops.quantize_fp8(x)
    scale_tiles, tiles_global_scale = ops.pack_w4_scales(scale, group_size, global_scale)
    weight = (
        reference.fp4_weight(packed, scale, group_size, k, torch.bfloat16).double() / global_scale[:, None].double()
    )
    as_fp8, factor = reference.fp4_as_fp8(packed, scale, global_scale, group_size, k)
    x8, weight8 = q.double() * x_scale[:, None].double(), as_fp8.double() * factor[:, None].double()
    exact, exact8, size8 = (a @ b.t() for a, b in ((x.double(), weight), (x8, weight8), (x8.abs(), weight8.abs())))
    rows_of = packed, scale, group_size, global_scale, bias
    for order in (16, 8):
        in_tiles = ops.pack_w4_tiles(packed, order), scale_tiles, group_size, tiles_global_scale, bias
        for call in (rows_of, in_tiles):
            if order == 16:
                wanted = exact + bias.double()
                outs = [ops.fp4_linear(x, *call) for _ in range(2)]
                assert (outs[0].double() - wanted).abs().max() <= 2**-8 * wanted.abs().max()
                assert torch.equal(*outs)
                continue
            for fast_accum in (True, False):
                outs = [
                    ops.fp4_fp8_linear(q, x_scale, *call, out_dtype=x.dtype, fast_accum=fast_accum) for _ in range(2)
                ]
                # Sums in e4m3 keep 14 bits over all steps of 32 columns, or over four.
                wanted, lost = exact8 + bias.double(), 2**-13 * (k / 32 if fast_accum else 4) + 2**-18
                assert bool(((outs[0].double() - wanted).abs() <= wanted.abs() * 2**-8 + size8 * lost).all())
                assert torch.equal(*outs)


@pytest.mark.parametrize("rows", [33, 300, 1100])
@pytest.mark.parametrize("group_size", [64, 4096])
def test_many_rows_of_int4(group_size: int, rows: int) -> None:
    torch.manual_seed(2)
    n, k = 1040, 4096
    codes = torch.randint(-(2**31), 2**31 - 1, (n, k // 8), dtype=torch.int32, device="cuda")
    step = (torch.rand(n, k // group_size, device="cuda") * 0.1).bfloat16()
    zero_point = torch.randint(-8, 8, step.shape, dtype=torch.int8, device="cuda")
    x = torch.randn(rows, k, device="cuda").bfloat16()
    expected = x.double() @ reference.int4_weight(codes, step, zero_point, group_size, k).double().t()
    for weight in (codes, ops.pack_w4_tiles(codes)):
        out = ops.int4_linear(x, weight, step, group_size, zero_point)
        assert (out.double() - expected).abs().max() <= 2**-8 * expected.abs().max()
