"""Softmax attention over packed sequences, with the keys in pages or in a row, and the log-sum-exp of each row."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastattn.reference.attention_scores import Scoring, Tree, grouped, slopes_of, spans, ungrouped, wide
from fastattn.reference.kv_8bit import pages_of
from fastattn.reference.quantize import E4M3_MAX

# Keys that take about as long to copy as one more group of sequences takes to start.
_WORTH_A_GROUP = 512


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scoring: Scoring,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    tree: Tree | None = None,
) -> None:
    """One sequence: q (Sq, H, D), k (Sk, Hk, D), v (Sk, Hk, Dv), slopes and sinks (H) → out (Sq, H, Dv), lse (H, Sq)."""
    (num_rows, num_heads, _), (num_keys, num_kv_heads, _) = q.shape, k.shape
    k, v = wide(k.permute(1, 2, 0)), wide(v.transpose(0, 1))  # (Hk, D, Sk), (Hk, Sk, Dv)
    sink = None if sinks is None else wide(sinks).view(num_heads, 1)
    for rows, keys in scoring.chunks(num_rows, num_keys):
        own, seen = slice(rows.start, rows.stop), slice(keys.start, keys.stop)
        if not keys:  # no row of the chunk sees one
            out[own] = 0
            lse[:, own] = -torch.inf if sink is None else sink
            continue
        scores = scoring.cap((grouped(q[own], num_kv_heads) * scoring.scale) @ k[:, :, seen])
        masked = scoring.place(scores, rows, keys, num_keys - num_rows, slopes, tree)
        peak = scores.amax(-1, keepdim=True)  # (Hk, group * rows, 1)
        if sink is not None:
            sink_rows = sink.expand(num_heads, len(rows)).reshape(peak.shape)
            peak = peak.maximum(sink_rows)
        if masked:
            peak.masked_fill_(peak == -torch.inf, 0.0)  # a row without keys: exp(-inf - 0) = 0, not NaN
        weights = scores.sub_(peak).exp_()
        total = weights.sum(-1, keepdim=True)
        if sink is not None:
            total += (sink_rows - peak).exp_()
        lse[:, own] = (peak + total.log()).view(num_heads, len(rows))
        result = weights @ v[:, seen]  # (Hk, group * rows, Dv)
        result /= total.clamp_(min=1.0)  # at least 1, the weight of the peak, except for a row without keys: 0 / 1
        out[own] = ungrouped(result, len(rows))


@dataclass(frozen=True)
class _Group:
    """Sequences with one query each whose keys are gathered together, padded to the longest.

    rows (B): their queries. slots (B * keys): cache slots; padding repeats a sequence's first key, which is finite as what
    lies behind the last need not be. mask (B, 1, 1, keys): 0, and -inf where padding is.
    """

    rows: Tensor
    slots: Tensor
    mask: Tensor


@lru_cache(maxsize=8)
def _groups(
    starts: tuple[int, ...], lengths: tuple[int, ...], pages: bytes, block_size: int, left: int
) -> list[_Group]:
    """The groups of at least two. All layers of a step ask with the same values, which is why they are kept.

    starts: cu_seqlens_q. pages: the block table's columns up to the longest sequence, as bytes.
    """
    table = torch.frombuffer(bytearray(pages), dtype=torch.int32).view(len(lengths), -1).long()
    single = [b for b, n in enumerate(lengths) if n > 0 and starts[b + 1] - starts[b] == 1]
    seen = {b: min(lengths[b], 1 + left) if left >= 0 else lengths[b] for b in single}
    groups = []
    for members in _alike(sorted(single, key=seen.__getitem__, reverse=True), seen):
        last = torch.tensor([lengths[b] for b in members]).unsqueeze(1)
        first = last - torch.tensor([seen[b] for b in members]).unsqueeze(1)
        position = first + torch.arange(seen[members[0]])
        padding = position >= last
        position = torch.where(padding, first, position)
        slots = table[members].gather(1, position // block_size) * block_size + position % block_size
        mask = torch.zeros(padding.shape, dtype=torch.float32).masked_fill_(padding, -torch.inf)
        groups.append(_Group(torch.tensor([starts[b] for b in members]), slots.flatten(), mask[:, None, None]))
    return groups


def _alike(members: list[int], seen: dict[int, int]) -> Iterator[list[int]]:
    """Cuts sequences, longest first, where padding to the longest would cost more than another group."""
    group: list[int] = []
    for b in members:
        if group and 2 * seen[b] < seen[group[0]] and seen[b] + _WORTH_A_GROUP < seen[group[0]]:
            yield group
            group = []
        group.append(b)
    if group:
        yield group


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.memory: dict[tuple[str, torch.dtype], Tensor] = {}


_SCRATCH = _Scratch()


def _gather(which: str, cache: Tensor, slots: Tensor) -> Tensor:
    """cache (num_blocks, block_size, Hk, D) → its slots (n, Hk, D), in memory that this thread's next call overwrites.

    New memory of this size comes from the system page by page, and that takes several times as long as the copy.
    """
    if cache.stride(0) != cache.shape[1] * cache.stride(1):  # the blocks are not one row of slots
        return cache[slots // cache.shape[1], slots % cache.shape[1]]
    kept = _SCRATCH.memory
    shape = (slots.numel(), *cache.shape[2:])
    memory = kept.get((which, cache.dtype))
    if memory is None or memory.numel() < math.prod(shape):
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside it
            memory = kept[which, cache.dtype] = torch.empty(math.prod(shape), dtype=cache.dtype)
    return torch.index_select(cache.flatten(0, 1), 0, slots, out=memory[: math.prod(shape)].view(shape))


def _attend_group(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, group: _Group, out: Tensor, lse: Tensor, scale: float
) -> None:
    """One query for each sequence of the group; q and out (T, H, D), lse (H, T) are the whole step's.

    To torch's flash attention the query heads of one KV head are the rows of one head: they see the same keys.
    """
    batch, keys, (num_kv_heads, head_dim) = group.rows.numel(), group.mask.shape[-1], k_cache.shape[2:]
    k, v = (
        _gather(which, cache, group.slots).view(batch, keys, num_kv_heads, head_dim).transpose(1, 2).float()
        for which, cache in (("k", k_cache), ("v", v_cache))
    )
    rows = q[group.rows].view(batch, num_kv_heads, -1, head_dim).float()
    mask = group.mask.expand(batch, 1, rows.shape[2], keys)
    result, logsum = _flash(rows, k, v, 0.0, False, attn_mask=mask, scale=scale)
    out[group.rows] = result.to(out.dtype).reshape(batch, *q.shape[1:])
    lse[:, group.rows] = logsum.reshape(batch, -1).t()


def empty_results(q: Tensor, v_head_dim: int) -> tuple[Tensor, Tensor]:
    """Memory for out (…, H, Dv) and lse (…, H, rows)."""
    *batch, rows, heads, _ = q.shape
    dtype = torch.bfloat16 if q.dtype is torch.float8_e4m3fn else q.dtype
    out = q.new_empty((*batch, rows, heads, v_head_dim), dtype=dtype)
    lse_dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    return out, q.new_empty((*batch, heads, rows), dtype=lse_dtype)


def _descaled(t: Tensor, descale: Tensor | None, b: int) -> Tensor:
    """Sequence b of an fp8 argument as its numbers: t (S, heads, D), descale (B, Hk); query heads share a group's."""
    return t if descale is None else t.float() * descale[b].repeat_interleave(t.shape[1] // descale.shape[1])[:, None]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    tree_mask: Tensor | None,
    out_scale: Tensor | None,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor]:
    """Sequence b has queries q[cu_seqlens_q[b] : cu_seqlens_q[b + 1]] and seqused_k[b] keys in pages block_table[b].

    batch_invariant: one query after the other, over the keys that it sees and no others, but for trees and where it sees keys
    behind it.
    """
    out, lse = empty_results(q, q.shape[-1])
    if out_scale is not None:
        out = out.new_empty(out.shape, dtype=torch.float32)
    scoring = Scoring.make(softmax_scale, causal, window_left, window_right, softcap)
    block_size = k_cache.shape[1]
    starts, lengths = tuple(cu_seqlens_q.tolist()), tuple(seqused_k.tolist())
    done: set[int] = set()
    plain = softcap == 0 and alibi_slopes is None and sinks is None and k_cache.dtype is q.dtype
    if plain and not batch_invariant and len(lengths) > 1 and max(lengths) > 0:
        used = block_table[:, : -(-max(lengths) // block_size)]
        for group in _groups(starts, lengths, used.numpy().tobytes(), block_size, window_left):
            if group.rows.numel() > 1:
                _attend_group(q, k_cache, v_cache, group, out, lse, softmax_scale)
                done.update(group.rows.tolist())
    for b, num_keys in enumerate(lengths):
        if starts[b] in done and starts[b + 1] > starts[b]:
            continue
        own = slice(starts[b], starts[b + 1])
        pages = block_table[b, : -(-num_keys // block_size)]
        k = pages_of(k_cache, k_scale, pages, num_keys)
        v = pages_of(v_cache, v_scale, pages, num_keys)
        tree = None if tree_mask is None else Tree.make(tree_mask[own])
        slopes = slopes_of(alibi_slopes, b)
        if batch_invariant and tree is None and scoring.right == 0:
            for row in range(starts[b], starts[b + 1]):
                one, seen = slice(row, row + 1), max(0, num_keys - (starts[b + 1] - 1 - row))
                _attend(q[one].clone(), k[:seen], v[:seen], out[one], lse[:, one], scoring, slopes, sinks)
            continue
        _attend(q[own], k, v, out[own], lse[:, own], scoring, slopes, sinks, tree)
    return out if out_scale is None else _to_e4m3(out / out_scale), lse


def _to_e4m3(x: Tensor) -> Tensor:
    """The nearest e4m3, ties to even, and ±448 beyond it: torch alone makes NaN of that."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def paged_attention_out(out: Tensor, *call: Any) -> Tensor:
    """`paged_attention` into out. Returns lse."""
    result, lse = paged_attention(*call)
    out.copy_(result)
    return lse


def batch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    deterministic: bool,
    kernel: int,
) -> tuple[Tensor, Tensor]:
    """q (B, Sq, H, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv) → out (B, Sq, H, Dv), lse (B, H, Sq).

    deterministic is the backward's matter, kernel a GPU's.
    """
    out, lse = empty_results(q, v.shape[-1])
    scoring = Scoring.make(softmax_scale, causal, window_left, window_right, softcap)
    for b in range(q.shape[0]):
        rows, keys, values = (_descaled(t[b], s, b) for t, s in ((q, q_descale), (k, k_descale), (v, v_descale)))
        _attend(rows, keys, values, out[b], lse[b], scoring, slopes_of(alibi_slopes, b), sinks)
    return out, lse


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    deterministic: bool,
    kernel: int,
) -> tuple[Tensor, Tensor]:
    """Sequence b has queries from cu_seqlens_q[b] to cu_seqlens_q[b + 1], and keys likewise, of which the first are used."""
    out, lse = empty_results(q, v.shape[-1])
    if seqused_q is not None:
        out.zero_()
        lse.fill_(-torch.inf)
    scoring = Scoring.make(softmax_scale, causal, window_left, window_right, softcap)
    for b, (own, keys) in enumerate(zip(spans(cu_seqlens_q, seqused_q), spans(cu_seqlens_k, seqused_k), strict=True)):
        rows = _descaled(q[own], q_descale, b)
        kept = (_descaled(k[keys], k_descale, b), _descaled(v[keys], v_descale, b))
        _attend(rows, *kept, out[own], lse[:, own], scoring, slopes_of(alibi_slopes, b), sinks)
    return out, lse
