"""Attention to keys in pages that requests share (a system prompt, a document), read once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.ops.attention import paged_attention
from fastattn.ops.attention_merge import merge_attention_states
from fastattn.ops.checks import INT32, AtLeast, TensorArg, compile_check, fail_type, fail_value, values_readable

_OP = "cascade_attention"
_check_batch = compile_check(
    "shared_prefix_levels",
    TensorArg("cu_seqlens_q", "B+1", INT32),
    TensorArg("seqused_k", "B", INT32),
    TensorArg("block_table", "B max_blocks", INT32),
    AtLeast("max_seqlen_q", 0),
    AtLeast("num_shared_blocks", 0),
    AtLeast("block_size", 1),
    kernel="paged_attention",
)


class CascadeLevel(NamedTuple):
    """Keys, and the queries that share them: arguments of `paged_attention`, whose sequences are here groups of queries.

    cu_seqlens_q: (G + 1) int32, ascending from 0 to T: group g has the queries from cu_seqlens_q[g] up to
      cu_seqlens_q[g + 1].
    seqused_k: (G) int32, keys that group g shares, 0 for none. block_table: (G, max_blocks) int32, their pages.
    max_seqlen_q: at least the queries of the largest group.
    """

    cu_seqlens_q: Tensor
    seqused_k: Tensor
    block_table: Tensor
    max_seqlen_q: int


def shared_prefix_levels(
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    max_seqlen_q: int,
    *,
    num_shared_blocks: int,
    block_size: int,
) -> list[CascadeLevel]:
    """Levels of a batch for `paged_attention` whose sequences all begin with the same pages.

    cu_seqlens_q (B + 1), seqused_k (B), block_table (B, max_blocks), max_seqlen_q: as `paged_attention` has them, of whole
      sequences.
    num_shared_blocks: the first so many pages, the same in each row of block_table; every sequence has more keys than they
      hold, its own queries' at least. 0 gives one level, the batch as it is.
    block_size: tokens of a page.

    Returns the shared pages' level and that of what each sequence has behind them. Nothing waits for the GPU: a CUDA graph
    may capture it. Raises TypeError for what is not a tensor or an int or has another dtype, ValueError for anything else that
    does not fit. That the pages are the same, and keys enough, is checked where values are: on the CPU, and on the GPU only with
    FASTATTN_VALIDATE_INPUTS=1.
    """
    op = "shared_prefix_levels"
    _check_batch(cu_seqlens_q, seqused_k, block_table, max_seqlen_q, num_shared_blocks, block_size)
    if block_table.shape[0] == 0:
        fail_value(op, f"block_table has shape {tuple(block_table.shape)}, expected (B, max_blocks), B ≥ 1")
    if num_shared_blocks > block_table.shape[1]:
        allowed = f"0 ≤ num_shared_blocks ≤ {block_table.shape[1]}, the width of block_table"
        fail_value(op, f"num_shared_blocks is {num_shared_blocks}, expected {allowed}")
    own = CascadeLevel(cu_seqlens_q, seqused_k, block_table, max_seqlen_q)
    if num_shared_blocks == 0:
        return [own]
    shared, num_keys = block_table[:, :num_shared_blocks], num_shared_blocks * block_size
    if values_readable(block_table):
        if different := (shared != shared[:1]).any(1).nonzero().flatten().tolist():
            b = different[0]
            fail_value(op, f"block_table[{b}] begins with {shared[b].tolist()}, expected {shared[0].tolist()}, as [0]")
        num_queries = cu_seqlens_q.diff()
        if short := (seqused_k.long() - num_keys < num_queries.clamp(min=1)).nonzero().flatten().tolist():
            b = short[0]
            fail_value(
                op,
                f"seqused_k[{b}] is {int(seqused_k[b])}, expected more than the {num_keys} keys that are shared, those of its "
                f"{int(num_queries[b])} queries at least",
            )
    ends = torch.stack((cu_seqlens_q[0], cu_seqlens_q[-1]))
    most = max_seqlen_q * (cu_seqlens_q.shape[0] - 1)
    return [
        CascadeLevel(ends, torch.full_like(seqused_k[:1], num_keys), shared[:1], most),
        own._replace(seqused_k=seqused_k - num_keys, block_table=block_table[:, num_shared_blocks:]),
    ]


def cascade_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    levels: Sequence[CascadeLevel],
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    tree_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to keys in levels, of which all but the last are shared (https://arxiv.org/abs/2402.05099).

    A query sees all keys of its group in each level but the last, where causal and tree_mask count: there a group is a
    sequence, with the keys that are its own. A level's keys are read once for its group's queries and not once for each
    sequence, and multiplied by all of them at once. One `paged_attention` a level, and one `merge_attention_states` between two.

    levels: at least one, outermost first; `shared_prefix_levels` makes them of a batch with a common prefix. Of one level it
      is `paged_attention`.
    max_seqlen_q of a level is at most T here, whatever it says.
    The rest is as in `paged_attention`. There are no windows and no ALiBi: a query does not know how far shared keys are.
      The sinks count once.

    Returns out (T, H, D) in q's dtype and lse (H, T) fp32. The levels' outputs are rounded to q's dtype before they are
    merged: an error of up to half a unit in the last place more than of one call.
    Raises as `paged_attention` does, and says of which level.
    """
    if not isinstance(levels, (list, tuple)):
        fail_type(_OP, f"levels is a {type(levels).__name__}, expected a list of CascadeLevel")
    if not levels:
        fail_value(_OP, "levels is empty, expected at least one")
    state: tuple[Tensor, Tensor] | None = None
    for i, level in enumerate(levels):
        if not isinstance(level, CascadeLevel):
            fail_type(_OP, f"levels[{i}] is a {type(level).__name__}, expected a CascadeLevel")
        last = i == len(levels) - 1
        try:
            found = paged_attention(
                q, k_cache, v_cache, level.cu_seqlens_q, level.seqused_k, level.block_table,
                min(level.max_seqlen_q, q.shape[0]) if isinstance(q, Tensor) and q.dim() else level.max_seqlen_q,
                softmax_scale=softmax_scale, causal=causal and last, softcap=softcap, sinks=sinks if last else None,
                k_scale=k_scale, v_scale=v_scale, tree_mask=tree_mask if last else None,
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise type(error)(f"{_OP}: levels[{i}]: {error}") from None
        state = found if state is None else merge_attention_states(*state, *found)
    assert state is not None
    return state
