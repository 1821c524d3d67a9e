"""Dense layers in fp8 with a scale for each 128 × 128 block of the weight and each 128 columns of a row of x, as DeepSeek-V3 has them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops._library import define
from fastattn.ops.checks import E4M3, FLOAT, FP8, FP32, TensorArg, compile_check, fail_value
from fastattn.ops.eight_bits import check_out_dtype, compile_quantize_check
from fastattn.reference import quantized as reference

BLOCK = reference.FP8_BLOCK


def num_blocks(size: int) -> int:
    """Blocks of so many rows or columns; the last one may be shorter."""
    return -(-size // BLOCK)


def _fake_quantize(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape[0], x.shape[1] // 2 if activation else x.shape[1]
    return x.new_empty((rows, columns), dtype=FP8), x.new_empty((num_blocks(columns), rows), dtype=torch.float32)


def _fake_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)


_quantize = define(
    "quantize_fp8_groups(Tensor x, str activation) -> (Tensor, Tensor)", reference.quantize_fp8_groups, _fake_quantize
)
_linear = define(
    "fp8_block_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType out_dtype)"
    " -> Tensor",
    reference.fp8_block_linear,
    _fake_linear,
)

_check_quantize = compile_quantize_check("quantize_fp8_groups")
_check_linear = compile_check(
    "fp8_block_linear",
    TensorArg("x", "M K", E4M3),
    TensorArg("x_scale", "Gx M", FP32),
    TensorArg("weight", "N K", E4M3),
    TensorArg("weight_scale", "Gn Gk", FP32),
    TensorArg("bias", "N", FLOAT, optional=True),
)


def quantize_fp8_groups(x: Tensor, *, activation: str | None = None) -> tuple[Tensor, Tensor]:
    """Each group of 128 columns of a row in fp8: `scale = max|x| / 448`, `q = x / scale` rounded to e4m3, ties to even.

    x: (M, K) bf16 or fp16, on the CPU also fp32; the last dimension contiguous. The last group may be shorter.
    activation: as in `quantize_int8`.

    Returns q (M, K) float8_e4m3fn and scale (⌈K/128⌉, M) fp32, the rows' scales of a group beside each other, so that
    x[m, k] ≈ q[m, k] · scale[k // 128, m]; `scale.t()` is what other libraries call column-major. A group of zeros has scale 1.
    One with a NaN or an infinity has that as its scale, so that what is computed from it is NaN.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    q, scale = _quantize(x, _check_quantize(x, activation))
    return q, scale


def fp8_block_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    """`Σ over blocks of 128 columns of (x_block @ weight_blockᵀ) · x_scale · weight_scale, + bias`; sums in fp32, rounded once.

    On Hopper, where K is a multiple of 16, N of 8 and rows are aligned to 16 bytes, its tensor cores add up 128 products and
    fp32 the blocks (two levels, as in `fp8_linear` without fast_accum). Any other call on a GPU takes a plain kernel, which is
    for odd sizes and not for speed.

    x: (M, K) float8_e4m3fn and x_scale: (⌈K/128⌉, M) fp32, from `quantize_fp8_groups`.
    weight: (N, K) float8_e4m3fn, weight_scale: (⌈N/128⌉, ⌈K/128⌉) fp32, a scale a block; the last blocks may be smaller. A
        checkpoint's `weight_scale_inv` is that, whatever its name says: weight · weight_scale is the number meant.
    bias: (N) in out_dtype.
    out_dtype: bf16 or fp16, on the CPU also fp32.

    Returns (M, N) in out_dtype, contiguous. Format: DeepSeek-V3 (https://arxiv.org/abs/2412.19437, section 3.3.2).
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    _check_linear(x, x_scale, weight, weight_scale, bias)
    n, k = weight.shape
    if x_scale.shape[0] != num_blocks(k):
        expected = f"({num_blocks(k)}, {x.shape[0]}), a row of scales for {BLOCK} columns"
        fail_value("fp8_block_linear", f"x_scale has shape {tuple(x_scale.shape)}, expected {expected}, with K = {k}")
    if weight_scale.shape != (num_blocks(n), num_blocks(k)):
        expected = f"({num_blocks(n)}, {num_blocks(k)}), a scale for {BLOCK} × {BLOCK} of weight {tuple(weight.shape)}"
        fail_value("fp8_block_linear", f"weight_scale has shape {tuple(weight_scale.shape)}, expected {expected}")
    check_out_dtype("fp8_block_linear", x, bias, out_dtype)
    out: Tensor = _linear(x, x_scale, weight, weight_scale, bias, out_dtype)
    return out
