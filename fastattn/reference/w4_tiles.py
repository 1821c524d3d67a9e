"""Weights of 4 bits in tiles of 16 rows and 64 columns, in the order in which the lanes of a warp multiply them.

A tile is 512 bytes: 32 lanes times 4 words of 32 bits. Lane 4 g + t has rows g and g + 8; word j has columns 16 j to 16 j + 15, of
which the lane has four of either row:

    order 16   2t, 2t + 1, 2t + 8 and 2t + 9, as mma.m16n8k16 takes its left operand: for x in bf16 and fp16
    order 8    4t to 4t + 3, as products of 32 columns of 8 bits take theirs: for x in e4m3

The eight codes of a word, and `_fp4_word`, `_int4_word` and `_fp8_word`, which say where their bits lie in it:

    order 16   columns 2t and 2t + 1 of row g, of row g + 8, columns 2t + 8 and 2t + 9 of row g, of row g + 8
    order 8    columns 4t to 4t + 3 of row g, of row g + 8
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.reference.quantize import e8m0_step, pack_nibbles, unpack_nibbles

ROWS, COLUMNS = 16, 64  # of a tile
ORDERS = (16, 8)

# Of a pair of E2M1 in a register: sign, exponent and mantissa where bf16 has its own, in either half.
_E2M1_PAIR = 0x81C081C0


def pack_tiles(packed: Tensor, order: int) -> Tensor:
    """(N, K/2) uint8, FP4, or (N, K/8) int32, INT4, → (N/16, K/64, 512) uint8 or (N/16, K/64, 128) int32."""
    rows, is_int4 = packed.shape[0], packed.dtype is torch.int32
    codes = unpack_nibbles(packed.contiguous().view(torch.uint8))
    row_tiles, column_tiles = rows // ROWS, codes.shape[1] // COLUMNS
    if order == 16:  # (R, upper, g, C, j, eight, t, two) → (R, C, g, t, j, eight, upper, two)
        split = codes.view(row_tiles, 2, 8, column_tiles, 4, 2, 4, 2).permute(0, 3, 2, 6, 4, 5, 1, 7)
    else:  # (R, upper, g, C, j, t, four) → (R, C, g, t, j, upper, four)
        split = codes.view(row_tiles, 2, 8, column_tiles, 4, 4, 4).permute(0, 3, 2, 5, 4, 1, 6)
    of_words = [c.long() for c in split.reshape(row_tiles, column_tiles, 128, 8).unbind(-1)]
    word = _fp8_word(of_words) if order == 8 else _int4_word(of_words) if is_int4 else _fp4_word(of_words)
    words = torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)
    return words if is_int4 else words.view(torch.uint8)


def unpack_tiles(tiles: Tensor, order: int) -> Tensor:
    """What `pack_tiles` has made the tiles of."""
    (row_tiles, column_tiles), is_int4 = tiles.shape[:2], tiles.dtype is torch.int32
    word = tiles.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    of_words = _fp8_codes(word) if order == 8 else _int4_codes(word) if is_int4 else _fp4_codes(word)
    lanes = torch.stack([c.to(torch.uint8) for c in of_words], -1)
    if order == 16:
        split = lanes.view(row_tiles, column_tiles, 8, 4, 4, 2, 2, 2).permute(0, 6, 2, 1, 4, 5, 3, 7)
    else:
        split = lanes.view(row_tiles, column_tiles, 8, 4, 4, 2, 4).permute(0, 5, 2, 1, 4, 3, 6)
    packed = pack_nibbles(split.reshape(row_tiles * ROWS, column_tiles * COLUMNS))
    return packed.view(torch.int32) if is_int4 else packed


def pack_scales(scale: Tensor, group_size: int) -> Tensor:
    """FP4's (N, G) uint8, G = K/group_size, → (N/16, K/64, 64 or 32): of a tile rows g and g + 8 side by side, g after g."""
    (rows, groups), of_tile = scale.shape, COLUMNS // group_size
    split = scale.reshape(rows // ROWS, 2, 8, groups // of_tile, of_tile).permute(0, 3, 2, 1, 4)
    return split.reshape(rows // ROWS, groups // of_tile, ROWS * of_tile)


def unpack_scales(tiles: Tensor) -> Tensor:
    """What `pack_scales` has made the tiles of."""
    row_tiles, column_tiles, of_tile = tiles.shape[0], tiles.shape[1], tiles.shape[2] // ROWS
    split = tiles.reshape(row_tiles, column_tiles, 8, 2, of_tile).permute(0, 3, 2, 1, 4)
    return split.reshape(row_tiles * ROWS, column_tiles * of_tile)


# MXFP4's scales in tiles are relative to their row's largest, which is this, 2⁶: so E2M1 times a scale fits e4m3, and in 16 bits the
# scale can take a factor along. Of a row whose scales are all below _LEAST the largest is less, since the rest must fit fp32.
_LARGEST, _LEAST = 133, 7
_E8M0_NAN, _E8M0_ONE = 255, 127


def relative_mxfp4(scale: Tensor, global_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """scale (N, G) uint8, global_scale (N) fp32 → the same of the same weight, with no scale of more than 2⁶: what a row's scales
    lose its global scale gains. Those that would be less than 2⁻¹²⁷ become that."""
    is_nan = scale == _E8M0_NAN
    largest = scale.int().masked_fill(is_nan, 0).amax(1).clamp(min=_LEAST)
    moved = (scale.int() + (_LARGEST - largest)[:, None]).clamp(min=0).masked_fill(is_nan, _E8M0_NAN)
    factor = e8m0_step(_LARGEST + _E8M0_ONE - largest)
    return moved.to(torch.uint8), factor if global_scale is None else global_scale * factor


def absolute_mxfp4(scale: Tensor, global_scale: Tensor) -> Tensor:
    """What `relative_mxfp4` has made scales and the global scale of, if there was none before."""
    is_nan = scale == _E8M0_NAN
    moved = scale.int() - (torch.frexp(global_scale).exponent - 1)[:, None]
    return moved.clamp(0, _E8M0_NAN - 1).masked_fill(is_nan, _E8M0_NAN).to(torch.uint8)


# --- the bits of a word, int64 from 0 to 2³² - 1


def _rotated(word: Tensor, left: int) -> Tensor:
    """By so many bits to the left, of 32."""
    return (word << left | word >> 32 - left) & 0xFFFFFFFF


def _both(*bits: int) -> int:
    """These bits of either half."""
    return sum(1 << bit | 1 << bit + 16 for bit in bits)


def _pairs(codes: list[Tensor]) -> list[Tensor]:
    """Two codes each, the even column's in the low half, as `_E2M1_PAIR` has them."""
    numbers = [(code & 8) << 12 | (code & 7) << 6 for code in codes]
    return [even | odd << 16 for even, odd in zip(numbers[::2], numbers[1::2], strict=True)]


def _fp4_word(codes: list[Tensor]) -> Tensor:
    """The word of which `_fp4_pairs` makes the pairs. Three could lie in it side by side, but never four."""
    a, b, c, d = _pairs(codes)
    word = a | _rotated(b, 20)
    word = word | (d ^ _rotated(word, 8)) >> 2 & _both(13, 5)
    word = word | (c ^ word << 2) >> 6 & _both(9, 2, 1)
    word = word | _rotated(d ^ word << 2 & 0xFFFFFFFF, 24) & _both(0)
    word = word | (c ^ word << 6) >> 2 & _both(4)
    return word | _rotated(d ^ word << 2 & 0xFFFFFFFF, 24) & _both(14)


def _fp4_pairs(word: Tensor) -> list[Tensor]:
    """What the kernels compute: four rotations, of which two may be shifts, and four logic operations."""
    shifted = word << 2
    pairs = (word, _rotated(word, 12), shifted ^ word << 6, shifted ^ _rotated(word, 8))
    return [pair & _E2M1_PAIR for pair in pairs]


def _fp4_codes(word: Tensor) -> list[Tensor]:
    halves = [half for pair in _fp4_pairs(word) for half in (pair & 0xFFFF, pair >> 16)]
    return [half >> 12 & 8 | half >> 6 & 7 for half in halves]


def _int4_word(codes: list[Tensor]) -> Tensor:
    """Pair i in bits 4i to 4i + 3 of either half."""
    return sum((code << i // 2 * 4 + i % 2 * 16 for i, code in enumerate(codes)), torch.zeros_like(codes[0]))


def _int4_codes(word: Tensor) -> list[Tensor]:
    return [word >> i // 2 * 4 + i % 2 * 16 & 15 for i in range(8)]


def _fp8_bits(i: int) -> tuple[int, int]:
    """Where the magnitude of code i begins, of a byte permute's selector, and where its sign is."""
    return 4 * i, 8 * (i % 4) + (7 if i < 4 else 3)


def _fp8_word(codes: list[Tensor]) -> Tensor:
    """Magnitudes are the selectors of two byte permutes; signs are the fourth bits, where few operations bring them to bytes' tops."""
    word = torch.zeros_like(codes[0])
    for i, code in enumerate(codes):
        magnitude, sign = _fp8_bits(i)
        word |= (code & 7) << magnitude | code >> 3 << sign
    return word


def _fp8_codes(word: Tensor) -> list[Tensor]:
    return [word >> magnitude & 7 | (word >> sign & 1) << 3 for magnitude, sign in map(_fp8_bits, range(8))]
