"""Softmax attention over packed sequences, with the keys in pages or in a row, and the log-sum-exp of each row."""

from __future__ import annotations

import torch
from torch import Tensor

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
    starts = cu_seqlens_q.tolist()
    for b, num_keys in enumerate(seqused_k.tolist()):
        own = slice(starts[b], starts[b + 1])
        pages = block_table[b, : -(-num_keys // block_size)]
        k = k_cache.index_select(0, pages).flatten(0, 1)[:num_keys]
        v = v_cache.index_select(0, pages).flatten(0, 1)[:num_keys]
        _attend(q[own], k, v, out[own], lse[:, own], softmax_scale, window_left, right, softcap)
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
) -> tuple[Tensor, Tensor]:
    """Sequence b has queries from cu_seqlens_q[b] to cu_seqlens_q[b + 1], and keys likewise."""
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
