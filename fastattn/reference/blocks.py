"""Copies of KV blocks, inside a paged cache and from one to another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def copy_blocks(caches: Sequence[Tensor], block_mapping: Tensor, num_tokens: Tensor | None) -> None:
    """cache[to, :n] ← cache[from, :n] for each pair and cache; n is block_size without num_tokens."""
    _copy(caches, caches, block_mapping, num_tokens)


def swap_blocks(sources: Sequence[Tensor], destinations: Sequence[Tensor], block_mapping: Tensor) -> None:
    """destination[to] ← source[from] for each pair and cache."""
    _copy(sources, destinations, block_mapping, None)


def _copy(
    sources: Sequence[Tensor], destinations: Sequence[Tensor], block_mapping: Tensor, num_tokens: Tensor | None
) -> None:
    counts = [None] * block_mapping.shape[0] if num_tokens is None else num_tokens.tolist()
    for (source_block, destination_block), count in zip(block_mapping.tolist(), counts, strict=True):
        if source_block < 0 or destination_block < 0:
            continue
        for source, destination in zip(sources, destinations, strict=True):
            destination[destination_block, :count] = source[source_block, :count]
