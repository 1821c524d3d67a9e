"""Weights of 4 bits in the order in which Hopper's tensor cores take them, made once."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.checks import fail_type, fail_value
from fastattn.ops.four_bits import check_fp4_group, check_order
from fastattn.reference import w4_tiles as reference

_DTYPES = (torch.uint8, torch.int32)


def _check_tensor(op: str, name: str, t: Tensor, dtypes: tuple[torch.dtype, ...], shape: str, num_dims: int) -> None:
    if not isinstance(t, Tensor):
        fail_type(op, f"{name} is {type(t).__name__}, expected a tensor")
    if t.dtype not in dtypes:
        fail_type(op, f"{name} is {t.dtype}, expected {' or '.join(map(str, dtypes))}")
    if t.dim() != num_dims:
        fail_value(op, f"{name} has shape {tuple(t.shape)}, expected {shape}")


def _orders(dtype: torch.dtype) -> tuple[int, ...]:
    return (16,) if dtype is torch.int32 else reference.ORDERS


def pack_w4_tiles(weight_packed: Tensor, order: int = 16) -> Tensor:
    """A weight of 4 bits in tiles of 16 rows and 64 columns, once, for `int4_linear`, `fp4_linear` and `fp4_fp8_linear`.

    weight_packed: (N, K/2) uint8, E2M1, as `fp4_linear` takes it, or (N, K/8) int32, INT4, as `int4_linear` does, N a multiple of 16, K
        of 64.
    order: which of a tile's columns lie side by side: 16 for x in bf16 and fp16, 8 for x in fp8 (`fp4_fp8_linear`), E2M1 only.

    Returns (N/16, K/64, 512) uint8 or (N/16, K/64, 128) int32, as many bytes as there were.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for another shape or order.
    """
    op = "pack_w4_tiles"
    _check_tensor(op, "weight_packed", weight_packed, _DTYPES, "(N, K/2) in uint8 or (N, K/8) in int32", 2)
    check_order(op, "order", order, _orders(weight_packed.dtype))
    of_row = reference.COLUMNS // 2 // weight_packed.element_size()
    if weight_packed.shape[0] % reference.ROWS or weight_packed.shape[1] % of_row:
        expected = f"(N, {of_row} · C), of 64 columns each, with N a multiple of {reference.ROWS}"
        fail_value(op, f"weight_packed has shape {tuple(weight_packed.shape)}, expected {expected}")
    return reference.pack_tiles(weight_packed, order)


def unpack_w4_tiles(tiles: Tensor, order: int = 16) -> Tensor:
    """The weight (N, K/2) uint8 or (N, K/8) int32 that `pack_w4_tiles` has made tiles of, with the same order.

    Raises TypeError for what is not a tensor or has another dtype, ValueError for another shape or order.
    """
    op = "unpack_w4_tiles"
    shape = "(N/16, K/64, 512) in uint8 or (N/16, K/64, 128) in int32"
    _check_tensor(op, "tiles", tiles, _DTYPES, shape, 3)
    check_order(op, "order", order, _orders(tiles.dtype))
    if tiles.shape[2] * tiles.element_size() != reference.ROWS * reference.COLUMNS // 2:
        fail_value(op, f"tiles has shape {tuple(tiles.shape)}, expected {shape}")
    return reference.unpack_tiles(tiles, order)


def pack_w4_scales(
    weight_scale: Tensor, group_size: int, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The scales of FP4's groups in the tiles of `pack_w4_tiles`, and the global scale that goes with them. INT4's stay as they are.

    weight_scale: (N, K/group_size) uint8, as `fp4_linear` takes it, N a multiple of 16, K of 64.
    group_size: 16 (NVFP4) or 32 (MXFP4).
    global_scale: (N) fp32 or None.

    Returns tiles (N/16, K/64, 64 or 32) uint8 and for NVFP4 global_scale as it was. MXFP4's scales become relative to their row's largest,
    which becomes 2⁶, and global_scale (N) fp32 has the rest: the same weight, but that scales of less than 2⁻¹³³ of their row's largest
    become 2⁻¹²⁷.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for another shape or group_size.
    """
    op = "pack_w4_scales"
    _check_tensor(op, "weight_scale", weight_scale, (torch.uint8,), "(N, K/group_size)", 2)
    check_fp4_group(op, group_size)
    rows, of_tile = weight_scale.shape[0], reference.COLUMNS // group_size
    if rows % reference.ROWS or weight_scale.shape[1] % of_tile:
        expected = f"(N, {of_tile} · C), of 64 columns each, with N a multiple of {reference.ROWS}"
        fail_value(op, f"weight_scale has shape {tuple(weight_scale.shape)}, expected {expected}")
    if global_scale is not None:
        _check_tensor(op, "global_scale", global_scale, (torch.float32,), "(N,)", 1)
        if global_scale.shape[0] != rows:
            fail_value(op, f"global_scale has shape {tuple(global_scale.shape)}, expected ({rows},)")
    if group_size == 32:
        weight_scale, global_scale = reference.relative_mxfp4(weight_scale, global_scale)
    return reference.pack_scales(weight_scale, group_size), global_scale


def unpack_w4_scales(tiles: Tensor) -> Tensor:
    """The scales (N, K/group_size) uint8 that `pack_w4_scales` has made tiles of; of MXFP4 the relative ones, for the global scale that
    it gives with them.

    Raises TypeError for what is not a tensor or has another dtype, ValueError for another shape.
    """
    op, shape = "unpack_w4_scales", "(N/16, K/64, 64) of NVFP4 or (N/16, K/64, 32) of MXFP4"
    _check_tensor(op, "tiles", tiles, (torch.uint8,), shape, 3)
    if tiles.shape[2] not in (64, 32):
        fail_value(op, f"tiles has shape {tuple(tiles.shape)}, expected {shape}")
    return reference.unpack_scales(tiles)
