"""How a step's queries go to attention so that a token's result does not depend on which others of its sequence are in the step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fastattn.nn import AttentionMetadata

# Rows (query token, head of a group) that attention's kernel for few rows takes of a sequence.
_ROWS = 32

# It adds up splits of keys whose length doubles at multiples of so many, and at as many seen in a window.
_LENGTHENS_AT = 8192


def group_size(group: int, window: int | None, token_scales: bool) -> int:
    """Tokens that may come together, a power of two. group: query heads to a KV head. window: tokens that a sliding window sees.
    token_scales: values have a scale for each token, and are rounded relative to the largest that any query of a group sees."""
    if token_scales or (window is not None and window > _LENGTHENS_AT // 2):
        return 1
    return 1 << (_ROWS // group).bit_length() - 1


def query_groups(
    cu_seqlens_q: np.ndarray, seqused_k: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each sequence's queries, cut at the positions that are multiples of ``size``, as sequences of their own.

    cu_seqlens_q (B + 1), seqused_k (B): as `ops.paged_attention` has them. Returns the same of the G groups, and which sequence
    each is of, (G), all int32. What a token's group can be follows from its position: it has no keys behind the group's end, and
    others in the group are only those at positions that never lie on another side of a cut.
    """
    lengths = np.diff(cu_seqlens_q)
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(cu_seqlens_q[-1]) + (seqused_k - cu_seqlens_q[1:])[sequence]
    begins = position % size == 0
    begins[cu_seqlens_q[:-1][lengths > 0]] = True
    starts = np.append(np.flatnonzero(begins), len(position))
    last = starts[1:] - 1
    return starts.astype(np.int32), (position[last] + 1).astype(np.int32), sequence[last].astype(np.int32)


def in_groups(meta: AttentionMetadata, cu_seqlens_q: np.ndarray, seqused_k: np.ndarray, size: int) -> AttentionMetadata:
    """The step's metadata with groups for sequences. cu_seqlens_q, seqused_k: the same as in meta, on the host."""
    starts, used, sequence = query_groups(cu_seqlens_q, seqused_k, size)
    both = torch.from_numpy(np.concatenate([starts, used, sequence]))
    device = meta.block_table.device
    if device.type == "cuda":
        both = both.pin_memory().to(device, non_blocking=True)
    starts_t, used_t, sequence_t = torch.split(both, [len(starts), len(used), len(sequence)])
    return replace(
        meta,
        cu_seqlens_q=starts_t,
        seqused_k=used_t,
        block_table=meta.block_table.index_select(0, sequence_t),
        max_seqlen_q=min(size, meta.max_seqlen_q),
    )
