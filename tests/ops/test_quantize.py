"""The numbers and bytes of quantized weights, bit by bit against the library that defines the checkpoints."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

from fastattn.reference import quantize as q
from tests.harness.compare import assert_equal, bits


def scheme(preset: str, **weights: object) -> QuantizationScheme:
    found = preset_name_to_scheme(preset, ["Linear"])
    assert found.weights is not None
    found.weights = found.weights.model_copy(update=weights)
    return found


def compressor(name: str) -> type[BaseCompressor]:
    found: type[BaseCompressor] = BaseCompressor.get_value_from_registry(name)
    return found


def hostile_weight(rows: int, columns: int) -> Tensor:
    """Normal values, a row of zeros, an outlier, values on every rounding tie, and both zeros."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 1000 + columns)) * 0.05
    weight[1] = 0
    weight[2, 3] = 7.5
    weight[3, : min(64, columns)] = (torch.arange(64) - 32)[: min(64, columns)] / 64
    weight[4, :4] = torch.tensor([-0.0, 1e-30, -1e-30, 3e-39])
    return weight


def grouped_range(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    groups = weight.unflatten(1, (-1, group))
    return groups.amin(-1), groups.amax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(8, 64), (13, 96), (5, 7)])
def test_int8(rows: int, columns: int, dtype: torch.dtype) -> None:
    args = scheme("W8A8")
    weight = hostile_weight(rows, columns + columns % 2)[:, :columns]
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    step = q.int_step(q.group_amax(weight, columns), 8)
    assert_equal(step, calculate_qparams(low, high, args.weights)[0], "step")
    codes = q.quantize_int(weight, step, 8)
    theirs = compressor("int-quantized").compress({"weight": weight, "weight_scale": step}, args)
    assert_equal(codes, theirs["weight"], "codes")
    scale = step.to(dtype)
    back = compressor("int-quantized").decompress({"weight": codes, "weight_scale": scale}, args)["weight"]
    assert_equal(q.dequantize_int(codes, scale).to(dtype), back, "values")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "columns", "group"), [(8, 128, 128), (13, 192, 64), (9, 96, 32), (16, 24, 24)])
def test_int4(rows: int, columns: int, group: int, symmetric: bool) -> None:
    args = scheme("W4A16" if symmetric else "W4A16_ASYM", group_size=group)
    weight = hostile_weight(rows, columns)
    low, high = grouped_range(weight, group)
    step, zero_point = calculate_qparams(low, high, args.weights)
    if symmetric:
        assert_equal(q.int_step(q.group_amax(weight, group), 4), step, "step")
        ours = None
    else:
        our_step, ours = q.int_step_asymmetric(low, high, 4)
        assert_equal(our_step, step, "step")
        changing = (low != 0) | (high != 0)  # a group of zeros may have any zero point
        assert_equal(ours[changing], zero_point.to(torch.int8)[changing], "zero points")
        zero_point = ours
    wide = [None if t is None else q.per_column(t, group, columns) for t in (step, ours)]
    assert wide[0] is not None
    codes = q.quantize_int(weight, wide[0], 4, wide[1])
    packed = q.pack_int4(codes)
    state = {"weight": weight, "weight_scale": step} | ({} if symmetric else {"weight_zero_point": zero_point})
    theirs = compressor("pack-quantized").compress(state, args)
    assert_equal(packed, theirs["weight_packed"], "packed")
    assert_equal(q.unpack_int4(packed, columns), codes, "unpacked")
    if ours is not None:
        assert_equal(q.pack_int4_zero_points(ours), theirs["weight_zero_point"], "packed zero points")
        assert_equal(q.unpack_int4_zero_points(theirs["weight_zero_point"], rows), ours, "unpacked zero points")
    back = compressor("pack-quantized").decompress(theirs, args)["weight"]
    assert_equal(q.dequantize_int(codes, wide[0], wide[1]), back, "values")


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 31, 33])
def test_int4_with_spare_bits(columns: int) -> None:
    codes = torch.randint(-8, 8, (5, columns), generator=torch.Generator().manual_seed(columns)).to(torch.int8)
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    assert_equal(q.pack_int4(codes), pack_to_int32(codes, 4), "packed")
    assert_equal(q.unpack_int4(q.pack_int4(codes), columns), codes, "unpacked")


