"""Softmax attention over packed sequences, with the keys in pages or in a row, and the log-sum-exp of each row."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# Keys that take about as long to copy as one more group of sequences takes to start.
_WORTH_A_GROUP = 512
# Queries are taken this many at a time: the scores stay small, and a causal chunk skips the keys that none of its
# rows see.
_CHUNK = 256


def _visible(first_row: int, num_rows: int, keys: range, shift: int, left: int, right: int) -> Tensor:
    """(num_rows, len(keys)) mask: row i sees keys i + shift - left … i + shift + right, where -1 is open."""
    row = torch.arange(first_row + shift, first_row + shift + num_rows).unsqueeze(1)
    key = torch.arange(keys.start, keys.stop)
    mask = torch.ones(num_rows, len(keys), dtype=torch.bool)
    if left >= 0:
        mask &= key >= row - left
    if right >= 0:
        mask &= key <= row + right
    return mask


def _attend(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, left: int, right: int, softcap: float
) -> None:
    """One sequence: q (Sq, H, D), k and v (Sk, Hk, D) → out (Sq, H, D), lse (H, Sq)."""
    (num_rows, num_heads, head_dim), (num_keys, num_kv_heads, _) = q.shape, k.shape
    shift = num_keys - num_rows  # bottom-right: the last row stands at the last key
    k, v = (k.permute(1, 2, 0).float(), v.transpose(0, 1).float())  # (Hk, D, Sk), (Hk, Sk, D)
    for start in range(0, num_rows, _CHUNK):
        rows = min(_CHUNK, num_rows - start)
        first = max(0, start + shift - left) if left >= 0 else 0
        last = min(num_keys, start + rows + shift + right) if right >= 0 else num_keys
        if last <= first:  # no row of the chunk sees a key
            out[start : start + rows] = 0
            lse[:, start : start + rows] = -torch.inf
            continue
        grouped = q[start : start + rows].float().view(rows, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        scores = (grouped.reshape(num_kv_heads, -1, head_dim) * scale) @ k[:, :, first:last]  # (Hk, group * rows, keys)
        if softcap > 0:
            scores = torch.tanh(scores / softcap) * softcap
        masked = rows > 1 and (left >= 0 or right >= 0)  # else every row sees every key of the range
        if masked:
            mask = _visible(start, rows, range(first, last), shift, left, right)
            scores.view(num_kv_heads, -1, rows, last - first).masked_fill_(~mask, -torch.inf)
        peak = scores.amax(-1, keepdim=True)
        if masked:
            peak.masked_fill_(peak == -torch.inf, 0.0)  # a row without keys: exp(-inf - 0) = 0, not NaN
        weights = scores.sub_(peak).exp_()
        total = weights.sum(-1, keepdim=True)
        lse[:, start : start + rows] = (peak + total.log()).view(num_heads, rows)
        result = weights @ v[:, first:last]  # (Hk, group * rows, D)
        result /= total.clamp_(min=1.0)  # at least 1, the weight of the peak, except for a row without keys: 0 / 1
        out[start : start + rows] = result.view(num_heads, rows, head_dim).transpose(0, 1)


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
        mask = torch.zeros(padding.shape).masked_fill_(padding, -torch.inf)
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
    grouped = q[group.rows].view(batch, num_kv_heads, -1, head_dim).float()
    mask = group.mask.expand(batch, 1, grouped.shape[2], keys)
    result, logsum = _flash(grouped, k, v, 0.0, False, attn_mask=mask, scale=scale)
    out[group.rows] = result.to(out.dtype).reshape(batch, *q.shape[1:])
    lse[:, group.rows] = logsum.reshape(batch, -1).t()


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Sequence b has queries q[cu_seqlens_q[b] : cu_seqlens_q[b + 1]] and seqused_k[b] keys in pages block_table[b]."""
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    right = _right(causal, window_right)
    block_size = k_cache.shape[1]
    starts, lengths = tuple(cu_seqlens_q.tolist()), tuple(seqused_k.tolist())
    done: set[int] = set()
    if len(lengths) > 1 and max(lengths) > 0 and softcap == 0:
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
        k = k_cache.index_select(0, pages).flatten(0, 1)[:num_keys]
        v = v_cache.index_select(0, pages).flatten(0, 1)[:num_keys]
        _attend(q[own], k, v, out[own], lse[:, own], softmax_scale, window_left, right, softcap)
    return out, lse


def batch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    kernel: int = 0,
) -> tuple[Tensor, Tensor]:
    """q (B, Sq, H, D), k and v (B, Sk, Hk, D) → out like q, lse (B, H, Sq). kernel: a GPU's matter."""
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    right = _right(causal, window_right)
    for b in range(q.shape[0]):
        _attend(q[b], k[b], v[b], out[b], lse[b], softmax_scale, window_left, right, softcap)
    return out, lse


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    kernel: int = 0,
) -> tuple[Tensor, Tensor]:
    """Sequence b has queries from cu_seqlens_q[b] to cu_seqlens_q[b + 1], and keys likewise. kernel: a GPU's matter."""
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    right = _right(causal, window_right)
    starts, key_starts = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(starts) - 1):
        own, keys = (slice(starts[b], starts[b + 1]), slice(key_starts[b], key_starts[b + 1]))
        _attend(q[own], k[keys], v[keys], out[own], lse[:, own], softmax_scale, window_left, right, softcap)
    return out, lse


def _right(causal: bool, window_right: int) -> int:
    """A causal row sees nothing to its right, whatever the window says."""
    return 0 if causal else window_right
