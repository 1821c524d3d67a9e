"""Attention, its gradients, and states that are merged."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.harness.formulas.elementwise import numbers_of_cache


def _numbers(c: torch.dtype, t: Tensor, descale: Tensor | None, b: int) -> Tensor:
    """Sequence b of an argument, (S, heads, D), times its scales (B, Hk), if it has any."""
    t = t.to(c)
    if descale is not None:
        t = t * descale[b].to(c).repeat_interleave(t.shape[1] // descale.shape[1])[:, None]
    return t


def _options(head_dim: int, options: dict[str, Any]) -> dict[str, Any]:
    none = dict.fromkeys(("alibi_slopes", "sinks", "q_descale", "k_descale", "v_descale", "seqused_q", "seqused_k"))
    given = {"window_size": (-1, -1), "softcap": 0.0, "causal": False} | none | options
    if given.get("softmax_scale") is None:
        given["softmax_scale"] = head_dim**-0.5
    return given


def _of_heads(t: Tensor | None, b: int, q: Tensor, absent: float) -> Tensor:
    """(H) of sequence b, from (H), (B, H) or nothing; q (…, H, D)."""
    if t is None:
        return torch.full((q.shape[-2],), absent, device=q.device)
    return t[b] if t.dim() == 2 else t


def _attention_row(
    c: torch.dtype, q: Tensor, k: Tensor, v: Tensor, i: int, num_rows: int, b: int, o: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Row i of sequence b: q (H, D), k (Sk, H, D), v (Sk, H, Dv). Takes only the keys it sees."""
    at = i + k.shape[0] - num_rows
    left, right = o["window_size"]
    right = 0 if o["causal"] else right
    words = o.get("trees", {}).get(b)
    if words is None:
        seen = [j for j in range(k.shape[0]) if (left < 0 or j >= at - left) and (right < 0 or j <= at + right)]
        distances = [abs(at - j) for j in seen]
    else:  # the path to the row's own key
        seen = [j for j in range(at + 1) if j < at - i or words[i] >> (j - at + i) & 1]
        seen = seen[len(seen) - left - 1 :] if 0 <= left < len(seen) else seen
        distances = list(range(len(seen)))[::-1]
    sinks = _of_heads(o["sinks"], b, q, -math.inf).to(c)
    if not seen:
        return torch.zeros(v.shape[1:], dtype=c), sinks
    keys, values = k[seen], v[seen]
    scores = torch.einsum("hd,khd->hk", q, keys) * o["softmax_scale"]
    if o["softcap"] > 0:
        scores = o["softcap"] * torch.tanh(scores / o["softcap"])
    scores = scores - _of_heads(o["alibi_slopes"], b, q, 0.0).to(c)[:, None] * torch.tensor(distances, dtype=c)
    scores = torch.cat([scores, sinks[:, None]], 1)
    weights = torch.softmax(scores, -1)[:, :-1]
    if o.get("in_fp8") and c is not torch.float64:  # plainly, the product with v is in v's dtype
        weights = weights.to(torch.float8_e4m3fn).to(c)
    return torch.einsum("hk,khd->hd", weights, values), torch.logsumexp(scores, -1)


def _attention(
    c: torch.dtype, queries: list[Tensor], keys: list[Tensor], values: list[Tensor], **options: Any
) -> list[tuple[Tensor, Tensor]]:
    """out (Sq, H, Dv) and lse (H, Sq) of each sequence: queries (Sq, H, D), keys (Sk, Hk, D), values (Sk, Hk, Dv)."""
    results = []
    for b, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        o = _options(q.shape[-1], options) | {"in_fp8": q.dtype is torch.float8_e4m3fn}
        q, k, v = (_numbers(c, t, o[f"{n}_descale"], b) for n, t in (("q", q), ("k", k), ("v", v)))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        rows = [_attention_row(c, q[i], k, v, i, q.shape[0], b, o) for i in range(q.shape[0])]
        out = torch.stack([out for out, _ in rows]) if rows else q.new_zeros((0, q.shape[1], v.shape[-1]))
        results.append((out, torch.stack([lse for _, lse in rows], 1) if rows else q.new_zeros((q.shape[1], 0))))
    return results


