"""Attention as flash-attn defines it, written out: whole score matrices, lengths by masks, gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    lengths_q: Tensor | None = None,
    lengths_k: Tensor | None = None,
    leftpad: Tensor | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    upcast: bool = True,
) -> tuple[Tensor, Tensor]:
    """q (B, Sq, H, D), k and v (B, Sk, Hk, D) → out (B, Sq, H, D), lse (B, H, Sq) with −inf where a row sees no key.

    lengths_q, lengths_k, leftpad: (B), rows and keys that count. upcast: compute in fp32, else in q's dtype as a plain
    program would.
    """
    dtype, (batch, num_queries, num_heads, head_dim), num_keys = q.dtype, q.shape, k.shape[1]
    if upcast:
        q, k, v = q.float(), k.float(), v.float()
    group = num_heads // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q * (head_dim**-0.5 if scale is None else scale), k)
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap

    def column(lengths: Tensor | None, default: int) -> Tensor:
        lengths = torch.full((batch,), default) if lengths is None else lengths
        return lengths.to(q.device).view(batch, 1, 1)

    rows, keys = torch.arange(num_queries, device=q.device).view(1, -1, 1), torch.arange(num_keys, device=q.device)
    used_q, used_k, first = column(lengths_q, num_queries), column(lengths_k, num_keys), column(leftpad, 0)
    own = rows + used_k - used_q  # the key that a row stands at; leftpad moves neither end
    seen = (keys < used_k) & (keys >= first) & (rows < used_q)
    left, right = window[0], 0 if causal else window[1]
    if left >= 0:
        seen = seen & (keys >= own - left)
    if right >= 0:
        seen = seen & (keys <= own + right)
    seen = seen.unsqueeze(1)
    if slopes is not None:
        slopes = slopes.expand(batch, num_heads).view(batch, num_heads, 1, 1)
        scores = scores - (slopes * (own - keys).abs().unsqueeze(1)).to(scores.dtype)
    scores = scores.masked_fill(~seen, -torch.inf)
    logits = scores.float()
    if sinks is not None:
        logits = torch.cat((logits, sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)), -1)
    lse = logits.logsumexp(-1)
    weights = (scores.float() - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp().to(v.dtype)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    return out.to(dtype), lse


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (B, S, H, D) turned by cos, sin (B, S, rotary_dim / 2), as complex numbers."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].double(), x[..., 2 * half :]
    parts = turned.unflatten(-1, (half, 2)) if interleaved else turned.unflatten(-1, (2, half)).transpose(-1, -2)
    angle = torch.complex(cos.double(), sin.double()).unsqueeze(2)
    parts = torch.view_as_real(torch.view_as_complex(parts.contiguous()) * angle)
    turned = parts.flatten(-2) if interleaved else parts.transpose(-1, -2).flatten(-2)
    return torch.cat((turned.to(x.dtype), rest), -1)
