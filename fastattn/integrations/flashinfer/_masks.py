"""FlashInfer's custom masks, of which our kernels have those that are trees."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from fastattn.integrations._common import not_implemented
from fastattn.reference.attention_scores import MAX_TREE_TOKENS


def tree_mask(
    op: str, custom_mask: Tensor | None, packed_custom_mask: Tensor | None, starts: list[int], key_lengths: list[int]
) -> Tensor:
    """`paged_attention`'s words (T), on the CPU.

    custom_mask: (Σ queries · keys) bool, each request's rows one after the other. packed_custom_mask: uint8, the same with
    eight to a byte, the first one lowest, and each request from a byte on; it counts where both are given. starts (B + 1):
    where each request's queries begin. key_lengths (B).
    """
    name, mask = (
        ("custom_mask", custom_mask) if packed_custom_mask is None else ("packed_custom_mask", packed_custom_mask)
    )
    assert mask is not None
    mask = mask.cpu().flatten()
    runs = [end - start for start, end in pairwise(starts)]
    sizes = [n * keys for n, keys in zip(runs, key_lengths, strict=True)]
    if packed_custom_mask is not None:
        sizes = [-(-size // 8) for size in sizes]
    if mask.shape[0] != sum(sizes):
        raise ValueError(
            f"{op}: {name} has {mask.shape[0]} elements, expected {sum(sizes)}, those of all requests' queries and keys"
        )
    words = [torch.empty(0, dtype=torch.int64)]
    places = pairwise(accumulate(sizes, initial=0))
    for b, ((start, end), n, keys) in enumerate(zip(places, runs, key_lengths, strict=True)):
        part = mask[start:end]
        if packed_custom_mask is not None:
            part = (part.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[: n * keys]
        words.append(_words(op, f"{name} of request {b}", part.view(n, keys).bool()))
    return torch.cat(words)


def _words(op: str, name: str, mask: Tensor) -> Tensor:
    """mask: (queries, keys)."""
    n, keys = mask.shape
    if keys < n or not bool(mask[:, : keys - n].all()):
        not_implemented(op, f"{name} hides keys before the queries' own, expected all of them seen: a tree or a chain")
    own = mask[:, keys - n :]
    if not bool(own.diagonal().all()) or bool(own.triu(1).any()):
        not_implemented(op, f"{name} shows keys behind a query's own or hides that, expected a tree or a chain")
    if n > MAX_TREE_TOKENS and not bool(own.tril().sum() == n * (n + 1) // 2):
        not_implemented(op, f"{name} has {n} queries and is no chain, expected at most {MAX_TREE_TOKENS} in a tree")
    return (own[:, :MAX_TREE_TOKENS].long() << torch.arange(min(n, MAX_TREE_TOKENS))).sum(1)
