"""Mistakes in the kernel for a decoder's layers, whose CTAs wait for each other."""

from __future__ import annotations

from tests.emulator.mistakes.mistake import Header, Mistake

ATTENTION = Header("decoder/decode_layers_sm90_attention.cuh", "decode_layers")
HEAD = Header("decoder/decode_layers_sm90_head.cuh", "decode_layers")
LAYOUT = Header("decoder/decode_layers_sm90_layout.h", "decode_layers")
UNIT = "decode_layers_sm90.cu"

MISTAKES = [
    Mistake(
        "a warp without columns overwrites sums of squares that others still need",
        HEAD,
        "  sync();\n  const uint32_t* const buffer",
        "  const uint32_t* const buffer",
        UNIT,
        "64",
        "expected",
    ),
    Mistake(
        "what the step in front left in the workspace is taken for this one's",
        ATTENTION,
        "const uint2 words = take(source, mark, look(source));",
        "const uint4 seen = look(source);\n    const uint2 words = make_uint2(seen.x, seen.z);",
        UNIT,
        "64",
        "expected",
    ),
    Mistake(
        "the newest key is not in its place",
        ATTENTION,
        "const int left = mine.length - 1 - first - step * kStepKeys;",
        "const int left = mine.length - first - step * kStepKeys;",
        UNIT,
        "128",
        "expected",
    ),
    Mistake(
        "two products hand over in the same place",
        LAYOUT,
        "o = a + kDecodeMaxTokens * s.out_columns;",
        "o = a;",
        UNIT,
        "64",
        "expected",
    ),
]
