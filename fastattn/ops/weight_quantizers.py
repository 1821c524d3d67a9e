"""Weights in 4 bits, and back: what `int4_linear`, `fp4_linear` and `fp4_fp8_linear` take, as compressed-tensors' checkpoints have it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastattn.ops.checks import FLOAT, fail_type, fail_value
from fastattn.ops.four_bits import check_fp4_group
from fastattn.reference import quantize as reference


def _check(op: str, name: str, t: Tensor, dtypes: tuple[torch.dtype, ...], shape: str) -> None:
    """A matrix of one of the dtypes."""
    if not isinstance(t, Tensor):
        fail_type(op, f"{name} is {type(t).__name__}, expected a tensor")
    if t.dtype not in dtypes:
        fail_type(op, f"{name} is {t.dtype}, expected {' or '.join(map(str, dtypes))}")
    if t.dim() != 2:
        fail_value(op, f"{name} has shape {tuple(t.shape)}, expected {shape}")


def _checked_weight(op: str, weight: Tensor) -> Tensor:
    """The weight without its gradient, which rounding has not: scales that require grad are refused where they are multiplied."""
    _check(op, "weight", weight, FLOAT.cpu, "(N, K)")
    if not weight.shape[1]:
        fail_value(op, f"weight has shape {tuple(weight.shape)}, expected (N, K) with K ≥ 1")
    wrong = weight.isfinite().logical_not().nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        fail_value(op, f"weight[{row}, {column}] is {weight[row, column].item()}, expected finite numbers")
    return weight.detach()


def _check_group_size(op: str, group_size: int) -> None:
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1:
        fail_value(op, f"group_size is {group_size!r}, expected an integer from 1")


def _check_groups(op: str, name: str, t: Tensor, rows: int, columns: int, group_size: int) -> None:
    """t has an entry for each group of a weight's columns."""
    expected = rows, -(-columns // group_size)
    if tuple(t.shape) != expected:
        fail_value(
            op, f"{name} has shape {tuple(t.shape)}, expected {expected}, one for {group_size} of {columns} columns"
        )


def _columns(op: str, num_columns: int | None, packed: Tensor, per_element: int) -> int:
    """Columns that are meant, of those that packed has room for."""
    most = packed.shape[1] * per_element
    if num_columns is None:
        return most
    least = max(0, most - per_element + 1)
    if not isinstance(num_columns, int) or not least <= num_columns <= most:
        fail_value(
            op, f"num_columns is {num_columns!r}, expected {least} to {most} as weight_packed is {tuple(packed.shape)}"
        )
    return num_columns


def _pack_fp4(weight: Tensor, step: Tensor, group_size: int) -> Tensor:
    codes = reference.quantize_e2m1(weight, reference.per_column(step, group_size, weight.shape[1]))
    return reference.pack_e2m1(functional.pad(codes, (0, weight.shape[1] % 2)))


def quantize_int4(weight: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor]:
    """A weight in INT4 for `int4_linear`, rounded to nearest: codes −8 to 7, a scale for each group of columns, no zero points.

    weight: (N, K) bf16, fp16 or fp32, finite. group_size: columns of a group; the last may be shorter.

    Returns weight_packed (N, ⌈K/8⌉) int32 and weight_scale (N, ⌈K/group_size⌉) in weight's dtype, `max|w| / 7.5` of the group, rounded
    before the codes are: they are the nearest to what will be read.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit, naming the first
    number that is not finite.
    """
    op = "quantize_int4"
    weight = _checked_weight(op, weight)
    _check_group_size(op, group_size)
    scale = reference.int_step(reference.group_amax(weight, group_size), 4).to(weight.dtype)
    scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)  # in fp16 a step may be rounded to nothing
    codes = reference.quantize_int(weight, reference.per_column(scale, group_size, weight.shape[1]), 4)
    return reference.pack_int4(codes), scale


def dequantize_int4(
    weight_packed: Tensor,
    weight_scale: Tensor,
    group_size: int = 128,
    zero_point: Tensor | None = None,
    *,
    num_columns: int | None = None,
) -> Tensor:
    """The weight (N, K) fp32 that `int4_linear` multiplies by: `(code − zero_point) · weight_scale`.

    weight_packed: (N, ⌈K/8⌉) int32, weight_scale: (N, ⌈K/group_size⌉), zero_point: alike in int8, as `int4_linear` takes them.
    num_columns: K; None: all that weight_packed has room for.

    Raises as `quantize_int4`.
    """
    op = "dequantize_int4"
    _check(op, "weight_packed", weight_packed, (torch.int32,), "(N, ⌈K/8⌉)")
    _check(op, "weight_scale", weight_scale, FLOAT.cpu, "(N, ⌈K/group_size⌉)")
    _check_group_size(op, group_size)
    rows, columns = weight_packed.shape[0], _columns(op, num_columns, weight_packed, 8)
    _check_groups(op, "weight_scale", weight_scale, rows, columns, group_size)
    if zero_point is not None:
        _check(op, "zero_point", zero_point, (torch.int8,), "(N, ⌈K/group_size⌉)")
        _check_groups(op, "zero_point", zero_point, rows, columns, group_size)
        zero_point = reference.per_column(zero_point, group_size, columns)
    codes = reference.unpack_int4(weight_packed, columns)
    return reference.dequantize_int(codes, reference.per_column(weight_scale, group_size, columns), zero_point)