def attention_matrix(
    c: torch.dtype, queries: list[Tensor], keys: list[Tensor], values: list[Tensor], **options: Any
) -> list[tuple[Tensor, Tensor]]:
    """The same as matrix products, on any device: what plain torch in a dtype computes, and so are the gradients through it."""
    results = []
    for b, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        o = _options(q.shape[-1], options)
        k, v = (t.to(c).repeat_interleave(q.shape[1] // t.shape[1], 1).transpose(0, 1) for t in (k, v))
        sinks = _of_heads(o["sinks"], b, q, -math.inf).to(c)[:, None]
        if k.shape[1] == 0:
            results.append((q.new_zeros((*q.shape[:2], v.shape[-1]), dtype=c), sinks.expand(-1, q.shape[0])))
            continue
        scores = q.to(c).transpose(0, 1) @ k.transpose(1, 2) * o["softmax_scale"]
        if o["softcap"] > 0:
            scores = o["softcap"] * torch.tanh(scores / o["softcap"])
        at = torch.arange(q.shape[0], device=q.device)[:, None] + k.shape[1] - q.shape[0]
        offset = torch.arange(k.shape[1], device=q.device)[None] - at
        slopes = _of_heads(o["alibi_slopes"], b, q, 0.0).to(c)
        scores = scores - slopes[:, None, None] * offset.abs()
        left, right = o["window_size"]
        right = 0 if o["causal"] else right
        hidden = torch.zeros_like(offset, dtype=torch.bool)
        if left >= 0:
            hidden |= offset < -left
        if right >= 0:
            hidden |= offset > right
        sees = (~hidden).any(1)  # a row that sees nothing has no gradient, and torch's softmax of it is NaN
        scores = scores.masked_fill(hidden & sees[:, None], -math.inf)
        scores = torch.cat([scores, sinks[:, None].expand(-1, q.shape[0], 1)], 2)
        out = torch.where(sees[:, None], torch.softmax(scores, -1)[..., :-1] @ v, 0)
        results.append((out.transpose(0, 1), torch.where(sees, torch.logsumexp(scores, -1), sinks)))
    return results


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
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    tree_mask: Tensor | None = None,
    batch_invariant: bool = False,
    **options: Any,
) -> list[Tensor]:
    size = k_cache.shape[1]

    def gather(cache: Tensor, scale: Tensor | None) -> list[Tensor]:
        cache = numbers_of_cache(c, cache, scale)
        out = []
        for n, table in zip(seqused_k.tolist(), block_table.tolist(), strict=True):
            out.append(torch.stack([cache[table[i // size], i % size] for i in range(n)]) if n else cache[0, :0])
        return out

    starts = cu_seqlens_q.tolist()
    queries = [q[starts[b] : starts[b + 1]] for b in range(len(starts) - 1)]
    words = [] if tree_mask is None else [tree_mask[starts[b] : starts[b + 1]].tolist() for b in range(len(queries))]
    options["trees"] = {b: own for b, own in enumerate(words) if len(own) <= 64}
    results = _attention(c, queries, gather(k_cache, k_scale), gather(v_cache, v_scale), causal=causal, **options)
    return _packed(c, q, q.shape[-1], starts, results)


def _packed(
    c: torch.dtype, q: Tensor, v_head_dim: int, starts: list[int], results: list[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """out (T, H, Dv) and lse (H, T): 0 and -inf for rows of q that no result is about."""
    outs, logs = [], []
    for b, (out, lse) in enumerate(results):
        unused = starts[b + 1] - starts[b] - out.shape[0]
        outs += [out, out.new_zeros((unused, q.shape[1], v_head_dim))]
        logs += [lse, lse.new_full((q.shape[1], unused), -math.inf)]
    if not results:
        return [q.new_zeros((0, q.shape[1], v_head_dim), dtype=c), q.new_zeros((q.shape[1], 0), dtype=c)]
    return [torch.cat(outs), torch.cat(logs, 1)]


def batch_attention(
    c: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: str = "auto",
    deterministic: bool = False,
    attend: Any = _attention,
    **options: Any,
) -> list[Tensor]:
    results = attend(c, list(q), list(k), list(v), **options)
    if not results:
        return [torch.zeros((*q.shape[:3], v.shape[-1]), dtype=c), torch.zeros(0, q.shape[2], q.shape[1], dtype=c)]
    return [torch.stack([out for out, _ in results]), torch.stack([lse for _, lse in results])]


def varlen_attention(
    c: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    kernel: str = "auto",
    deterministic: bool = False,
    attend: Any = _attention,
    **options: Any,
) -> list[Tensor]:
    def parts(t: Tensor, offsets: Tensor, used: Tensor | None) -> list[Tensor]:
        at = offsets.tolist()
        counts = offsets.diff() if used is None else used
        return [t[at[b] : at[b] + n] for b, n in enumerate(counts.tolist())]

    keys, values = (parts(t, cu_seqlens_k, seqused_k) for t in (k, v))
    results = attend(c, parts(q, cu_seqlens_q, seqused_q), keys, values, **options)
    return _packed(c, q, v.shape[-1], cu_seqlens_q.tolist(), results)


def gradients(
    forward: Any, c: torch.dtype, dout: Tensor, call: dict[str, Any], dlse: Tensor | None = None
) -> list[Tensor]:
    """Of q, k, v, and of sinks if the call has them, through torch's autograd."""
    names = [name for name in ("q", "k", "v", "sinks") if call.get(name) is not None]
    leaves = [call[name].detach().to(c).requires_grad_() for name in names]
    with torch.enable_grad():
        out, lse = forward(c, **call | dict(zip(names, leaves, strict=True)), attend=attention_matrix)
    results = ((out, dout.to(c)), (lse, torch.zeros_like(lse) if dlse is None else dlse.to(c)))
    given = [pair for pair in results if pair[0].requires_grad]  # without keys none may
    if not given:
        return [torch.zeros_like(t) for t in leaves]
    return list(
        torch.autograd.grad(
            [result for result, _ in given], leaves, [upstream for _, upstream in given], materialize_grads=True
        )
    )


def errors_from_rounded_out(
    forward: Any, dout: Tensor, out: Tensor, exact_out: Tensor, call: dict[str, Any]
) -> list[float]:
    """How much of each gradient's error comes from `out` as it was kept, in its own dtype: delta, the sum of dout * out of
    a row, is taken from there and not from P and dP. An error of delta acts like a gradient of -lse."""
    error = (dout.double() * (out.double() - exact_out.double())).nan_to_num(0.0).sum(-1).transpose(-1, -2)
    return [
        float(t.abs().max()) if t.numel() else 0.0
        for t in gradients(forward, torch.float64, torch.zeros_like(dout), call, -error)
    ]


def batch_attention_backward(
    c: torch.dtype, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None = None, **call: Any
) -> list[Tensor]:
    return gradients(batch_attention, c, dout, call, dlse)


def varlen_attention_backward(
    c: torch.dtype, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None = None, **call: Any
) -> list[Tensor]:
    return gradients(varlen_attention, c, dout, call, dlse)


def merge_attention_states(c: torch.dtype, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> list[Tensor]:
    out, lse = out_a.to(c).clone(), lse_a.to(c).clone()
    for where in torch.cartesian_prod(*(torch.arange(n) for n in lse.shape)).tolist() if lse.numel() else []:
        *batch, head, row = where
        sides = [(o[(*batch, row, head)].to(c), s[tuple(where)].to(c)) for o, s in ((out_a, lse_a), (out_b, lse_b))]
        sides = [(o, s) for o, s in sides if not s.isinf()]
        logs = torch.stack([s for _, s in sides] or [torch.tensor(-math.inf, dtype=c)])
        lse[tuple(where)] = torch.logsumexp(logs, 0)
        weights = torch.softmax(logs, 0)
        out[(*batch, row, head)] = sum(w * o for w, (o, _) in zip(weights, sides, strict=False)) if sides else 0
    return [out, lse]
