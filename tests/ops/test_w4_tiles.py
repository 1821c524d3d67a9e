"""Weights of 4 bits in tiles: where each code lies, the way back, and products on the CPU."""

from __future__ import annotations

import pytest
import torch

from fastattn import ops
from fastattn.reference.quantize import unpack_nibbles

ROWS, COLUMNS = 48, 192


def drawn(dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 256, (ROWS, COLUMNS // 2), dtype=torch.uint8).view(dtype)


def e2m1_of_bf16(half: int) -> int:
    """Sign, exponent and mantissa where bf16 has them; no other bit is set."""
    assert half & ~0x81C0 == 0
    return half >> 12 & 8 | half >> 6 & 7


def rotated(word: int, left: int) -> int:
    return (word << left | word >> 32 - left) & 0xFFFFFFFF


def fp4_codes(word: int) -> list[int]:
    """As csrc/gemm/gemm_sm90_w4_16_bit_tiles.cuh takes a word apart: pairs of row g, of row g + 8, and both eight columns on."""
    words = (word, rotated(word, 12), word << 2 ^ word << 6, word << 2 ^ rotated(word, 8))
    pairs = [w & 0x81C081C0 for w in words]
    return [e2m1_of_bf16(pair >> shift & 0xFFFF) for pair in pairs for shift in (0, 16)]


def int4_codes(word: int) -> list[int]:
    return [word >> 4 * (i // 2) + 16 * (i % 2) & 15 for i in range(8)]


def fp8_codes(word: int) -> list[int]:
    """Four columns of row g, then of row g + 8."""
    signs = [word >> 8 * i + 7 & 1 for i in range(4)] + [word >> 8 * i + 3 & 1 for i in range(4)]
    return [word >> 4 * i & 7 | sign << 3 for i, sign in enumerate(signs)]


@pytest.mark.parametrize(("dtype", "order"), [(torch.uint8, 16), (torch.uint8, 8), (torch.int32, 16)])
def test_every_code_lies_where_its_lane_takes_it(dtype: torch.dtype, order: int) -> None:
    packed = drawn(dtype)
    codes = unpack_nibbles(packed.view(torch.uint8)).tolist()
    tiles = ops.pack_w4_tiles(packed, order)
    assert tiles.dtype is dtype
    words = (tiles.view(torch.int32).long() & 0xFFFFFFFF).view(ROWS // 16, COLUMNS // 64, 32, 4).tolist()
    codes_of = fp8_codes if order == 8 else int4_codes if dtype is torch.int32 else fp4_codes
    for row_tile, of_rows in enumerate(words):
        for column_tile, of_lanes in enumerate(of_rows):
            for lane, of_lane in enumerate(of_lanes):
                g, t = divmod(lane, 4)
                for j, word in enumerate(of_lane):
                    if order == 16:
                        places = [(8 * (i // 2 % 2), 2 * t + i // 4 * 8 + i % 2) for i in range(8)]
                    else:
                        places = [(8 * (i // 4), 4 * t + i % 4) for i in range(8)]
                    expected = [codes[16 * row_tile + g + r][64 * column_tile + 16 * j + c] for r, c in places]
                    assert codes_of(word) == expected, (row_tile, column_tile, lane, j)
    assert torch.equal(ops.unpack_w4_tiles(tiles, order), packed)


@pytest.mark.parametrize("group_size", [16, 32])
def test_fp4_linear_from_tiles(group_size: int) -> None:
    packed, x = drawn(), torch.randn(5, COLUMNS, dtype=torch.bfloat16)
    low, high = (0x20, 0x50) if group_size == 16 else (100, 140)
    scale = torch.randint(low, high, (ROWS, COLUMNS // group_size), dtype=torch.uint8)
    for global_scale in (None, torch.rand(ROWS) + 0.5):
        scale_tiles, its_global = ops.pack_w4_scales(scale, group_size, global_scale)
        out = ops.fp4_linear(x, ops.pack_w4_tiles(packed), scale_tiles, group_size, its_global)
        assert torch.equal(out, ops.fp4_linear(x, packed, scale, group_size, global_scale))
        fours = ops.pack_w4_tiles(packed, 8)
        assert torch.equal(out, ops.fp4_linear(x, fours, scale_tiles, group_size, its_global, tile_order=8))
    if group_size == 16:
        assert torch.equal(ops.unpack_w4_scales(scale_tiles), scale)
    else:  # in each row 2⁶ is the largest, and the others are as far from it as they were
        relative = ops.unpack_w4_scales(scale_tiles).int()
        assert (relative.amax(1) == 133).all()
        assert torch.equal(133 - relative, scale.amax(1).int()[:, None] - scale.int())


def test_int4_linear_from_tiles() -> None:
    packed, x = drawn(torch.int32), torch.randn(5, COLUMNS, dtype=torch.bfloat16)
    scale = torch.rand(ROWS, COLUMNS // 64).bfloat16()
    zero_point = torch.randint(-8, 8, (ROWS, COLUMNS // 64), dtype=torch.int8)
    out = ops.int4_linear(x, ops.pack_w4_tiles(packed), scale, 64, zero_point)
    assert torch.equal(out, ops.int4_linear(x, packed, scale, 64, zero_point))


_TILES, _SCALES = torch.zeros(3, 1, 512, dtype=torch.uint8), torch.zeros(3, 1, 64, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.pack_w4_tiles(torch.zeros(40, 32, dtype=torch.uint8)), r"weight_packed has shape \(40, 32\)"),
        (lambda: ops.pack_w4_tiles(torch.zeros(48, 48, dtype=torch.uint8)), r"weight_packed has shape \(48, 48\)"),
        (lambda: ops.pack_w4_tiles(torch.zeros(48, 8, dtype=torch.int32), 8), "order is 8, expected 16"),
        (lambda: ops.pack_w4_tiles(torch.zeros(48, 32, dtype=torch.uint8), 4), "order is 4, expected 16 or 8"),
        (lambda: ops.pack_w4_tiles(torch.zeros(48, 32, dtype=torch.uint8), 16.0), "order is 16.0, expected 16 or 8"),  # type: ignore[arg-type]
        (lambda: ops.unpack_w4_tiles(torch.zeros(3, 1, 128, dtype=torch.uint8)), r"tiles has shape \(3, 1, 128\)"),
        (lambda: ops.pack_w4_scales(torch.zeros(48, 4, dtype=torch.uint8), 64), "group_size is 64, expected 16"),
        (lambda: ops.pack_w4_scales(torch.zeros(48, 4, dtype=torch.uint8), 16.0), "group_size is 16.0, expected 16"),  # type: ignore[arg-type]
        (lambda: ops.pack_w4_scales(torch.zeros(48, 4, dtype=torch.uint8), [16]), r"group_size is \[16\], expected 16"),  # type: ignore[arg-type]
        (lambda: ops.pack_w4_scales(torch.zeros(48, 3, dtype=torch.uint8), 32), r"weight_scale has shape \(48, 3\)"),
        (lambda: ops.unpack_w4_scales(torch.zeros(3, 1, 16, dtype=torch.uint8)), r"tiles has shape \(3, 1, 16\)"),
        (
            lambda: ops.fp4_linear(torch.zeros(17, 64), _TILES, _SCALES, 16, tile_order=8),
            r"x has shape \(17, 64\), expected at most 16 rows with tile_order 8",
        ),
        (
            lambda: ops.fp4_linear(torch.zeros(1, 64), _TILES, _SCALES, 16, tile_order=4),
            "tile_order is 4, expected 16 or 8",
        ),
        (
            lambda: ops.fp4_linear(torch.zeros(1, 64), _TILES, _SCALES, 16, tile_order=8.0),  # type: ignore[arg-type]
            "tile_order is 8.0, expected 16 or 8",
        ),
        (
            lambda: ops.fp4_linear(torch.zeros(1, 64), _TILES[0, :, :32], _TILES[0, :, :4], 16, tile_order=8),
            "tile_order is 8, expected 16 where weight_packed is not in tiles",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
