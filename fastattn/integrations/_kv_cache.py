"""`flash_attn_with_kvcache` of both versions: append to a cache, rotate, attend."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fastattn.integrations._common import check, cut, fail, fit, offsets, scores_of
from fastattn.integrations.rotary import apply_rotary_emb_torch
from fastattn.ops import rope_kv_write
from fastattn.ops.attention import paged_attention
from fastattn.ops.checks import values_readable


@dataclass(frozen=True)
class _Rows:
    """Tokens of a batch in one row: which sequence each belongs to, and its place there; both (T) int64."""

    sequence: Tensor
    place: Tensor


def _rows_of(num_tokens: int, cu_seqlens: Tensor) -> _Rows:
    token = torch.arange(num_tokens, device=cu_seqlens.device)
    sequence = torch.bucketize(token, cu_seqlens[1:-1], right=True)
    return _Rows(sequence, token - cu_seqlens[sequence])


@torch.no_grad()  # as in flash-attn: what comes out of a cache has no gradient
def cached_attention(
    op: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    rotary_interleaved: bool,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`flash_attn_with_kvcache` of both versions: (out like q, lse (B, H, Sq), or (H, T) with cu_seqlens_q).

    A cache without block_table is one with a page for each sequence.
    """
    check(op, q, k_cache, v_cache, "k_cache", "v_cache")
    if block_table is not None and (cache_batch_idx is not None or cache_leftpad is not None):
        name = "cache_batch_idx" if cache_batch_idx is not None else "cache_leftpad"
        fail(op, f"{name} and block_table are both given, expected one: Paged KVcache does not support {name}")
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    page = k_cache.shape[1]
    if block_table is not None:
        table, capacity = block_table, block_table.shape[1] * page
    elif cache_batch_idx is not None:
        table, capacity = cache_batch_idx.to(torch.int32).unsqueeze(1), page
    else:
        table, capacity = torch.arange(batch, dtype=torch.int32, device=q.device).unsqueeze(1), page
    if isinstance(cache_seqlens, Tensor):
        seqlens = cache_seqlens.to(torch.int32)
    else:
        filled = capacity if cache_seqlens is None else cache_seqlens
        seqlens = torch.full((batch,), filled, dtype=torch.int32, device=q.device)

    # With a window that no key falls out of, flash-attn takes the call as one without: all q at one position.
    scores = scores_of(q, softmax_scale, causal, window_size, softcap)
    left, right = (-1 if side >= capacity else side for side in scores["window_size"])
    scores["window_size"] = left, right
    moves = causal or left >= 0 or right >= 0
    packed_q = q.reshape(-1, *q.shape[-2:])
    if cu_seqlens_q is None:
        cu_seqlens_q = offsets(batch, q.shape[1], q.device)
        max_seqlen_q = q.shape[1]
    elif max_seqlen_q is None:
        raise ValueError(f"{op}: max_seqlen_q is None, expected the longest query run, as cu_seqlens_q is given")

    if k is not None:
        if v is None or cache_seqlens is None:
            name, needed = ("v", "value") if v is None else ("cache_seqlens", "cache_seqlens")
            fail(op, f"k is given and {name} is not: If key is supplied, {needed} must also be passed in")
        check(op, q, k, v)
        _check_append(op, seqlens, k, cu_seqlens_k_new, capacity, cache_batch_idx)
        cos, sin = _rotary_tables(op, q, rotary_cos, rotary_sin)
        moves = moves or max_seqlen_q == 1
        aligned = moves and q.dim() == 4 and q.shape[1] == k.shape[1]
        packed_q = _append(
            packed_q, k, v, k_cache, v_cache, table, page, seqlens, cos, sin, rotary_interleaved, cu_seqlens_q,
            cu_seqlens_k_new, moves, aligned, rotary_seqlens,
        )  # fmt: skip
        added = offsets(batch, k.shape[1], q.device) if cu_seqlens_k_new is None else cu_seqlens_k_new
        seqlens = seqlens + added.diff()
    elif rotary_cos is not None:
        fail(op, "rotary_cos is given and k is not: rotary needs the new key and value that are appended to the cache")

    if cache_leftpad is not None:
        k_cache, v_cache, table = _from_leftpad(k_cache, v_cache, table, cache_leftpad)
        seqlens = (seqlens - cache_leftpad).clamp(min=0).to(torch.int32)
    out, lse = paged_attention(
        fit(packed_q), fit(k_cache), fit(v_cache), cu_seqlens_q, seqlens, table, max_seqlen_q,
        **scores, alibi_slopes=alibi_slopes, sinks=sinks,
    )  # fmt: skip
    out = cut(out, q.shape[-1]).view(q.shape)
    if q.dim() == 4:
        lse = lse.view(q.shape[2], batch, q.shape[1]).transpose(0, 1)
    return out, lse


