"""Keys and values of 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
# A number in e4m3 has a step that depends on where it lies between two powers of two. Of these scales of a token's head the one
# is taken that leaves the smallest error; one octave has all there is but for numbers below the normal ones.
FP8_SCALE_CHOICES = tuple(2 ** (i / 8) for i in range(8))


def to_8bit(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to nearest even, and not beyond the largest; a NaN is 0 in int8."""
    values = values.clamp(-LARGEST[dtype], LARGEST[dtype])
    return values.nan_to_num(0.0).round().to(dtype) if dtype is torch.int8 else values.to(dtype)


def token_scales(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """rows (T, Hk, D) fp32 → the scale of each token's head, (T, Hk): its largest magnitude over the largest number of ``dtype``,
    1 for zeros; in fp8 that times the one of `FP8_SCALE_CHOICES` with the smallest sum of squared errors."""
    scale = rows.abs().amax(-1) / LARGEST[dtype]
    scale = torch.where(scale == 0, 1.0, scale)
    if dtype is not torch.float8_e4m3fn:
        return scale
    choices = rows.new_tensor(FP8_SCALE_CHOICES)
    scaled = (rows / scale.unsqueeze(-1)).unsqueeze(2)  # (T, Hk, 1, D)
    errors = to_8bit(scaled / choices[:, None], dtype).float().mul_(choices[:, None]).sub_(scaled).square_().sum(-1)
    # A head that is not finite has no error to compare, and takes the first.
    return scale * choices[errors.nan_to_num(torch.inf).argmin(-1)]


def pages_of(cache: Tensor, scale: Tensor | None, blocks: Tensor, num_tokens: int) -> Tensor:
    """The first tokens of these blocks, (num_tokens, Hk, D): of cache (num_blocks, block_size, Hk, D) as it is, or in fp32
    if it is of 8 bits, times scale (Hk) or (num_blocks, block_size, Hk)."""
    if cache.dtype not in LARGEST:
        return cache.index_select(0, blocks).flatten(0, 1)[:num_tokens]
    bits = cache.view(torch.uint8).index_select(0, blocks)  # torch selects no fp8
    rows = bits.view(cache.dtype).flatten(0, 1)[:num_tokens].float()
    if scale is None:
        return rows
    of_rows = scale if scale.dim() == 1 else scale.index_select(0, blocks).flatten(0, 1)[:num_tokens]
    return rows * of_rows.unsqueeze(-1)
