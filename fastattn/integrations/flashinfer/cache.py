"""FlashInfer's paged KV cache: pages listed by indptr and indices, the append, and what its lengths are."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.integrations.flashinfer._common import FP8, PagedCache, caches, check_layout
from fastattn.ops import rope_kv_write


def get_seq_lens(kv_indptr: Tensor, kv_last_page_len: Tensor, page_size: int) -> Tensor:
    """How many keys each request has in its pages.

    kv_indptr: (B + 1) int32, the first page of each request. kv_last_page_len: (B) int32, keys in its last page.

    Returns (B).
    """
    return (kv_indptr.diff() - 1).clamp(min=0) * page_size + kv_last_page_len


def get_batch_indices_positions(
    append_indptr: Tensor,
    seq_lens: Tensor,
    nnz: int,
    batch_indices: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """For each appended token, its request and its place there, if the tokens are the last of their requests.

    append_indptr: (B + 1) int32, where each request's tokens begin. seq_lens: (B) int32, keys with the new ones included.
    nnz: how many tokens there are; what lies past append_indptr[-1] is padding.
    batch_indices, positions: (nnz) int32, to write to.

    Returns batch_indices (nnz) int32, -1 for padding, and positions (nnz) int32, 0 there.
    """
    token = torch.arange(nnz, dtype=torch.int32, device=append_indptr.device)
    request = torch.searchsorted(append_indptr[1:].contiguous(), token, right=True)
    padding = request == seq_lens.shape[0]
    request = request.masked_fill(padding, 0)
    found = (token - append_indptr[1:][request] + seq_lens[request]).masked_fill(padding, 0).to(torch.int32)
    request = request.masked_fill(padding, -1).to(torch.int32)
    if batch_indices is not None:
        request = batch_indices.copy_(request)
    if positions is not None:
        found = positions.copy_(found)
    return request, found


@torch.no_grad()
def append_paged_kv_cache(
    append_key: Tensor,
    append_value: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    paged_kv_cache: PagedCache,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
    kv_layout: str = "NHD",
) -> None:
    """Write keys and values to the pages of their requests, which are there already.

    append_key, append_value: (nnz, Hk, D), the cache's dtype; for a cache in float8_e4m3fn also 16 bits, which are rounded as
      they are: divide them by the scales before. batch_indices, positions: (nnz) int32, where each goes, as
      `get_batch_indices_positions` gives them; nothing is written for a batch index of -1.
    paged_kv_cache: (pages, 2, page_size, Hk, D), for kv_layout "HND" (pages, 2, Hk, page_size, D), or a tuple (k, v)
      without the 2; changed in place.
    kv_indices: the pages of all requests. kv_indptr: (B + 1) int32, where each request's begin. kv_last_page_len: not
      needed.
    """
    op = "flashinfer.append_paged_kv_cache"
    check_layout(op, kv_layout)
    k_cache, v_cache = caches(op, paged_kv_cache, kv_layout)
    for name, t in (("append_key", append_key), ("append_value", append_value)):
        if t.dim() != 3 or t.shape[1:] != k_cache.shape[2:]:
            raise ValueError(
                f"{op}: {name} has shape {tuple(t.shape)}, expected (nnz, Hk, D) with Hk, D = "
                f"{tuple(k_cache.shape[2:])} from paged_kv_cache"
            )
    num_tokens, page_size = append_key.shape[0], k_cache.shape[1]
    if num_tokens == 0:
        return
    padding = batch_indices < 0
    page = kv_indptr[batch_indices.clamp(min=0).long()] + positions // page_size
    # Of padding the place may be anything; it stays within kv_indices, and slot -1 is not written.
    slots = kv_indices[page.clamp(0, kv_indices.shape[0] - 1).long()] * page_size + positions % page_size
    _write_slots(append_key, append_value, slots.masked_fill(padding, -1).to(torch.int32), k_cache, v_cache)


def _write_slots(k: Tensor, v: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """The cache write of `rope_kv_write`, without a query and with no dimension rotated."""
    if k.dtype is FP8:  # every one of its numbers is one of bf16, and comes back
        k, v = k.to(torch.bfloat16), v.to(torch.bfloat16)
    nowhere = torch.zeros(k.shape[0], dtype=torch.int32, device=k.device)
    rope_kv_write(
        k.new_empty((k.shape[0], 0, k.shape[2])), k, v, torch.empty((1, 0), device=k.device), nowhere, slots,
        k_cache, v_cache,
    )  # fmt: skip
