"""The gradient of softmax attention, from its formulas (https://arxiv.org/abs/2307.08691, algorithm 2).

  P = exp(s - lse)   dV = Pᵀ dO   dP = dO Vᵀ   dS = P (dP - delta)   dQ = scale · dS K   dK = scale · dSᵀ Q
  delta = rowsum(dO · O) - dlse

with dS times 1 - (s / softcap)² under a softcap. A sink is in lse and needs nothing more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.reference.attention_scores import Scoring, grouped, slopes_of, spans, ungrouped, wide

Gradients = tuple[Tensor, Tensor, Tensor]


def row_delta(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """rowsum(dout · out) - dlse: (…, S, H, Dv) → (…, H, S)."""
    delta = (wide(dout) * wide(out)).sum(-1).transpose(-1, -2)
    return delta if dlse is None else delta - dlse


def _attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, scoring: Scoring, slopes: Tensor | None
) -> Gradients:
    """One sequence: dout (Sq, H, Dv), q (Sq, H, D), k (Sk, Hk, D), v (Sk, Hk, Dv), lse and delta (H, Sq)."""
    (num_rows, _, _), (num_keys, num_kv_heads, _) = q.shape, k.shape
    k, v = wide(k.transpose(0, 1)), wide(v.transpose(0, 1))  # (Hk, Sk, D or Dv)
    dq = torch.zeros(q.shape, dtype=k.dtype)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # rows without keys: every weight is exp(-inf) = 0
    for rows, keys in scoring.chunks(num_rows, num_keys):
        if not keys:
            continue
        own, seen = slice(rows.start, rows.stop), slice(keys.start, keys.stop)
        q_rows, dout_rows = grouped(q[own], num_kv_heads), grouped(dout[own], num_kv_heads)
        scores = scoring.cap((q_rows * scoring.scale) @ k[:, seen].transpose(1, 2))  # (Hk, group * rows, keys)
        steepness = 1 - (scores / scoring.softcap).square() if scoring.softcap > 0 else None
        scoring.place(scores, rows, keys, num_keys - num_rows, slopes)
        row_shape = (*scores.shape[:2], 1)
        weights = scores.sub_(lse[:, own].reshape(row_shape)).exp_()
        dv[:, seen] += weights.transpose(1, 2) @ dout_rows
        dscores = weights * (dout_rows @ v[:, seen].transpose(1, 2) - delta[:, own].reshape(row_shape))
        if steepness is not None:
            dscores *= steepness
        dscores *= scoring.scale
        dq[own] = ungrouped(dscores @ k[:, seen], len(rows))
        dk[:, seen] += dscores.transpose(1, 2) @ q_rows
    return dq, dk.transpose(0, 1), dv.transpose(0, 1)


def batch_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    alibi_slopes: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    deterministic: bool,
    kernel: int,
) -> Gradients:
    """dout and out (B, Sq, H, Dv), lse and dlse (B, H, Sq), the rest as given to `batch_attention` → dq, dk, dv."""
    scoring = Scoring.make(softmax_scale, causal, window_left, window_right, softcap)
    gradients = tuple(t.new_empty(t.shape) for t in (q, k, v))
    delta = row_delta(dout, out, dlse)
    for b in range(q.shape[0]):
        slopes = slopes_of(alibi_slopes, b)
        parts = _attend_backward(dout[b], q[b], k[b], v[b], lse[b], delta[b], scoring, slopes)
        for whole, part in zip(gradients, parts, strict=True):
            whole[b] = part
    return gradients[0], gradients[1], gradients[2]


def varlen_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    deterministic: bool,
    kernel: int,
) -> Gradients:
    """dout and out (T, H, Dv), lse and dlse (H, T), the rest as given to `varlen_attention` → dq, dk, dv.

    Tokens that no sequence uses have a gradient of zero.
    """
    scoring = Scoring.make(softmax_scale, causal, window_left, window_right, softcap)
    dq, dk, dv = (t.new_zeros(t.shape) for t in (q, k, v))
    delta = row_delta(dout, out, dlse)
    for b, (own, keys) in enumerate(zip(spans(cu_seqlens_q, seqused_q), spans(cu_seqlens_k, seqused_k), strict=True)):
        slopes = slopes_of(alibi_slopes, b)
        dq[own], dk[keys], dv[keys] = _attend_backward(
            dout[own], q[own], k[keys], v[keys], lse[:, own], delta[:, own], scoring, slopes
        )
    return dq, dk, dv
