"""Operators on large inputs, on any device, in a chosen dtype: what tests/harness/formulas says in loops, in whole tensors.

Each takes the dtype to compute in and a call's arguments, and gives the results, then the arguments that are changed.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tests.harness.formulas import (
    add_rms_norm,
    fp4_fp8_linear,
    fp4_linear,
    fp8_block_linear,
    fp8_linear,
    gated_linear,
    int4_linear,
    int8_linear,
    layer_norm,
    layer_norm_linear,
    linear,
    rms_norm,
    rms_norm_gated_linear,
    rms_norm_linear,
    sparse_fp8_linear,
    sparse_int8_linear,
    sparse_linear,
    swiglu,
)

__all__ = [
    "add_rms_norm",
    "adjust_logits",
    "apply_token_bitmask",
    "batch_attention",
    "batch_attention_backward",
    "copy_blocks",
    "embedding",
    "fp4_fp8_linear",
    "fp4_linear",
    "fp8_block_linear",
    "fp8_linear",
    "gated_linear",
    "int4_linear",
    "int8_linear",
    "layer_norm",
    "layer_norm_linear",
    "linear",
    "merge_attention_states",
    "paged_attention",
    "rms_norm",
    "rms_norm_gated_linear",
    "rms_norm_linear",
    "rope_kv_write",
    "sparse_fp8_linear",
    "sparse_int8_linear",
    "sparse_linear",
    "swiglu",
    "token_logprobs",
    "varlen_attention",
    "varlen_attention_backward",
]

# Scores are computed in pieces of at most so many elements, so that 16k × 16k × 16 heads fits.
_SCORES = 1 << 28


def embedding(
    c: torch.dtype, token_ids: Tensor, weight: Tensor, scale: float = 1.0, drawn: Tensor | None = None
) -> list[Tensor]:
    ids = token_ids.long()
    if drawn is not None:
        ids = torch.where(ids < 0, drawn.long()[(-1 - ids).clamp(min=0)], ids)
    known = (ids >= 0) & (ids < weight.shape[0])
    return [weight[ids * known].to(c) * known[:, None] * scale]


def copy_blocks(c: torch.dtype, k_cache: Tensor, v_cache: Tensor, block_mapping: Tensor) -> list[Tensor]:
    """k_cache, v_cache (layers, num_blocks, …)."""
    source, target = block_mapping.long().unbind(1)
    return [t.to(c, copy=True).index_copy_(1, target, t[:, source].to(c)) for t in (k_cache, v_cache)]


def rope_kv_write(
    c: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> list[Tensor]:
    cos, sin = (t.unsqueeze(1) for t in cos_sin[positions.long()].to(c).chunk(2, -1))

    def turned(x: Tensor) -> Tensor:
        a, b = x.to(c).chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    written = slot_mapping >= 0
    slots = slot_mapping[written].long()
    k_out, v_out = k_cache.to(c, copy=True), v_cache.to(c, copy=True)
    k_out.view(-1, *k.shape[1:])[slots] = turned(k)[written]
    v_out.view(-1, *v.shape[1:])[slots] = v[written].to(c)
    return [turned(q), k_out, v_out]


def _attend(
    c: torch.dtype, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, tree: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One sequence: q (Sq, H, D), k and v (Sk, Hk, D), tree (Sq) → out (Sq, H, D), lse (H, Sq)."""
    num_rows, num_keys, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    out = q.new_empty(q.shape, dtype=c)
    lse = q.new_empty((q.shape[1], num_rows), dtype=c)
    step = max(1, min(num_rows, _SCORES // max(1, num_keys)))
    for head in range(q.shape[1]):
        keys, values = k[:, head // group].to(c), v[:, head // group].to(c)
        for start in range(0, num_rows, step):
            rows = slice(start, min(num_rows, start + step))
            scores = (q[rows, head].to(c) @ keys.t()) * scale
            if causal:
                last = torch.arange(rows.start, rows.stop, device=q.device) + num_keys - num_rows
                scores.masked_fill_(torch.arange(num_keys, device=q.device) > last.unsqueeze(1), -torch.inf)
            if tree is not None and num_rows <= 64:
                seen = tree[rows].unsqueeze(1) >> torch.arange(num_rows, device=q.device) & 1
                scores[:, num_keys - num_rows :].masked_fill_(seen == 0, -torch.inf)
            out[rows, head] = torch.softmax(scores, -1) @ values
            lse[head, rows] = torch.logsumexp(scores, -1)
    return out, lse


def _attend_all(
    c: torch.dtype,
    q: Tensor,
    starts: list[int],
    keys: list[Tensor],
    values: list[Tensor],
    causal: bool,
    tree_mask: Tensor | None = None,
) -> list[Tensor]:
    runs = [slice(a, b) for a, b in pairwise(starts)]
    trees = [None if tree_mask is None else tree_mask[own] for own in runs]
    scale = q.shape[-1] ** -0.5
    parts = [
        _attend(c, q[own], k, v, causal, scale, tree) for own, k, v, tree in zip(runs, keys, values, trees, strict=True)
    ]
    return [torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)]


def batch_attention(c: torch.dtype, q: Tensor, k: Tensor, v: Tensor, causal: bool = False, **_: Any) -> list[Tensor]:
    runs = [b * q.shape[1] for b in range(q.shape[0] + 1)]
    out, lse = _attend_all(c, q.flatten(0, 1), runs, list(k), list(v), causal)
    return [out.view(q.shape), lse.unflatten(1, q.shape[:2]).transpose(0, 1)]


def varlen_attention(
    c: torch.dtype, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool, **_: Any
) -> list[Tensor]:
    at = cu_seqlens_k.tolist()
    keys, values = ([t[a:b] for a, b in pairwise(at)] for t in (k, v))
    return _attend_all(c, q, cu_seqlens_q.tolist(), keys, values, causal)


def _attend_backward(
    c: torch.dtype, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence: dout (Sq, H, Dv), q (Sq, H, D), k (Sk, Hk, D), v (Sk, Hk, Dv) → dq, dk, dv."""
    num_rows, num_keys, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    dq, dk, dv = (torch.zeros(t.shape, dtype=c, device=t.device) for t in (q, k, v))
    step = max(1, min(num_rows, _SCORES // max(1, num_keys)))
    for head in range(q.shape[1]):
        own = head // group
        keys, values = k[:, own].to(c), v[:, own].to(c)
        for start in range(0, num_rows, step):
            rows = slice(start, min(num_rows, start + step))
            q_rows, dout_rows = q[rows, head].to(c), dout[rows, head].to(c)
            scores = (q_rows @ keys.t()) * scale
            if causal:
                last = torch.arange(rows.start, rows.stop, device=q.device) + num_keys - num_rows
                scores.masked_fill_(torch.arange(num_keys, device=q.device) > last.unsqueeze(1), -torch.inf)
            weights = torch.softmax(scores, -1)
            dv[:, own] += weights.t() @ dout_rows
            dweights = dout_rows @ values.t()
            dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * scale
            dq[rows, head] = dscores @ keys
            dk[:, own] += dscores.t() @ q_rows
    return dq, dk, dv


def batch_attention_backward(
    c: torch.dtype, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool = False, **_: Any
) -> list[Tensor]:
    scale = q.shape[-1] ** -0.5
    parts = [_attend_backward(c, *each, causal, scale) for each in zip(dout, q, k, v, strict=True)]
    return [torch.stack(gradients) for gradients in zip(*parts, strict=True)]


def varlen_attention_backward(
    c: torch.dtype,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool = False,
    **_: Any,
) -> list[Tensor]:
    scale = q.shape[-1] ** -0.5
    dq, dk, dv = (torch.zeros(t.shape, dtype=c, device=t.device) for t in (q, k, v))
    runs, key_runs = ([slice(a, b) for a, b in pairwise(at.tolist())] for at in (cu_seqlens_q, cu_seqlens_k))
    for own, keys in zip(runs, key_runs, strict=True):
        dq[own], dk[keys], dv[keys] = _attend_backward(c, dout[own], q[own], k[keys], v[keys], causal, scale)
    return [dq, dk, dv]


def merge_attention_states(c: torch.dtype, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> list[Tensor]:
    """No empty rows."""
    lse = torch.logaddexp(lse_a.to(c), lse_b.to(c))
    weights = ((side.to(c) - lse).exp().transpose(-1, -2).unsqueeze(-1) for side in (lse_a, lse_b))
    return [next(weights) * out_a.to(c) + next(weights) * out_b.to(c), lse]


def paged_attention(
    c: torch.dtype,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    causal: bool,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    tree_mask: Tensor | None = None,
    **_: Any,
) -> list[Tensor]:
    size = k_cache.shape[1]

    def gather(cache: Tensor, scale: Tensor | None) -> list[Tensor]:
        lengths = enumerate(seqused_k.tolist())
        blocks = [(block_table[b, : -(-n // size)].long(), n) for b, n in lengths]
        if scale is None:
            return [cache[own].flatten(0, 1)[:n] for own, n in blocks]
        of_tokens = scale.expand(cache.shape[:3])
        bits = cache.view(torch.uint8)  # torch indexes no fp8
        rows = [
            (bits[own].view(cache.dtype).to(c) * of_tokens[own].to(c).unsqueeze(-1)).flatten(0, 1) for own, _ in blocks
        ]
        return [t[:n] for t, (_, n) in zip(rows, blocks, strict=True)]

    if bool((cu_seqlens_q.diff() == 1).all()) and bool((seqused_k == seqused_k[0]).all()):
        return _decode(c, q, torch.stack(gather(k_cache, k_scale)), torch.stack(gather(v_cache, v_scale)))
    caches = gather(k_cache, k_scale), gather(v_cache, v_scale)
    return _attend_all(c, q, cu_seqlens_q.tolist(), *caches, causal, tree_mask)


def _decode(c: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """One query a sequence and equal lengths, all at once: q (B, H, D), k and v (B, S, Hk, D)."""
    grouped = q.to(c).view(q.shape[0], k.shape[2], -1, q.shape[2])  # (B, Hk, group, D)
    scores = grouped @ k.to(c).permute(0, 2, 3, 1) * q.shape[-1] ** -0.5
    out = torch.softmax(scores, -1) @ v.to(c).transpose(1, 2)
    return [out.flatten(1, 2), torch.logsumexp(scores, -1).flatten(1, 2).t()]


def apply_token_bitmask(c: torch.dtype, logits: Tensor, bitmask: Tensor, rows: Tensor) -> list[Tensor]:
    token = torch.arange(logits.shape[1], device=logits.device)
    allowed = (bitmask[:, token // 32] >> (token % 32)) & 1
    out = logits.to(c).clone()
    for row, bits in zip(rows.tolist(), allowed, strict=True):
        out[row].masked_fill_(bits == 0, -torch.inf)
    return [out]


def adjust_logits(
    c: torch.dtype,
    logits: Tensor,
    token_ids: Tensor,
    counts: Tensor,
    bias: Tensor,
    indptr: Tensor,
    repetition_penalty: Tensor,
    presence_penalty: Tensor,
    frequency_penalty: Tensor,
) -> list[Tensor]:
    out = logits.to(c, copy=True)
    row = torch.repeat_interleave(torch.arange(logits.shape[0], device=logits.device), indptr.diff().long())
    rep, presence, frequency = (t.to(c)[row] for t in (repetition_penalty, presence_penalty, frequency_penalty))
    old, count = out[row, token_ids.long()], counts.to(c)
    penalized = torch.where(old > 0, old / rep, old * rep) - presence * (count > 0) - frequency * count
    out[row, token_ids.long()] = torch.where(count >= 0, penalized, old) + bias.to(c)
    return [out]


def token_logprobs(c: torch.dtype, logits: Tensor, token_ids: Tensor, num_top: int) -> list[Tensor]:
    logprobs = torch.log_softmax(logits.to(c), -1)
    chosen = token_ids.long().unsqueeze(1)
    rank = 1 + (logits > logits.gather(1, chosen)).sum(1, dtype=torch.int32)
    ids = torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :num_top]
    return [logprobs.gather(1, chosen).squeeze(1), rank, logprobs.gather(1, ids), ids.int()]