def quantize_nvfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight in NVFP4 for `fp4_linear` and `fp4_fp8_linear`, with group_size 16: E2M1, e4m3 scales, an fp32 scale for all of it.

    `global_scale = 448 · 6 / max|weight|`, `weight_scale = global_scale · max|w| / 6` of 16 columns, rounded to e4m3, and codes the nearest
    to `w · global_scale / weight_scale`, ties to even: bit for bit what compressed-tensors writes.

    weight: (N, K) bf16, fp16 or fp32, finite; the last group may be shorter.

    Returns weight_packed (N, ⌈K/2⌉) uint8, weight_scale (N, ⌈K/16⌉) uint8, the bits of e4m3, and global_scale (N) fp32, the same for all
    rows.
    Raises as `quantize_int4`.
    """
    weight = _checked_weight("quantize_nvfp4", weight)
    group_size = reference.NVFP4_GROUP
    global_scale = reference.nvfp4_global_scale(weight) if weight.numel() else weight.new_ones(1, dtype=torch.float32)
    scale = reference.nvfp4_scale(reference.group_amax(weight, group_size), global_scale)
    packed = _pack_fp4(weight, reference.nvfp4_step(scale, global_scale), group_size)
    return packed, scale.view(torch.uint8), global_scale.repeat(weight.shape[0])


def quantize_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in MXFP4 for `fp4_linear` and `fp4_fp8_linear`, with group_size 32: E2M1, scales that are powers of two (OCP Microscaling
    Formats, 2023): the largest at which the group, rounded to E2M1's precision, stays within ±6. Bit for bit what compressed-tensors writes.

    weight: (N, K) bf16, fp16 or fp32, finite; the last group may be shorter.

    Returns weight_packed (N, ⌈K/2⌉) uint8 and weight_scale (N, ⌈K/32⌉) uint8, exponents + 127.
    Raises as `quantize_int4`.
    """
    weight = _checked_weight("quantize_mxfp4", weight)
    group_size = reference.MXFP4_GROUP
    scale = reference.mxfp4_scale(reference.group_amax(weight, group_size))
    return _pack_fp4(weight, reference.e8m0_step(scale), group_size), scale


def dequantize_fp4(
    weight_packed: Tensor,
    weight_scale: Tensor,
    group_size: int,
    global_scale: Tensor | None = None,
    *,
    num_columns: int | None = None,
) -> Tensor:
    """The weight (N, K) fp32 that `fp4_linear` multiplies by: `E2M1 · weight_scale / global_scale`.

    weight_packed: (N, ⌈K/2⌉) uint8, weight_scale: (N, ⌈K/group_size⌉) uint8, group_size: 16 (NVFP4) or 32 (MXFP4), global_scale: (N) fp32,
    as `fp4_linear` takes them. num_columns: K; None: all that weight_packed has room for.

    Raises as `quantize_int4`.
    """
    op = "dequantize_fp4"
    _check(op, "weight_packed", weight_packed, (torch.uint8,), "(N, ⌈K/2⌉)")
    _check(op, "weight_scale", weight_scale, (torch.uint8,), "(N, ⌈K/group_size⌉)")
    check_fp4_group(op, group_size)
    rows, columns = weight_packed.shape[0], _columns(op, num_columns, weight_packed, 2)
    _check_groups(op, "weight_scale", weight_scale, rows, columns, group_size)
    if group_size == reference.NVFP4_GROUP:
        step = weight_scale.view(torch.float8_e4m3fn).float()
    else:
        step = reference.e8m0_step(weight_scale)
    if global_scale is not None:
        if not isinstance(global_scale, Tensor) or global_scale.dtype is not torch.float32:
            found = global_scale.dtype if isinstance(global_scale, Tensor) else type(global_scale).__name__
            fail_type(op, f"global_scale is {found}, expected torch.float32")
        if tuple(global_scale.shape) != (rows,):
            fail_value(op, f"global_scale has shape {tuple(global_scale.shape)}, expected ({rows},)")
        step = step / global_scale[:, None]
    codes = reference.unpack_e2m1(weight_packed)[:, :columns]
    return codes * reference.per_column(step, group_size, columns)
