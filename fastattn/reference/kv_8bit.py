"""Keys and values of 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def to_8bit(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to nearest even, and not beyond the largest; a NaN is 0 in int8."""
    values = values.clamp(-LARGEST[dtype], LARGEST[dtype])
    return values.nan_to_num(0.0).round().to(dtype) if dtype is torch.int8 else values.to(dtype)


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
