"""Kernels with one mistake each, which the emulator must find; a mistake that was made once becomes one of them."""

from __future__ import annotations

from tests.emulator.mistakes import attention, decoder, gemm, gemm_w4, small_operators
from tests.emulator.mistakes.mistake import Mistake as Mistake

MISTAKES = [*attention.MISTAKES, *decoder.MISTAKES, *gemm.MISTAKES, *gemm_w4.MISTAKES, *small_operators.MISTAKES]
