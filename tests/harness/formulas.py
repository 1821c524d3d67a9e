"""The operators once more, as plainly as possible and apart from fastattn.reference: no masks, no batching, loops over rows.

Each takes a call's arguments and a dtype to compute in: fp64 gives the exact result, the result's own dtype gives the "plain
torch version" of the 2× rule. Everything is on the CPU. What is returned: the results, then the arguments that are changed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(c: torch.dtype, x: Tensor, weight: Tensor, eps: float = 1e-6) -> list[Tensor]:
    x = x.to(c)
    mean = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    return [x / (mean + eps).sqrt() * weight.to(c)]


def add_rms_norm(c: torch.dtype, x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> list[Tensor]:
    total = (x.double() + residual.double()).to(x.dtype)
    return [*rms_norm(c, total, weight, eps), total]


def layer_norm(
    c: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> list[Tensor]:
    x = x.to(c)
    centred = x - x.mean(-1, keepdim=True)
    out = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.to(c)
    return [out if bias is None else out + bias.to(c)]


def swiglu(c: torch.dtype, x: Tensor) -> list[Tensor]:
    half = x.shape[-1] // 2
    gate, up = x[..., :half].to(c), x[..., half:].to(c)
    return [gate / (1 + (-gate).exp()) * up]


def geglu(c: torch.dtype, x: Tensor, approximate: str = "tanh") -> list[Tensor]:
    half = x.shape[-1] // 2
    gate, up = x[..., :half].to(c), x[..., half:].to(c)
    if approximate == "tanh":
        act = gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) / 2
    else:
        act = gate * (1 + torch.erf(gate / math.sqrt(2))) / 2
    return [act * up]


def linear(c: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    return [F.linear(x.to(c), weight.to(c), None if bias is None else bias.to(c))]


def int8_linear(
    c: torch.dtype,
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    out = (x.long() @ weight.long().t()).double() * x_scale.double()[:, None] * weight_scale.double()
    return [out.to(c) if bias is None else out.to(c) + bias.to(c)]


def _nibbles(packed: Tensor, columns: Tensor) -> Tensor:
    """Codes 0 … 15 of these columns of each row, whatever the element's width."""
    per_element = 2 * packed.element_size()
    return (packed.long()[:, columns // per_element] >> (columns % per_element * 4)) & 15


def int4_linear(
    c: torch.dtype,
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    group_size: int,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> list[Tensor]:
    columns = torch.arange(x.shape[-1])
    groups = columns // group_size
    zero = 8 if zero_point is None else 8 + zero_point.long()[:, groups]
    weight = (_nibbles(weight_packed, columns) - zero).to(c) * weight_scale.to(c)[:, groups]
    return linear(c, x, weight, bias)


def fp4_linear(
    c: torch.dtype,
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    group_size: int,
    global_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> list[Tensor]:
    columns = torch.arange(x.shape[-1])
    bits = weight_scale.long()
    if group_size == 16:  # a sign, four bits of exponent, three of mantissa
        exponent, mantissa = (bits >> 3) & 15, (bits & 7).double()
        scale = torch.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent.double() - 10))
    else:
        scale = 2.0 ** (bits.double() - 127)
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=c)
    weight = numbers[_nibbles(weight_packed, columns)] * scale.to(c)[:, columns // group_size]
    out = linear(c, x, weight)[0]
    out = out if global_scale is None else out / global_scale.to(c)
    return [out if bias is None else out + bias.to(c)]


def embedding(c: torch.dtype, token_ids: Tensor, weight: Tensor, scale: float = 1.0) -> list[Tensor]:
    rows = [weight[i].to(c) * scale for i in token_ids.tolist()]
    return [torch.stack(rows) if rows else weight.new_empty((0, weight.shape[1])).to(c)]


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
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    interleaved: bool = False,
) -> list[Tensor]:
    half = cos_sin.shape[1] // 2

    def turn(x: Tensor, weight: Tensor | None, position: int) -> Tensor:
        if weight is not None:
            x = rms_norm(torch.float64, x, weight, norm_eps)[0].to(x.dtype)
        out = x.to(c).clone()
        a = [2 * i if interleaved else i for i in range(half)]
        b = [2 * i + 1 if interleaved else i + half for i in range(half)]
        cos, sin = cos_sin[position, :half].to(c), cos_sin[position, half:].to(c)
        out[..., a] = x[..., a].to(c) * cos - x[..., b].to(c) * sin
        out[..., b] = x[..., b].to(c) * cos + x[..., a].to(c) * sin
        return out

    q_out, k_out, v_out = q.to(c), k_cache.to(c), v_cache.to(c)
    for t, (position, slot) in enumerate(zip(positions.tolist(), slot_mapping.tolist(), strict=True)):
        q_out[t] = turn(q[t], q_norm_weight, position)
        if slot >= 0:
            k_out[slot // k_cache.shape[1], slot % k_cache.shape[1]] = turn(k[t], k_norm_weight, position)
            v_out[slot // k_cache.shape[1], slot % k_cache.shape[1]] = v[t].to(c)
    return [q_out, k_out, v_out]


def _attention_row(
    c: torch.dtype, q: Tensor, k: Tensor, v: Tensor, i: int, num_rows: int, o: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Row i of a sequence: q (H, D), k and v (Sk, H, D). Takes only the keys it sees."""
    at = i + k.shape[0] - num_rows
    left, right = o["window_size"]
    right = 0 if o["causal"] else right
    seen = [j for j in range(k.shape[0]) if (left < 0 or j >= at - left) and (right < 0 or j <= at + right)]
    if not seen:
        return torch.zeros_like(q, dtype=c), torch.full((q.shape[0],), -torch.inf, dtype=c)
    keys, values = k[seen[0] : seen[-1] + 1], v[seen[0] : seen[-1] + 1]
    scores = torch.einsum("hd,khd->hk", q.to(c), keys) * o["softmax_scale"]
    if o["softcap"] > 0:
        scores = o["softcap"] * torch.tanh(scores / o["softcap"])
    return torch.einsum("hk,khd->hd", torch.softmax(scores, -1), values), torch.logsumexp(scores, -1)


def _attention(
    c: torch.dtype, q: Tensor, runs: list[int], keys: list[Tensor], values: list[Tensor], **options: Any
) -> list[Tensor]:
    scale = options.get("softmax_scale")
    options["softmax_scale"] = q.shape[-1] ** -0.5 if scale is None else scale
    options = {"window_size": (-1, -1), "softcap": 0.0} | options
    out, lse = q.to(c).clone(), torch.zeros(q.shape[1], q.shape[0], dtype=c)
    for b in range(len(runs) - 1):
        group = q.shape[1] // keys[b].shape[1]
        k, v = (t.to(c).repeat_interleave(group, 1) for t in (keys[b], values[b]))
        for i in range(runs[b + 1] - runs[b]):
            t = runs[b] + i
            out[t], lse[:, t] = _attention_row(c, q[t], k, v, i, runs[b + 1] - runs[b], options)
    return [out, lse]


def paged_attention(
    c: torch.dtype,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    max_seqlen_q: int,
    causal: bool = True,
    **options: Any,
) -> list[Tensor]:
    size = k_cache.shape[1]

    def gather(cache: Tensor) -> list[Tensor]:
        out = []
        for n, table in zip(seqused_k.tolist(), block_table.tolist(), strict=True):
            out.append(torch.stack([cache[table[i // size], i % size] for i in range(n)]) if n else cache[0, :0])
        return out

    return _attention(c, q, cu_seqlens_q.tolist(), gather(k_cache), gather(v_cache), causal=causal, **options)


def batch_attention(
    c: torch.dtype, q: Tensor, k: Tensor, v: Tensor, causal: bool = False, kernel: str = "auto", **options: Any
) -> list[Tensor]:
    batch, queries = q.shape[:2]
    runs = [b * queries for b in range(batch + 1)]
    out, lse = _attention(c, q.flatten(0, 1), runs, list(k), list(v), causal=causal, **options)
    return [out.unflatten(0, (batch, queries)), lse.unflatten(1, (batch, queries)).transpose(0, 1)]


def varlen_attention(
    c: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    kernel: str = "auto",
    **options: Any,
) -> list[Tensor]:
    at = cu_seqlens_k.tolist()
    keys, values = ([t[at[b] : at[b + 1]] for b in range(len(at) - 1)] for t in (k, v))
    return _attention(c, q, cu_seqlens_q.tolist(), keys, values, causal=causal, **options)


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
    out = logits.to(c).clone()
    for b in range(logits.shape[0]):
        for i in range(int(indptr[b]), int(indptr[b + 1])):
            old, count = out[b, token_ids[i]].clone(), int(counts[i])
            if count >= 0:
                rep = repetition_penalty[b].to(c)
                old = old / rep if old > 0 else old * rep
            if count > 0:
                old = old - presence_penalty[b].to(c) - frequency_penalty[b].to(c) * count
            out[b, token_ids[i]] = old + bias[i].to(c)
    return [out]


def apply_token_bitmask(c: torch.dtype, logits: Tensor, bitmask: Tensor, rows: Tensor) -> list[Tensor]:
    out = logits.to(c).clone()
    for r, row in enumerate(rows.tolist()):
        for token in range(logits.shape[1]):
            if not (int(bitmask[r, token // 32]) >> (token % 32)) & 1:
                out[row, token] = -math.inf
    return [out]


def token_logprobs(c: torch.dtype, logits: Tensor, token_ids: Tensor, num_top: int) -> list[Tensor]:
    logprobs = torch.log_softmax(logits.to(c), -1)
    rows = logits.float().tolist()
    best = [sorted(range(len(row)), key=lambda i: (-row[i], i))[:num_top] for row in rows]
    ids = torch.tensor(best, dtype=torch.int64).view(len(rows), num_top)
    chosen = token_ids.long().unsqueeze(1)
    rank = [1 + sum(v > row[i] for v in row) for row, i in zip(rows, token_ids.tolist(), strict=True)]
    return [
        logprobs.gather(1, chosen).squeeze(1),
        torch.tensor(rank, dtype=torch.int32),
        logprobs.gather(1, ids),
        ids.int(),
    ]
