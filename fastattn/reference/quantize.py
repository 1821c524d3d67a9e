"""Numbers of few bits: how a weight becomes INT8, FP8, INT4, NVFP4 or MXFP4 and back, and how those lie in a checkpoint.

Values and bytes are those of the `compressed-tensors` library (0.12 and later), which the tests compare with bit by bit:

    format                     codes                                  scale, stored as weight_scale
    int-quantized              int8 (N, K)                            a row's: (N, 1), a float type
    float-quantized            e4m3 (N, K)                            the same
    pack-quantized             INT4, 8 in an int32: (N, ⌈K/8⌉)        a group's: (N, K/g), a float type
    nvfp4-pack-quantized       E2M1, 2 in a byte: (N, K/2)            a group of 16's: (N, K/16) e4m3, × weight_global_scale (1) fp32
    mxfp4-pack-quantized       E2M1, 2 in a byte: (N, K/2)            a group of 32's: (N, K/32) e8m0, as uint8

A *step* is the fp32 value of one unit of a code, whatever it is stored as; every function that rounds takes steps that broadcast
against the values, so that a whole weight is rounded at once (`per_column`), or one column after the other as GPTQ does.
Arithmetic is fp32. Where K is no multiple of the group, the last group is shorter.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

NVFP4_GROUP = 16
MXFP4_GROUP = 32
E2M1_MAX = 6.0
E4M3_MAX = 448.0

# The magnitudes of E2M1, by code, and the largest fp32 that rounds to each but the last. A tie goes to the even code, so every
# other bound is the number just below the middle.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BOUNDS = (0.25, 0.75 - 2**-24, 1.25, 1.75 - 2**-23, 2.5, 3.5 - 2**-22, 5.0)


# --- groups


def group_amax(weight: Tensor, group_size: int) -> Tensor:
    """Largest magnitude of each group of ``group_size`` columns: (N, K) → (N, ⌈K/group_size⌉) fp32."""
    return _groups(weight, group_size).abs().amax(-1)


def per_column(values: Tensor, group_size: int, num_columns: int) -> Tensor:
    """A value a group, (N, G), as one a column: (N, num_columns)."""
    return values.repeat_interleave(min(group_size, num_columns), 1)[:, :num_columns]


def _groups(weight: Tensor, group_size: int) -> Tensor:
    """(N, G, group_size) fp32; zeros fill up the last group. One that is wider than the weight is as wide."""
    group_size = min(group_size, max(weight.shape[1], 1))
    padded = functional.pad(weight.float(), (0, -weight.shape[1] % group_size))
    return padded.reshape(weight.shape[0], padded.shape[1] // group_size, group_size)


# --- integers


def _over(amax: Tensor, number: float) -> Tensor:
    """amax / number, the same everywhere: by a Python number a GPU multiplies by its rounded inverse."""
    return amax.float() / torch.full((), number, dtype=torch.float32, device=amax.device)


def int_step(amax: Tensor, num_bits: int) -> Tensor:
    """The step at which ±amax spans the whole range of a signed integer; where amax is 0, a tiny one that divides."""
    return _nonzero(_over(amax, (2**num_bits - 1) / 2))


def int_step_asymmetric(low: Tensor, high: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Step fp32 and zero point int8, the code of 0, for values from ``low`` to ``high``; 0 is always within."""
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    step = (high - low) / (2**num_bits - 1)
    least = -(2 ** (num_bits - 1))
    # A group of zeros has no step yet: 0/0, which any zero point serves.
    zero_point = (least - low / step).nan_to_num(0.0).clamp(least, -least - 1).round().to(torch.int8)
    return _nonzero(step), zero_point


def fp8_step(amax: Tensor) -> Tensor:
    """The step at which amax is e4m3's largest number; where amax is 0, a tiny one that divides."""
    return _nonzero(_over(amax, E4M3_MAX))


def _nonzero(step: Tensor) -> Tensor:
    return torch.where(step == 0, torch.finfo(torch.float32).eps, step)


def quantize_int(values: Tensor, step: Tensor, num_bits: int, zero_point: Tensor | None = None) -> Tensor:
    """Codes int8, from −2ᵇ⁻¹ to 2ᵇ⁻¹ − 1: values / step (+ zero_point), rounded to nearest even."""
    scaled = values.float() / step.float()
    if zero_point is not None:
        scaled = scaled + zero_point
    limit = 2 ** (num_bits - 1)
    return scaled.clamp(-limit, limit - 1).round().to(torch.int8)


