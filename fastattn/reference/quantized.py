"""Products with weights of few bits: exact integers for INT8, e4m3 as it is, weights made fp32 and rounded to x's dtype for 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.reference import linear as dense
from fastattn.reference import norm, quantize, w4_tiles
from fastattn.reference.activation import gated_activation
from fastattn.reference.gated_linear import gate_product

FP8_BLOCK = 128  # rows, and columns, that share a scale

# So many products of int8 have a sum of at most 2²⁴ in magnitude, which fp32 arithmetic finds exactly, in any order.
EXACT_COLUMNS = 2**24 // 128**2


def _to_quantize(x: Tensor, activation: str) -> Tensor:
    """x (M, K), or of (M, 2K) with an activation act(gate) * up in x's dtype, → (M, K) fp32."""
    return (gated_activation(x, activation) if activation else x).float()


def quantize_int8(x: Tensor, activation: str = "") -> tuple[Tensor, Tensor]:
    """x (M, K) → q (M, K) int8, scale (M) fp32; with an activation, of x (M, 2K)."""
    values = _to_quantize(x, activation)
    scale = values.abs().amax(1) / 127 if values.shape[1] else values.new_zeros(x.shape[0])
    scale = torch.where(scale == 0, 1.0, scale)
    q = (values / scale[:, None]).nan_to_num(0.0).round().clamp(-127, 127)
    return q.to(torch.int8), scale


def quantize_int8_asymmetric(x: Tensor, activation: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """x (M, K) → q (M, K) int8, scale (M) fp32, zero_point (M) int32; with an activation, of x (M, 2K)."""
    values = _to_quantize(x, activation)
    zeros = values.new_zeros(x.shape[0])
    low, high = (values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)) if values.shape[1] else (zeros, zeros)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, 1.0, scale)
    zero_point = (-128 - (low / scale).nan_to_num(0.0)).clamp(-128, 127).round()
    q = ((values / scale[:, None]).nan_to_num(0.0) + zero_point[:, None]).clamp(-128, 127).round()
    return q.to(torch.int8), scale, zero_point.to(torch.int32)


