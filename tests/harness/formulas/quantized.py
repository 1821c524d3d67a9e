"""Products with numbers of 8 and 4 bits, and with weights 2:4."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.harness.formulas.dense import gated, linear


def int8_linear(
    c: torch.dtype,
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    weight_sum: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    activation: str | None = None,
) -> list[Tensor]:
    rows = x.double() if x_zero_point is None else x.double() - x_zero_point.double()[:, None]
    out = (rows @ weight.double().t()) * x_scale.double()[:, None] * weight_scale.double()  # exact sums
    out = out.to(c) if bias is None else out.to(c) + bias.to(c)
    return [out] if activation is None else gated(c, out, activation)


def fp8_linear(
    c: torch.dtype,
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    fast_accum: bool = False,
    batch_invariant: bool = False,
    activation: str | None = None,
) -> list[Tensor]:
    rows = x.double() * x_scale.double()[:, None]
    columns = weight.double() * weight_scale.double()[:, None]
    out = (rows @ columns.t()).to(c)
    out = out if bias is None else out + bias.to(c)
    return [out] if activation is None else gated(c, out, activation)


def sparse_24_weight(values: Tensor, metadata: Tensor) -> Tensor:
    """(N, K) fp64 of values (N, K/2), by where a product's registers have the four bits of a row and of four columns."""
    n, half = values.shape
    row = torch.arange(n, device=values.device)[:, None]
    four = torch.arange(half // 2, device=values.device)[None]
    in_unit, is_high = four % 16, row // 8 % 2
    if values.itemsize == 1:  # a lane of four has 32 columns of a row
        quarter, bit = in_unit // 8 * 2 + is_high, in_unit % 8 * 4
    else:  # 16 columns of two rows
        quarter, bit = in_unit // 4, is_high * 16 + in_unit % 4 * 4
    place = metadata[row // 128, four // 16, row % 128 // 16 * 32 + row % 8 * 4 + quarter] >> bit
    weight = torch.zeros(n, half // 2, 4, dtype=torch.float64, device=values.device)
    places = torch.stack([place & 3, place >> 2 & 3], -1).long()
    return weight.scatter_(-1, places, values.double().reshape(n, half // 2, 2)).view(n, 2 * half)


def sparse_linear(
    c: torch.dtype, x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None = None
) -> list[Tensor]:
    return linear(c, x, sparse_24_weight(values, metadata), bias)


def sparse_int8_linear(
    c: torch.dtype,
    x: Tensor,
    x_scale: Tensor,
    values: Tensor,
    metadata: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    return int8_linear(c, x, x_scale, sparse_24_weight(values, metadata), weight_scale, bias)


def sparse_fp8_linear(
    c: torch.dtype,
    x: Tensor,
    x_scale: Tensor,
    values: Tensor,
    metadata: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    fast_accum: bool = False,
) -> list[Tensor]:
    return fp8_linear(c, x, x_scale, sparse_24_weight(values, metadata), weight_scale, bias)


def fp8_block_linear(
    c: torch.dtype,
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Block by block, each sum times its two scales."""
    out = torch.zeros(len(x), len(weight), dtype=torch.float64, device=x.device)
    blocks = torch.arange(len(weight), device=x.device) // 128
    for g in range(-(-x.shape[1] // 128)):
        rows, columns = (t[:, 128 * g : 128 * (g + 1)].double() for t in (x, weight))
        out += (rows @ columns.t()) * x_scale[g].double()[:, None] * weight_scale[blocks, g].double()
    return [out.to(c) if bias is None else out.to(c) + bias.to(c)]


_E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)  # by code


def _nibbles(packed: Tensor, columns: Tensor) -> Tensor:
    """Codes 0 … 15 of these columns of each row, whatever the element's width."""
    per_element = 2 * packed.element_size()
    return (packed.long()[:, columns // per_element] >> (columns % per_element * 4)) & 15


def int4_linear(
    c: torch.dtype,
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    group_size: int,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> list[Tensor]:
    columns = torch.arange(x.shape[-1], device=x.device)
    groups = columns // group_size
    zero = 8 if zero_point is None else 8 + zero_point.long()[:, groups]
    weight = (_nibbles(weight_packed, columns) - zero).to(c) * weight_scale.to(c)[:, groups]
    return linear(c, x, weight, bias)


def _e4m3(bits: Tensor) -> Tensor:
    """A sign, four bits of exponent, three of mantissa; the sign is left out."""
    exponent, mantissa = (bits >> 3) & 15, (bits & 7).double()
    return torch.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent.double() - 10))


def fp4_linear(
    c: torch.dtype,
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    group_size: int,
    global_scale: Tensor | None = None,
    bias: Tensor | None = None,
    tile_order: int = 16,  # rows have none
) -> list[Tensor]:
    columns = torch.arange(x.shape[-1], device=x.device)
    bits = weight_scale.long()
    scale = _e4m3(bits) if group_size == 16 else 2.0 ** (bits.double() - 127)
    numbers = torch.tensor(_E2M1, dtype=c, device=x.device)
    weight = numbers[_nibbles(weight_packed, columns)] * scale.to(c)[:, columns // group_size]
    out = linear(c, x, weight)[0]
    out = out if global_scale is None else out / global_scale.to(c)
    return [out if bias is None else out + bias.to(c)]


def fp4_fp8_linear(
    c: torch.dtype,
    x: Tensor,
    x_scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    group_size: int,
    global_scale: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    fast_accum: bool = True,
) -> list[Tensor]:
    columns = torch.arange(x.shape[-1], device=x.device)
    bits = weight_scale.long()
    if group_size == 16:
        scale, factor = _e4m3(bits) / 8, torch.full((len(bits),), 8.0, dtype=torch.float64, device=x.device)
    else:
        largest = bits.amax(1, keepdim=True) if bits.shape[1] else bits.new_zeros(len(bits), 1)
        scale, factor = 2.0 ** (bits - largest + 6).double(), 2.0 ** (largest[:, 0] - 133).double()
    numbers = torch.tensor(_E2M1, dtype=torch.float64, device=x.device)
    weight = numbers[_nibbles(weight_packed, columns)] * scale[:, columns // group_size]
    # By torch's cast, not by powers of two: on a GPU pow(2, n) is off by a bit, and ties would not go to even.
    weight = weight.float().to(torch.float8_e4m3fn).double() * factor[:, None]
    if global_scale is not None:
        weight = weight / global_scale.double()[:, None]
    out = ((x.double() * x_scale.double()[:, None]) @ weight.t()).to(c)
    return [out if bias is None else out + bias.to(c)]
