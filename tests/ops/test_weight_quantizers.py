"""Weights in 4 bits: the bytes are those of the library that defines the formats, the products are those of what they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import ops
from tests.harness.compare import assert_equal
from tests.ops.test_quantize import compressor, grouped_range, hostile_weight, scheme

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def theirs(preset: str, name: str, weight: Tensor, group: int, global_scale: Tensor | None = None) -> dict[str, Tensor]:
    """What compressed-tensors stores."""
    from compressed_tensors.quantization.utils import calculate_qparams

    args = scheme(preset, group_size=group)
    low, high = grouped_range(weight, group)
    scale = calculate_qparams(low, high, args.weights, global_scale)[0]
    state = {"weight": weight, "weight_scale": scale}
    if global_scale is not None:
        state["weight_global_scale"] = global_scale
    found: dict[str, Tensor] = compressor(name).compress(state, args)
    return found


@pytest.mark.parametrize(("rows", "columns"), [(8, 128), (13, 96), (5, 32)])
def test_bytes_are_compressed_tensors(rows: int, columns: int) -> None:
    from compressed_tensors.quantization.utils import generate_gparam

    weight = hostile_weight(rows, columns)
    packed, scale = ops.quantize_int4(weight, 32)
    stored = theirs("W4A16", "pack-quantized", weight, 32)
    assert_equal(packed, stored["weight_packed"], "INT4 codes")
    assert_equal(scale, stored["weight_scale"], "INT4 scales")

    packed, scale, global_scale = ops.quantize_nvfp4(weight)
    whole = generate_gparam(weight.amin(), weight.amax())
    assert_equal(global_scale, whole.repeat(rows), "global scale")
    stored = theirs("NVFP4A16", "nvfp4-pack-quantized", weight, 16, whole)
    assert_equal(packed, stored["weight_packed"], "NVFP4 codes")
    assert_equal(scale, stored["weight_scale"].view(torch.uint8), "NVFP4 scales")

    packed, scale = ops.quantize_mxfp4(weight)
    stored = theirs("MXFP4A16", "mxfp4-pack-quantized", weight, 32)
    assert_equal(packed, stored["weight_packed"], "MXFP4 codes")
    normal = scale > 0  # their logarithm of 2^-127 is one too low or not, as the processor likes
    assert_equal(scale[normal], stored["weight_scale"][normal], "MXFP4 scales")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 31, 64, 129])
def test_products_are_those_of_the_weight_that_comes_back(columns: int, dtype: torch.dtype, device: str) -> None:
    """Unit vectors as x: what is multiplied by is seen number by number. Last groups and bytes may have columns to spare."""
    if device == "cuda" and dtype is torch.float32:
        pytest.skip("weights may be in fp32, x may not on a GPU")
    weight = (torch.randn(6, columns, generator=torch.Generator().manual_seed(columns)) / 8).to(device, dtype)
    weight[1] = 0
    x = torch.eye(columns, device=device, dtype=dtype)
    for group in (8, 32, 128):
        packed, scale = ops.quantize_int4(weight, group)
        back = ops.dequantize_int4(packed, scale, group, num_columns=columns)
        assert back.shape == weight.shape and scale.dtype is dtype
        assert_equal(ops.int4_linear(x, packed, scale, group), back.to(dtype).t(), f"INT4 by {group}")
        step = scale.float().repeat_interleave(group, 1)[:, :columns]
        # The largest is 7.5 steps, less or more by what the step lost when it was rounded: half of eps, of them.
        most = step * (0.5 + 7.5 * torch.finfo(dtype).eps / 2 + 1e-6)
        assert bool(((back - weight.float()).abs() <= most).all()), "not the nearest"
    for packed, scale, group, whole in (
        (*ops.quantize_nvfp4(weight)[:2], 16, ops.quantize_nvfp4(weight)[2]),
        (*ops.quantize_mxfp4(weight), 32, None),
    ):
        back = ops.dequantize_fp4(packed, scale, group, whole, num_columns=columns)
        out = ops.fp4_linear(x, packed, scale, group, whole)
        torch.testing.assert_close(out, back.to(dtype).t(), rtol=torch.finfo(dtype).eps, atol=0)
        # Half of E2M1's widest gap, in units of the largest; NVFP4's scale is rounded to 3 bits beside.
        most = weight.float().abs().amax() * (1 / 6 + 1 / 16)
        assert bool(((back - weight.float()).abs() <= most).all())


def test_zero_points_come_off() -> None:
    packed, scale = ops.quantize_int4(torch.randn(4, 64), 32)
    zero_point = torch.randint(-8, 8, (4, 2), dtype=torch.int8)
    back = ops.dequantize_int4(packed, scale, 32, zero_point)
    torch.testing.assert_close(ops.int4_linear(torch.eye(64), packed, scale, 32, zero_point), back.t())


def test_no_rows_and_steps_that_fp16_has_not() -> None:
    for made in (ops.quantize_int4(torch.empty(0, 40)), ops.quantize_nvfp4(torch.empty(0, 40))):
        assert all(len(t) == 0 for t in made)
    packed, scale = ops.quantize_int4(torch.full((2, 8), 6e-8, dtype=torch.float16))
    assert bool((scale > 0).all())
    assert ops.dequantize_int4(packed, scale, 128, num_columns=8).abs().max() < 1.2e-7


@pytest.mark.parametrize("quantize", [ops.quantize_int4, ops.quantize_nvfp4, ops.quantize_mxfp4])
def test_a_parameter_gives_what_its_products_take(quantize: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    weight, x = torch.nn.Linear(64, 16).weight, torch.randn(3, 64)
    packed, scale, *whole = made = quantize(weight)
    assert not any(t.requires_grad for t in made)
    for found, expected in zip(made, quantize(weight.detach()), strict=True):
        assert_equal(found, expected, "without grad")
    if quantize is ops.quantize_int4:
        ops.int4_linear(x, packed, scale, 128)
    else:
        ops.fp4_linear(x, packed, scale, 16 if whole else 32, *whole)


def test_a_group_wider_than_the_weight_takes_no_more_memory() -> None:
    weight, x, widest = torch.randn(4, 40), torch.randn(3, 40), 2**31 - 1
    packed, scale = ops.quantize_int4(weight, widest)
    zero_point = torch.zeros(4, 1, dtype=torch.int8)
    for found, expected in zip((packed, scale), ops.quantize_int4(weight, 40), strict=True):
        assert_equal(found, expected, "wide")
    for dequantize in (ops.dequantize_int4, lambda *args: ops.int4_linear(x, *args)):
        wide, as_wide = (dequantize(packed, scale, group, zero_point) for group in (widest, 40))
        assert_equal(wide, as_wide, "wide")


_W = torch.ones(4, 64)
_INT4, _FP4 = ops.quantize_int4(_W, 32), ops.quantize_nvfp4(_W)


@pytest.mark.parametrize("quantize", [ops.quantize_int4, ops.quantize_nvfp4, ops.quantize_mxfp4])
@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ([[1.0]], TypeError, "weight is list, expected a tensor"),
        (_W.double(), TypeError, r"weight is torch\.float64, expected torch\.bfloat16 or torch\.float16"),
        (_W.int(), TypeError, r"weight is torch\.int32"),
        (_W[0], ValueError, r"weight has shape \(64,\), expected \(N, K\)"),
        (_W[:, :0], ValueError, r"weight has shape \(4, 0\), expected \(N, K\) with K ≥ 1"),
        (
            _W.index_fill(1, torch.tensor(3), float("nan")),
            ValueError,
            r"weight\[0, 3\] is nan, expected finite numbers",
        ),
        (
            -_W.index_fill(1, torch.tensor(5), float("inf")),
            ValueError,
            r"weight\[0, 5\] is -inf, expected finite numbers",
        ),
    ],
)
def test_weights_that_have_no_4_bits(
    quantize: Callable[[Any], Any], weight: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"{quantize.__name__}: {message}"):
        quantize(weight)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.quantize_int4(_W, 0), ValueError, "quantize_int4: group_size is 0, expected an integer from 1"),
        (lambda: ops.quantize_int4(_W, 32.0), ValueError, "quantize_int4: group_size is 32.0"),  # type: ignore[arg-type]
        (lambda: ops.dequantize_int4(*_INT4, 16), ValueError, r"weight_scale has shape \(4, 2\), expected \(4, 4\)"),
        (lambda: ops.dequantize_int4(*_INT4, 32, num_columns=56), ValueError, "num_columns is 56, expected 57 to 64"),
        (
            lambda: ops.dequantize_int4(_INT4[0][:, :0], _INT4[1][:, :0], 32, num_columns=-3),
            ValueError,
            "num_columns is -3, expected 0 to 0",
        ),
        (
            lambda: ops.dequantize_int4(*_FP4[:2], 32),
            TypeError,
            r"weight_packed is torch\.uint8, expected torch\.int32",
        ),
        (lambda: ops.dequantize_int4(*_INT4, 32, _INT4[1]), TypeError, r"zero_point is torch\.float32, expected"),
        (
            lambda: ops.dequantize_int4(*_INT4, 32, torch.zeros(4, 3, dtype=torch.int8)),
            ValueError,
            r"zero_point has shape \(4, 3\), expected \(4, 2\), one for 32 of 64 columns",
        ),
        (lambda: ops.dequantize_fp4(*_FP4[:2], 8), ValueError, "group_size is 8, expected 16 with scales in e4m3"),
        (
            lambda: ops.dequantize_fp4(*_FP4[:2], 16.0),
            ValueError,
            "group_size is 16.0, expected 16 with scales in e4m3",
        ),  # type: ignore[arg-type]
        (lambda: ops.dequantize_fp4(*_FP4[:2], [16]), ValueError, r"group_size is \[16\], expected 16 with scales"),  # type: ignore[arg-type]
        (lambda: ops.dequantize_fp4(*_FP4[:2], 32), ValueError, r"weight_scale has shape \(4, 4\), expected \(4, 2\)"),
        (
            lambda: ops.dequantize_fp4(*_FP4[:2], 16, _FP4[2][:1]),
            ValueError,
            r"global_scale has shape \(1,\), expected",
        ),
        (lambda: ops.dequantize_fp4(*_FP4[:2], 16, 2.0), TypeError, "global_scale is float, expected"),  # type: ignore[arg-type]
        (lambda: ops.dequantize_fp4(*_FP4[:2], 16, num_columns=66), ValueError, "num_columns is 66, expected 63 to 64"),
    ],
)
def test_mistakes_are_named(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