def dequantize_int(codes: Tensor, step: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """(codes − zero_point) · step, fp32."""
    values = codes.float() if zero_point is None else codes.float() - zero_point.float()
    return values * step.float()


def pack_int4(codes: Tensor) -> Tensor:
    """Codes −8 … 7 (N, K) int8 → (N, ⌈K/8⌉) int32: code + 8 of column 8i + j in bits 4j to 4j + 3 of word i; spare bits are 0."""
    unsigned = functional.pad((codes.to(torch.int16) + 8).to(torch.uint8), (0, -codes.shape[1] % 8))
    # Through one dimension: a row or column alone may have strides that a view in another width refuses.
    return pack_nibbles(unsigned).reshape(-1).view(torch.int32).view(codes.shape[0], unsigned.shape[1] // 8)


def unpack_int4(packed: Tensor, num_columns: int) -> Tensor:
    """The inverse of `pack_int4`: (N, ⌈num_columns/8⌉) int32 → (N, num_columns) int8."""
    rows, words = packed.shape
    data = packed.contiguous().reshape(-1).view(torch.uint8).view(rows, 4 * words)
    return unpack_nibbles(data)[:, :num_columns].to(torch.int8) - 8


def pack_int4_zero_points(zero_points: Tensor) -> Tensor:
    """(N, G) int8 → (⌈N/8⌉, G) int32: packed as weights are, but along the rows."""
    return pack_int4(zero_points.t()).t().contiguous()


def unpack_int4_zero_points(packed: Tensor, num_rows: int) -> Tensor:
    """(⌈num_rows/8⌉, G) int32 → (num_rows, G) int8."""
    return unpack_int4(packed.t(), num_rows).t().contiguous()


# --- E2M1


def round_e2m1(values: Tensor) -> Tensor:
    """The nearest of 0, ±0.5, ±1, ±1.5, ±2, ±3, ±4, ±6; ties to the even code, beyond ±6 to ±6. fp32."""
    return values.float().sign() * _e2m1_table(values.device)[_magnitude_codes(values)]


def quantize_e2m1(values: Tensor, step: Tensor) -> Tensor:
    """values / step, rounded to E2M1: fp32 numbers, not codes. `pack_e2m1` stores them, times step they are the values again."""
    return round_e2m1(values.float() / step)


def pack_e2m1(values: Tensor) -> Tensor:
    """Numbers that are E2M1's already, (N, K) with K even → (N, K/2) uint8: column 2i in the low half of byte i."""
    return pack_nibbles(_magnitude_codes(values).to(torch.uint8) | (values.signbit().to(torch.uint8) << 3))


def unpack_e2m1(packed: Tensor) -> Tensor:
    """(N, B) uint8 → (N, 2B) fp32."""
    table = _e2m1_table(packed.device)
    return torch.cat((table, -table))[unpack_nibbles(packed).int()]


def _magnitude_codes(values: Tensor) -> Tensor:
    return torch.bucketize(values.float().abs(), torch.tensor(_BOUNDS, device=values.device))


def _e2m1_table(device: torch.device) -> Tensor:
    return torch.tensor(_E2M1, device=device)


def pack_nibbles(nibbles: Tensor) -> Tensor:
    """0 … 15 as uint8, (…, 2B) → (…, B) uint8, the first of a pair in the low half."""
    return nibbles[..., ::2] | (nibbles[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """(…, B) uint8 → (…, 2B) uint8, 0 … 15."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


# --- NVFP4 and MXFP4: the scales of E2M1


def nvfp4_global_scale(weight: Tensor) -> Tensor:
    """(1,) fp32: what the groups' scales are multiplied with before they are stored as e4m3, so that they use its range."""
    amax = weight.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny)
    return (E4M3_MAX * E2M1_MAX / amax).nan_to_num(1.0, 1.0, 1.0).reshape(1)


def nvfp4_scale(amax: Tensor, global_scale: Tensor) -> Tensor:
    """The stored scale of groups with these largest magnitudes, e4m3. A group of zeros, or nearly so, gets 1/8."""
    scale = (global_scale * _over(amax, E2M1_MAX)).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
    return torch.where(scale == 0, 0.125, scale).to(torch.float8_e4m3fn)


def nvfp4_step(scale: Tensor, global_scale: Tensor) -> Tensor:
    """e4m3 scales as steps: scale / global_scale, fp32."""
    return scale.float() / global_scale


def mxfp4_scale(amax: Tensor) -> Tensor:
    """The stored scale, uint8 (e8m0): the exponent of the largest power of two at which amax, rounded to E2M1's precision, stays
    within the format. Magnitudes from 1.75 · 2ᵉ on round up to 2ᵉ⁺¹, whose largest number is 6 · 2ᵉ⁻¹."""
    bits = amax.float().contiguous().view(torch.int32)
    exponent = ((bits + (1 << 21)) >> 23) & 255  # the biased exponent of amax after that rounding
    return (exponent - 2).clamp(min=0).to(torch.uint8)


def e8m0_step(scale: Tensor) -> Tensor:
    """uint8 exponents as steps: 2^(scale − 127), fp32; 255 is NaN. By their bits, since a GPU's pow(2, n) is off by one."""
    bits = torch.where(scale == 0, 1 << 22, scale.int() << 23).int()  # 2⁻¹²⁷ has no bit in front
    return torch.where(scale == 255, torch.nan, bits.view(torch.float32))
