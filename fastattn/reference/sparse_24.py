"""2:4 sparse weights: of each four neighbours in a row at most two are not zero, and two are stored, with metadata that says which.

Metadata are four bits for four neighbours: the place of the first number stored, and, shifted by two, of the second, which comes
later. They lie as Hopper's wgmma.mma_async.sp wants them in the registers of 256 threads, (⌈N/128⌉, 8⌈K/512⌉, 256) int32: an
element is of one of 128 rows, or two of them, and of some of 64 columns. csrc/arch/wgmma_sparse.cuh says which. In bytes, with
the dimensions of a view:

    blocks of 128 rows │ units of 64 columns │ halves of 64 rows │ 16 rows │ 8 rows │ quarters │ the row 8 further │ bytes

where 16-bit numbers have 4 quarters of 2 bytes, and 8-bit ones 2 of 4 bytes. A byte is of eight columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastattn.reference import linear as dense
from fastattn.reference import quantized

ROWS, UNIT, PADDED_COLUMNS = 128, 64, 512  # of metadata: of a block, of a unit, and what columns are padded to
THREADS = 256
_PAIRS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
TOO_MANY = 255  # in the place of metadata


def metadata_shape(rows: int, columns: int) -> tuple[int, int, int]:
    """Of the metadata of a weight (rows, columns)."""
    return -(-rows // ROWS), -(-columns // PADDED_COLUMNS) * (PADDED_COLUMNS // UNIT), THREADS


def _places_of(is_kept: int) -> int:
    """The metadata for what is not zero of four, bit by bit: the first pair that has it all."""
    first, second = next((a, b) for a, b in _PAIRS if is_kept & ~(1 << a | 1 << b) == 0)
    return first | second << 2


_PLACES = [_places_of(bits) if bits.bit_count() <= 2 else TOO_MANY for bits in range(16)]


def _whole(t: Tensor) -> Tensor:
    """Numbers of 8 bits as integers: torch moves those about on any device."""
    return t.view(torch.int8) if t.itemsize == 1 else t


def _view(itemsize: int, blocks: int, units: int) -> tuple[int, ...]:
    quarters = 2 if itemsize == 1 else 4
    return blocks, units, 2, 4, 8, quarters, 2, 8 // quarters


def places(weight: Tensor) -> Tensor:
    """weight (N, K) → (N, K/4) uint8: the metadata of each four, or TOO_MANY where more than two are not zero."""
    is_kept = (_whole(weight) & 0x7F) != 0 if weight.dtype is torch.float8_e4m3fn else weight != 0
    bits = is_kept.view(len(weight), weight.shape[1] // 4, 4).to(torch.uint8)
    found = bits[..., 0] | bits[..., 1] << 1 | bits[..., 2] << 2 | bits[..., 3] << 3
    return torch.tensor(_PLACES, dtype=torch.uint8, device=weight.device)[found.int()]


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K), 2:4 sparse → values (N, K/2) and metadata."""
    rows, columns = weight.shape
    of_four = places(weight)
    indices = torch.stack([of_four & 3, of_four >> 2], -1).long()
    values = (
        _whole(weight).reshape(rows, columns // 4, 4).gather(-1, indices).view(weight.dtype).view(rows, columns // 2)
    )
    blocks, units, _ = metadata_shape(rows, columns)
    padding = (0, units * UNIT // 4 - columns // 4, 0, blocks * ROWS - rows)
    halves = functional.pad(of_four, padding, value=_PLACES[0]).view(blocks * ROWS, units * UNIT // 8, 2)
    b, u, half, sixteen, eight, quarters, two, num_bytes = _view(weight.itemsize, blocks, units)
    by_row = (halves[..., 0] | halves[..., 1] << 4).view(b, half, sixteen, two, eight, u, quarters, num_bytes)
    return values, by_row.permute(0, 5, 1, 2, 4, 6, 3, 7).reshape(blocks, units, 4 * THREADS).view(torch.int32)


def unpack(values: Tensor, metadata: Tensor) -> Tensor:
    """The weight (N, K) that values (N, K/2) and metadata are."""
    rows, half = values.shape
    blocks, units, _ = metadata.shape
    by_row = (
        metadata.contiguous()
        .view(torch.uint8)
        .view(_view(values.itemsize, blocks, units))
        .permute(0, 2, 3, 6, 4, 1, 5, 7)
    )
    packed = by_row.reshape(blocks * ROWS, units * UNIT // 8)
    of_four = torch.stack([packed & 15, packed >> 4], -1).flatten(1)[:rows, : half // 2]
    indices = torch.stack([of_four & 3, of_four >> 2], -1).long()
    weight = _whole(values).new_zeros(rows, half // 2, 4)
    weight.scatter_(-1, indices, _whole(values).reshape(rows, half // 2, 2))
    return weight.view(values.dtype).view(rows, 2 * half)


def sparse_linear(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, K), values (N, K/2), bias (N) → (…, N)."""
    return dense.linear(x, unpack(values, metadata), bias)


def sparse_int8_linear(
    x: Tensor,
    x_scale: Tensor,
    values: Tensor,
    metadata: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """x (M, K) int8, x_scale (M), values (N, K/2) int8, weight_scale (N), bias (N) → (M, N)."""
    return quantized.int8_linear(x, x_scale, unpack(values, metadata), weight_scale, bias, None, None, out_dtype)


def sparse_fp8_linear(
    x: Tensor,
    x_scale: Tensor,
    values: Tensor,
    metadata: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool,
) -> Tensor:
    """x (M, K) e4m3, x_scale (M) or (1), values (N, K/2) e4m3, weight_scale (N) or (1), bias (N) → (M, N)."""
    return quantized.fp8_linear(x, x_scale, unpack(values, metadata), weight_scale, bias, out_dtype, fast_accum)