def quantize_fp8(x: Tensor, activation: str = "") -> tuple[Tensor, Tensor]:
    """x (M, K) → q (M, K) float8_e4m3fn, scale (M) fp32; with an activation, of x (M, 2K)."""
    values = _to_quantize(x, activation)
    scale = values.abs().amax(1) / 448 if values.shape[1] else values.new_zeros(x.shape[0])
    scale = torch.where(scale == 0, 1.0, scale)
    return (values / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def rms_norm_quantize_int8(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """residual ← round(x + residual) if there is one, then its RMSNorm, or x's, rounded to x's dtype and then to int8."""
    return quantize_int8(_rms_norm(x, residual, weight, eps))


def rms_norm_quantize_fp8(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same in e4m3."""
    return quantize_fp8(_rms_norm(x, residual, weight, eps))


def _rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    return norm.rms_norm(x, weight, eps) if residual is None else norm.add_rms_norm(x, residual, weight, eps)


def quantize_fp8_groups(x: Tensor, activation: str = "") -> tuple[Tensor, Tensor]:
    """x (M, K) → q (M, K) float8_e4m3fn, scale (⌈K/128⌉, M) fp32; with an activation, of x (M, 2K)."""
    values = _to_quantize(x, activation)
    rows, columns = values.shape
    groups = -(-columns // FP8_BLOCK)
    padded = torch.nn.functional.pad(values, (0, -columns % FP8_BLOCK))
    q, scale = quantize_fp8(padded.reshape(rows * groups, FP8_BLOCK))
    return q.view(padded.shape)[:, :columns].contiguous(), scale.view(rows, groups).t().contiguous()


def int8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    x_zero_point: Tensor | None,
    weight_sum: Tensor | None,
    out_dtype: torch.dtype,
    activation: str = "",
) -> Tensor:
    """x (M, K) int8, x_scale and x_zero_point (M) or (1), weight (N, K) int8, weight_scale (N) or (1), bias and weight_sum (N)
    → (M, N), with an activation, of rows in turns, (M, N / 2).

    Integers go through fp32 products, in pieces whose sums are exact: torch's own int8 product takes 20 times as long on
    processors without instructions for it.
    """
    pieces = (torch.split(t.float(), EXACT_COLUMNS, 1) for t in (x, weight))
    sums = [dense.linear(x_piece, weight_piece, None) for x_piece, weight_piece in zip(*pieces, strict=True)]
    return scale_int8_sums(sums, x_scale, weight_scale, bias, out_dtype, x_zero_point, weight_sum, activation)


def fp8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool,
    batch_invariant: bool = False,
    activation: str = "",
) -> Tensor:
    """x (M, K) e4m3, x_scale (M) or (1), weight (N, K) e4m3, weight_scale (N) or (1), bias (N) → as `int8_linear`."""
    sums = dense.linear(x.float(), weight.float(), None, batch_invariant)
    return scale_8bit_sums(sums, x_scale, weight_scale, bias, out_dtype, activation)


def fp8_block_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """weight (N, K) e4m3, scale (⌈N/128⌉, ⌈K/128⌉) → (N, K) fp32."""
    rows, columns = weight.shape
    of_rows = quantize.per_column(scale.t(), FP8_BLOCK, rows).t()
    return weight.float() * quantize.per_column(of_rows, FP8_BLOCK, columns)


def fp8_group_rows(q: Tensor, scale: Tensor) -> Tensor:
    """q (M, K) e4m3, scale (⌈K/128⌉, M) → (M, K) fp32."""
    return q.float() * quantize.per_column(scale.t(), FP8_BLOCK, q.shape[1])


def fp8_block_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """x (M, K) e4m3, x_scale (⌈K/128⌉, M), weight (N, K) e4m3, weight_scale (⌈N/128⌉, ⌈K/128⌉), bias (N) → (M, N)."""
    sums = dense.linear(fp8_group_rows(x, x_scale), fp8_block_weight(weight, weight_scale), None)
    return round_sums(sums, bias, out_dtype)


def round_sums(sums: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sums (M, N) fp32 → (M, N) in dtype."""
    return (sums if bias is None else sums + bias.float()).to(dtype)


def scale_int8_sums(
    sums: list[Tensor],
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    x_zero_point: Tensor | None = None,
    weight_sum: Tensor | None = None,
    activation: str = "",
) -> Tensor:
    """Sums (M, N) of pieces of K, whole numbers in fp32, → (M, N), with an activation (M, N / 2)."""
    total = sums[0] if len(sums) == 1 else torch.stack([s.int() for s in sums]).sum(0, dtype=torch.int32)
    if x_zero_point is not None and weight_sum is not None:
        total = total.int() - x_zero_point[:, None] * weight_sum
    return scale_8bit_sums(total.float(), x_scale, weight_scale, bias, out_dtype, activation)


def scale_8bit_sums(
    sums: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    activation: str = "",
) -> Tensor:
    """Sums (M, N) fp32 → (M, N), with an activation (M, N / 2)."""
    scaled = sums * (x_scale[:, None] * weight_scale)
    if not activation:
        return round_sums(scaled, bias, out_dtype)
    return gate_product(round_sums(scaled, bias, torch.float32), activation).to(out_dtype)


def int4_weight(packed: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, num_columns: int) -> Tensor:
    """(N, num_columns) in scale's dtype: (code − zero_point) · scale, rounded once."""

    def wide(t: Tensor) -> Tensor:
        return quantize.per_column(t, group_size, num_columns)

    codes = quantize.unpack_int4(packed, num_columns)
    return quantize.dequantize_int(codes, wide(scale), None if zero_point is None else wide(zero_point)).to(scale.dtype)


def fp4_weight(packed: Tensor, scale: Tensor, group_size: int, num_columns: int, dtype: torch.dtype) -> Tensor:
    """(N, num_columns) in dtype: E2M1 · scale, the scale rounded to dtype first; without a global scale."""
    step = scale.view(torch.float8_e4m3fn).float() if group_size == 16 else quantize.e8m0_step(scale)
    step = quantize.per_column(step.to(dtype).float(), group_size, num_columns)
    return (quantize.unpack_e2m1(packed)[:, :num_columns] * step).to(dtype)


def int4_linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, bias: Tensor | None
) -> Tensor:
    """x (…, K), packed (N, ⌈K/8⌉) or tiles, scale and zero_point (N, G), bias (N) → (…, N)."""
    if packed.dim() == 3:
        packed = w4_tiles.unpack_tiles(packed, 16)
    return dense.linear(x, int4_weight(packed, scale, zero_point, group_size, x.shape[-1]), bias)


def fp4_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    group_size: int,
    bias: Tensor | None,
    tile_order: int = 16,
) -> Tensor:
    """x (…, K), packed (N, ⌈K/2⌉) and scale (N, G) or tiles of both, global_scale and bias (N) → (…, N)."""
    if packed.dim() == 3:
        packed, scale = w4_tiles.unpack_tiles(packed, tile_order), w4_tiles.unpack_scales(scale)
    weight = fp4_weight(packed, scale, group_size, x.shape[-1], x.dtype)
    return scale_fp4_sums(dense.linear(x.float(), weight.float(), None), global_scale, bias, x.dtype)


def fp4_as_fp8(
    packed: Tensor, scale: Tensor, global_scale: Tensor | None, group_size: int, num_columns: int
) -> tuple[Tensor, Tensor]:
    """(N, num_columns) float8_e4m3fn and (N) fp32, a factor a row, whose product is about the weight.

    NVFP4 (groups of 16): e4m3(E2M1 · scale / 8), and 8 / global_scale. MXFP4 (32): e4m3(E2M1 · 2^(6 + scale − the row's largest)),
    which is exact for scales down to 2⁻¹⁴ of the largest, and 2^(largest − 127 − 6) / global_scale.
    """
    if group_size == 16:
        step = scale.view(torch.float8_e4m3fn).float() / 8
        factor = torch.full((len(scale),), 8.0, device=scale.device)
    else:
        is_nan = scale == 255
        exponent = scale.int().masked_fill(is_nan, 0)
        largest = exponent.amax(1) if scale.shape[1] else exponent.new_zeros(len(scale))
        step = torch.exp2((exponent - largest[:, None] + 6).float()).masked_fill(is_nan, torch.nan)
        factor = quantize.e8m0_step(largest.to(torch.uint8)) / 64
    values = quantize.unpack_e2m1(packed)[:, :num_columns] * quantize.per_column(step, group_size, num_columns)
    return values.to(torch.float8_e4m3fn), factor if global_scale is None else factor / global_scale


def fp4_fp8_linear(
    x: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    group_size: int,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool,
) -> Tensor:
    """x (M, K) e4m3, x_scale (M) or (1), packed (N, ⌈K/2⌉) and scale (N, G) or tiles of both, global_scale and bias (N) → (M, N)."""
    if packed.dim() == 3:
        packed, scale = w4_tiles.unpack_tiles(packed, 8), w4_tiles.unpack_scales(scale)
    weight, factor = fp4_as_fp8(packed, scale, global_scale, group_size, x.shape[1])
    return fp8_linear(x, x_scale, weight, factor, bias, out_dtype, fast_accum)


def scale_fp4_sums(sums: Tensor, global_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """sums (…, N) fp32 → (…, N) in dtype."""
    return round_sums(sums if global_scale is None else sums / global_scale, bias, dtype)