def test_e2m1() -> None:
    """Every bf16 number, and the fp32 neighbours of every rounding bound."""
    from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4

    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    numbers = numbers[numbers.isfinite()]
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    near = torch.cat([bounds, bounds.nextafter(bounds * 2), bounds.nextafter(bounds * 0)])
    for values in (numbers, near, -near):
        assert torch.equal(bits(q.round_e2m1(values)), bits(cast_to_fp4(values.clone())))
    table = q.unpack_e2m1(torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8))
    assert table[0].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert torch.equal(q.pack_e2m1(table), torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]))


@pytest.mark.parametrize(("rows", "columns"), [(8, 128), (13, 96), (5, 32)])
def test_nvfp4(rows: int, columns: int) -> None:
    args = scheme("NVFP4A16")
    weight = hostile_weight(rows, columns)
    global_scale = q.nvfp4_global_scale(weight)
    assert_equal(global_scale, generate_gparam(weight.amin(), weight.amax()), "global scale")
    low, high = grouped_range(weight, 16)
    scale = q.nvfp4_scale(q.group_amax(weight, 16), global_scale)
    theirs = calculate_qparams(low, high, args.weights, global_scale)[0]
    assert_equal(scale.float(), theirs, "scale")
    values = q.quantize_e2m1(weight, q.per_column(q.nvfp4_step(scale, global_scale), 16, columns))
    state = {"weight": weight, "weight_scale": theirs, "weight_global_scale": global_scale}
    stored = compressor("nvfp4-pack-quantized").compress(state, args)
    assert_equal(q.pack_e2m1(values), stored["weight_packed"], "packed")
    assert torch.equal(bits(scale), bits(stored["weight_scale"]))
    back = compressor("nvfp4-pack-quantized").decompress(stored, args)["weight"]
    ours = q.unpack_e2m1(stored["weight_packed"]) * q.per_column(q.nvfp4_step(scale, global_scale), 16, columns)
    assert_equal(ours.bfloat16(), back, "values")


@pytest.mark.parametrize(("rows", "columns"), [(8, 128), (13, 96), (5, 32)])
def test_mxfp4(rows: int, columns: int) -> None:
    args = scheme("MXFP4A16")
    weight = hostile_weight(rows, columns)
    low, high = grouped_range(weight, 32)
    scale = q.mxfp4_scale(q.group_amax(weight, 32))
    theirs = calculate_qparams(low, high, args.weights)[0]
    step = q.e8m0_step(scale)
    assert_equal(step, theirs, "step")
    values = q.quantize_e2m1(weight, q.per_column(step, 32, columns))
    stored = compressor("mxfp4-pack-quantized").compress({"weight": weight, "weight_scale": theirs}, args)
    assert_equal(q.pack_e2m1(values), stored["weight_packed"], "packed")
    normal = scale > 0  # their logarithm of the smallest step, 2^-127, is one too low or not, as the processor likes
    assert_equal(scale[normal], stored["weight_scale"][normal], "scale")
    back = compressor("mxfp4-pack-quantized").decompress(stored, args)["weight"]
    assert_equal((q.unpack_e2m1(stored["weight_packed"]) * q.per_column(step, 32, columns)).bfloat16(), back, "values")


def test_mxfp4_scale_of_every_magnitude() -> None:
    """amax / 2^(scale - 127) rounds to at most 6 everywhere, and half that step would not do."""
    amax = torch.cat([torch.logspace(-30, 30, 5001, dtype=torch.float32), torch.tensor([1.75, 1.7499999, 7.0, 6.99])])
    step = q.e8m0_step(q.mxfp4_scale(amax))
    assert bool(((amax / step) < 7.0).all()) and bool((amax / (step / 2) >= 7.0).all())