def _check_append(
    op: str, seqlens: Tensor, k: Tensor, cu_seqlens_k_new: Tensor | None, capacity: int, cache_batch_idx: Tensor | None
) -> None:
    """That the new keys fit, and that no two sequences write theirs to one place."""
    if not values_readable(seqlens):
        return
    new = [k.shape[1]] * seqlens.shape[0] if cu_seqlens_k_new is None else cu_seqlens_k_new.diff().tolist()
    for b, (old, more) in enumerate(zip(seqlens.tolist(), new, strict=True)):
        if old < 0 or old + more > capacity:
            raise ValueError(
                f"{op}: cache_seqlens[{b}] is {old}, expected 0 ≤ cache_seqlens ≤ {capacity - more}: the cache has room "
                f"for {capacity} keys of a sequence, and k brings {more}"
            )
    if cache_batch_idx is None:
        return
    runs = sorted(
        (row, old, old + more, b)
        for b, (row, old, more) in enumerate(zip(cache_batch_idx.tolist(), seqlens.tolist(), new, strict=True))
        if more > 0
    )
    for (row, first, end, b), (other_row, other_first, other_end, other) in pairwise(runs):
        if row == other_row and other_first < end:
            raise ValueError(
                f"{op}: cache_batch_idx[{b}] and [{other}] are both {row}, and k is written to its places {first} to {end - 1} "
                f"for the one and {other_first} to {other_end - 1} for the other, expected each place to be written once"
            )


def _rotary_tables(op: str, q: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if cos is None:
        return None, None
    if sin is None:
        fail(
            op, "rotary_cos is given and rotary_sin is not: If rotary cos is provided, rotary sin must also be provided"
        )
    if 2 * cos.shape[-1] > q.shape[-1] or cos.dim() != 2 or sin.shape != cos.shape:
        fail(
            op,
            f"rotary_cos has shape {tuple(cos.shape)} and rotary_sin {tuple(sin.shape)}, expected (max_position, "
            f"rotary_dim / 2) both: rotary_dim must be <= headdim, {q.shape[-1]}",
        )
    return cos, sin


def _append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    page: int,
    seqlens: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_k_new: Tensor | None,
    moves: bool,
    aligned: bool,
    rotary_seqlens: Tensor | None,
) -> Tensor:
    """Write k and v behind what the cache holds, rotated where cos and sin are given. Returns q (T, H, D), rotated.

    moves: q's tokens stand at positions of their own, and not all at the first free one. aligned: at those of k's.
    """
    if cu_seqlens_k_new is None:
        cu_seqlens_k_new = offsets(seqlens.shape[0], k.shape[1], k.device)
    k, v = k.reshape(-1, *k.shape[-2:]), v.reshape(-1, *v.shape[-2:])
    rows = _rows_of(k.shape[0], cu_seqlens_k_new)
    position = seqlens[rows.sequence] + rows.place
    block, place = table[rows.sequence, position // page].long(), position % page
    if cos is None or sin is None:
        k_cache[block, place] = k
        v_cache[block, place] = v
        return q

    first = seqlens if rotary_seqlens is None else rotary_seqlens
    rows_q = _rows_of(q.shape[0], cu_seqlens_q)
    position_k, position_q = first[rows.sequence] + rows.place, first[rows_q.sequence] + rows_q.place * moves
    if aligned and cos.shape[-1] > 0 and _one_kernel(q, k, v, k_cache, v_cache):
        q = q.clone(memory_format=torch.contiguous_format)
        angles = torch.cat((cos[position_k], sin[position_k]), -1).float()
        rope_kv_write(
            q, k, v, angles, torch.arange(q.shape[0], dtype=torch.int32, device=q.device),
            (block * page + place).to(torch.int32), k_cache, v_cache, interleaved=interleaved,
        )  # fmt: skip
        return q
    k_cache[block, place] = _rotate(k, cos[position_k], sin[position_k], interleaved)
    v_cache[block, place] = v
    return _rotate(q, cos[position_q], sin[position_q], interleaved)


def _one_kernel(*tensors: Tensor) -> bool:
    """Whether `rope_kv_write` takes them; on the CPU, where nothing is won, plain torch says more when it fails."""
    return all(t.is_cuda and t.shape[-1] % 8 == 0 and t.stride(-1) == 1 for t in tensors)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (T, H, D) turned by cos, sin (T, rotary_dim / 2), in fp32, rounded to x's dtype."""
    turned = apply_rotary_emb_torch(x.float(), cos.float(), sin.float(), interleaved)
    return turned.to(x.dtype)


def _from_leftpad(k_cache: Tensor, v_cache: Tensor, table: Tensor, leftpad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Caches (Bc, Sc, Hk, D) of which sequence b's keys begin at leftpad[b], as pages of one token each."""
    caches, num_places = [], k_cache.shape[1]
    for cache in (k_cache, v_cache):
        if cache.stride(1) == 0 or cache.stride(0) % cache.stride(1) or cache.stride() != k_cache.stride():
            caches = [c.contiguous().flatten(0, 1).unsqueeze(1) for c in (k_cache, v_cache)]
            step = num_places
            break
        step = cache.stride(0) // cache.stride(1)
        num_tokens = (cache.shape[0] - 1) * step + num_places
        shape = (num_tokens, 1, *cache.shape[2:])
        caches.append(cache.as_strided(shape, (cache.stride(1), cache.stride(1), *cache.stride()[2:])))
    place = torch.arange(num_places, dtype=torch.int32, device=table.device) + leftpad.to(torch.int32).unsqueeze(1)
    # What runs over the end of a sequence is never read; it only has to name a page that exists.
    return caches[0], caches[1], table * step + place.clamp(max=num_places - 1)
