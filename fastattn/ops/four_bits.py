"""Dense layers whose weights are numbers of 4 bits: integers, E2M1 with x in 16 bits, and with x in fp8."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops._library import define
from fastattn.ops.checks import (
    E4M3,
    FLOAT,
    FP32,
    INT8,
    INT32,
    UINT8,
    AtLeast,
    Flag,
    TensorArg,
    compile_check,
    fail_value,
)
from fastattn.ops.eight_bits import check_may_be_one, check_out_dtype
from fastattn.reference import quantized as reference
from fastattn.reference import w4_tiles

TILE_ROWS, TILE_COLUMNS = w4_tiles.ROWS, w4_tiles.COLUMNS
FP4_GROUPS = {16: "e4m3 (NVFP4)", 32: "e8m0 (MXFP4)"}
MAX_ROWS_OF_ORDER_8 = 16  # of x in 16 bits, for tiles whose order is that for x in fp8


def _in_tiles(weight: Tensor) -> bool:
    return isinstance(weight, Tensor) and weight.dim() == 3


def _num_rows(weight: Tensor) -> int:
    """Of a weight of 4 bits, which may be in tiles."""
    return weight.shape[0] * (TILE_ROWS if _in_tiles(weight) else 1)


def _fake_int4(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, bias: Tensor | None
) -> Tensor:
    return x.new_empty((*x.shape[:-1], _num_rows(weight)))


def _fake_fp4(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    group_size: int,
    bias: Tensor | None,
    tile_order: int = 16,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], _num_rows(weight)))


def _fake_fp4_fp8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    group_size: int,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool,
) -> Tensor:
    return x.new_empty((x.shape[0], _num_rows(weight)), dtype=out_dtype)


_int4_linear = define(
    "int4_linear(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? zero_point, int group_size, Tensor? bias)"
    " -> Tensor",
    reference.int4_linear,
    _fake_int4,
)
_fp4_linear = define(
    "fp4_linear(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? global_scale, int group_size, Tensor? bias,"
    " int tile_order=16) -> Tensor",
    reference.fp4_linear,
    _fake_fp4,
)
_fp4_fp8_linear = define(
    "fp4_fp8_linear(Tensor x, Tensor x_scale, Tensor weight_packed, Tensor weight_scale, Tensor? global_scale, int group_size,"
    " Tensor? bias, ScalarType out_dtype, bool fast_accum) -> Tensor",
    reference.fp4_fp8_linear,
    _fake_fp4_fp8,
)
_check_int4, _check_int4_tiles = (
    compile_check(
        "int4_linear",
        TensorArg("x", "... K", FLOAT),
        TensorArg("weight_packed", weight, INT32),
        TensorArg("weight_scale", "N G", "x"),
        TensorArg("zero_point", "N G", INT8, optional=True),
        AtLeast("group_size", 1),
        TensorArg("bias", "N", "x", optional=True),
    )
    for weight in ("N W", "R C W")
)
_check_fp4, _check_fp4_tiles = (
    compile_check(
        "fp4_linear",
        TensorArg("x", "... K", FLOAT),
        TensorArg("weight_packed", weight, UINT8),
        TensorArg("weight_scale", scale, UINT8),
        TensorArg("global_scale", "N", FP32, optional=True),
        AtLeast("group_size", 1),
        TensorArg("bias", "N", "x", optional=True),
    )
    for weight, scale in (("N W", "N G"), ("R C W", "R C S"))
)
_check_fp4_fp8, _check_fp4_fp8_tiles = (
    compile_check(
        "fp4_fp8_linear",
        TensorArg("x", "M K", E4M3),
        TensorArg("x_scale", "Sx", FP32),
        TensorArg("weight_packed", weight, UINT8),
        TensorArg("weight_scale", scale, UINT8),
        TensorArg("global_scale", "N", FP32, optional=True),
        AtLeast("group_size", 1),
        TensorArg("bias", "N", FLOAT, optional=True),
        Flag("fast_accum"),
    )
    for weight, scale in (("N W", "N G"), ("R C W", "R C S"))
)


def _check_packing(
    op: str, x: Tensor, weight_packed: Tensor, weight_scale: Tensor, group_size: int, per_word: int
) -> None:
    """weight_packed holds K columns, per_word to an element, unless in tiles; weight_scale one a group of them."""
    columns = x.shape[-1]
    of_columns = [("weight_packed", weight_packed, per_word), ("weight_scale", weight_scale, group_size)]
    for name, t, each in of_columns[1:] if _in_tiles(weight_packed) else of_columns:
        expected = -(-columns // each)
        if t.shape[1] != expected:
            fail_value(
                op,
                f"{name} has shape {tuple(t.shape)}, expected (N, {expected}): {each} columns to an element, "
                f"with K = {columns} from x {tuple(x.shape)}",
            )


def _check_tiles(
    op: str, x: Tensor, weight_packed: Tensor, of_rows: dict[str, Tensor | None], scale: Tensor | None, group_size: int
) -> None:
    """A weight in tiles has K columns; scale, FP4's, is in tiles of the same. of_rows: what has an entry for each row, first."""
    columns, num_rows = x.shape[-1], _num_rows(weight_packed)
    words = TILE_ROWS * TILE_COLUMNS // 2 // weight_packed.element_size()
    if columns == 0 or columns % TILE_COLUMNS or tuple(weight_packed.shape[1:]) != (columns // TILE_COLUMNS, words):
        fail_value(
            op,
            f"weight_packed has shape {tuple(weight_packed.shape)}, in tiles, expected (N/{TILE_ROWS}, K/{TILE_COLUMNS}, {words}) with "
            f"K = {columns}, a multiple of {TILE_COLUMNS}, from x {tuple(x.shape)}",
        )
    if scale is None and group_size % TILE_COLUMNS and group_size < columns:
        fail_value(op, f"group_size is {group_size}, expected a multiple of {TILE_COLUMNS} with weight_packed in tiles")
    if scale is not None and scale.shape[2] != TILE_ROWS * TILE_COLUMNS // group_size:
        expected = TILE_ROWS * TILE_COLUMNS // group_size
        fail_value(
            op, f"weight_scale has shape {tuple(scale.shape)}, expected (N/{TILE_ROWS}, K/{TILE_COLUMNS}, {expected})"
        )
    for name, t in of_rows.items():
        if t is not None and t.shape[0] != num_rows:
            fail_value(
                op, f"{name} has shape {tuple(t.shape)}, expected N = {num_rows} rows, as weight_packed in tiles has"
            )
    for name, t in (("weight_packed", weight_packed), ("weight_scale", scale)):
        if t is not None and not t.is_contiguous():
            fail_value(op, f"{name} has strides {t.stride()}, expected contiguous tiles")


def check_fp4_group(op: str, group_size: int) -> None:
    if not isinstance(group_size, int) or group_size not in FP4_GROUPS:
        allowed = " or ".join(f"{size} with scales in {kind}" for size, kind in FP4_GROUPS.items())
        fail_value(op, f"group_size is {group_size!r}, expected {allowed}")


def check_order(op: str, name: str, order: int, allowed: tuple[int, ...] = w4_tiles.ORDERS) -> None:
    """An order of tiles."""
    if not isinstance(order, int) or order not in allowed:
        fail_value(op, f"{name} is {order!r}, expected {' or '.join(map(str, allowed))}")


def _check_tile_order(op: str, x: Tensor, in_tiles: bool, tile_order: int) -> None:
    """16, or with tiles 8 for few rows of x."""
    check_order(op, "tile_order", tile_order)
    if tile_order == 8 and not in_tiles:
        fail_value(op, "tile_order is 8, expected 16 where weight_packed is not in tiles")
    if tile_order == 8 and x.shape[:-1].numel() > MAX_ROWS_OF_ORDER_8:
        fail_value(op, f"x has shape {tuple(x.shape)}, expected at most {MAX_ROWS_OF_ORDER_8} rows with tile_order 8")


def int4_linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    group_size: int,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`x @ weightᵀ + bias` with weight = (code − zero_point) · weight_scale, rounded to x's dtype; fp32 sums, rounded once.

    x: (…, K), 1 to 3 dimensions, bf16 or fp16, on the CPU also fp32; the last dimension contiguous.
    weight_packed: (N, ⌈K/8⌉) int32, codes −8 … 7 as code + 8, column 8i + j in bits 4j to 4j + 3 of element i; or the tiles that
        `pack_w4_tiles` makes of it, with groups of multiples of 64 columns, or one. Those are for a CPU and for GPUs of compute
        capability 9.0, which put other weights in tiles in each call with many rows of x.
    weight_scale: (N, ⌈K/group_size⌉) in x's dtype, one a group of columns; the last group may be shorter.
    group_size: columns of a group; K for a scale a row.
    zero_point: like weight_scale, int8 from −8 to 7: the code of 0, which is 0 without it.
    bias: (N) in x's dtype.

    Returns (…, N) in x's dtype, contiguous.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    if _in_tiles(weight_packed):
        _check_int4_tiles(x, weight_packed, weight_scale, zero_point, group_size, bias)
        _check_tiles("int4_linear", x, weight_packed, {"weight_scale": weight_scale, "bias": bias}, None, group_size)
    else:
        _check_int4(x, weight_packed, weight_scale, zero_point, group_size, bias)
    _check_packing("int4_linear", x, weight_packed, weight_scale, group_size, 8)
    out: Tensor = _int4_linear(x, weight_packed, weight_scale, zero_point, group_size, bias)
    return out


def fp4_linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    group_size: int,
    global_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    tile_order: int = 16,
) -> Tensor:
    """`(x @ weightᵀ) / global_scale + bias` with weight = E2M1 · weight_scale in x's dtype; fp32 sums, rounded once.

    With e4m3 scales the weights are exact in bf16 and fp16; so they are with powers of two, where x's dtype has the range.

    x: (…, K), 1 to 3 dimensions, bf16 or fp16, on the CPU also fp32; the last dimension contiguous.
    weight_packed: (N, ⌈K/2⌉) uint8, E2M1 codes of columns 2i and 2i + 1 in the low and high half of element i; or the tiles that
        `pack_w4_tiles` makes of it with order 16. Those are for a CPU and for GPUs of compute capability 9.0. Other weights take
        longer there with many rows of x: NVFP4 is put in tiles in each call, MXFP4 has a slower kernel.
    weight_scale: (N, ⌈K/group_size⌉) uint8, the bits of one scale a group of columns; or, then too, what `pack_w4_scales` makes.
    group_size: 16, then scales are e4m3 (NVFP4), or 32, then they are e8m0, 2^(bits − 127), 255 is NaN (MXFP4).
    global_scale: (N) fp32, one a row; with tiles what `pack_w4_scales` makes of it.
    bias: (N) in x's dtype.
    tile_order: of tiles. 8 is that of `fp4_fp8_linear`, for up to 16 rows of x: so few need not be quantized for it.

    Returns (…, N) in x's dtype, contiguous.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    in_tiles = _in_tiles(weight_packed)
    check = _check_fp4_tiles if in_tiles else _check_fp4
    check(x, weight_packed, weight_scale, global_scale, group_size, bias)
    check_fp4_group("fp4_linear", group_size)
    if in_tiles:
        of_rows = {"global_scale": global_scale, "bias": bias}
        _check_tiles("fp4_linear", x, weight_packed, of_rows, weight_scale, group_size)
    else:
        _check_packing("fp4_linear", x, weight_packed, weight_scale, group_size, 2)
    _check_tile_order("fp4_linear", x, in_tiles, tile_order)
    out: Tensor = _fp4_linear(x, weight_packed, weight_scale, global_scale, group_size, bias, tile_order)
    return out


def fp4_fp8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    group_size: int,
    global_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    fast_accum: bool = True,
) -> Tensor:
    """`(x @ weightᵀ) · x_scale + bias` in fp8, with FP4 weights that become fp8 (W4A8); the sums in fp32, rounded once.

    With scales that are powers of two (MXFP4), a weight E2M1 · 2^(scale − 127) is exact where its scale is at least 2⁻¹⁴ of the
    largest one of its row, and else a multiple of 2⁻¹⁵ of that, rounded. With e4m3 scales (NVFP4), E2M1 · scale is rounded to e4m3's
    three bits behind the first: an error of at most 2⁻⁴ of the weight, or 2⁻⁷ of global_scale's unit where that is more.

    x: (M, K) float8_e4m3fn and x_scale: (M) fp32, from `quantize_fp8`, or (1), a scale for all rows.
    weight_packed: (N, ⌈K/2⌉) uint8, E2M1 codes of columns 2i and 2i + 1 in the low and high half of element i; or the tiles that
        `pack_w4_tiles` makes of it with order 8, which take less time as in `fp4_linear`.
    weight_scale: (N, ⌈K/group_size⌉) uint8, the bits of one scale a group of columns; or, then too, what `pack_w4_scales` makes.
    group_size: 16, then scales are e4m3 (NVFP4), or 32, then they are e8m0, 2^(bits − 127), 255 is NaN (MXFP4).
    global_scale: (N) fp32, one a row, which weights are divided by; with tiles what `pack_w4_scales` makes of it.
    bias: (N) in out_dtype.
    out_dtype: bf16 or fp16, on the CPU also fp32.
    fast_accum: sums may have the 14 bits that Hopper's tensor cores keep of them, where that is faster: an error of 2e-3 beside
        the 2e-2 of x in fp8. False: such sums are of 128 products, and fp32 from there on.

    Returns (M, N) in out_dtype, contiguous.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    in_tiles = _in_tiles(weight_packed)
    check = _check_fp4_fp8_tiles if in_tiles else _check_fp4_fp8
    check(x, x_scale, weight_packed, weight_scale, global_scale, group_size, bias, fast_accum)
    check_fp4_group("fp4_fp8_linear", group_size)
    if in_tiles:
        of_rows = {"global_scale": global_scale, "bias": bias}
        _check_tiles("fp4_fp8_linear", x, weight_packed, of_rows, weight_scale, group_size)
    else:
        _check_packing("fp4_fp8_linear", x, weight_packed, weight_scale, group_size, 2)
    check_may_be_one("fp4_fp8_linear", "x_scale", x_scale, "M", x.shape[0])
    check_out_dtype("fp4_fp8_linear", x, bias, out_dtype)
    out: Tensor = _fp4_fp8_linear(
        x, x_scale, weight_packed, weight_scale, global_scale, group_size, bias, out_dtype, fast_accum
    )
    return out
