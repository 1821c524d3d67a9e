"""Mistakes in norms and in what they share with other operators of rows."""

from __future__ import annotations

from tests.emulator.mistakes.mistake import Header, Mistake

ROW_CACHE = Header("norm/row_cache.cuh", "small_operators")
REDUCE = Header("arch/reduce.cuh", "small_operators")

MISTAKES = [
    Mistake(
        "vectors behind those in registers are passed over",
        ROW_CACHE,
        "for (Index vec_idx = kCached * blockDim.x + threadIdx.x;",
        "for (Index vec_idx = (kCached + 1) * blockDim.x + threadIdx.x;",
        "rms_norm.cu",
        "1",
        "expected",
    ),
    Mistake(
        "a sum is read before all warps have added to it",
        REDUCE,
        """  __syncthreads();
  // Every warp""",
        "  // Every warp",
        "layer_norm.cu",
        "2",
        "expected",
    ),
]
