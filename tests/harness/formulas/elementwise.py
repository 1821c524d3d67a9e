"""Norms, gated activations, embedding, and RoPE with the write into the cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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


def embedding(
    c: torch.dtype, token_ids: Tensor, weight: Tensor, scale: float = 1.0, drawn: Tensor | None = None
) -> list[Tensor]:
    ids = [i if i >= 0 or drawn is None else int(drawn[-1 - i]) for i in token_ids.tolist()]
    rows = [weight[i].to(c) * scale if 0 <= i < len(weight) else torch.zeros_like(weight[0]).to(c) for i in ids]
    return [torch.stack(rows) if rows else weight.new_empty((0, weight.shape[1])).to(c)]


def numbers_of_cache(c: torch.dtype, cache: Tensor, scale: Tensor | None) -> Tensor:
    """A cache (num_blocks, block_size, Hk, D), times scale (Hk) or (num_blocks, block_size, Hk) if it is of 8 bits."""
    if cache.dtype.itemsize > 1:
        return cache
    return cache.to(c) if scale is None else cache.to(c) * scale.to(c).unsqueeze(-1)


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
    hadamard: bool = False,
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
        return out @ mix if hadamard else out

    # Entry (i, j) of a block: minus if i and j have an odd number of bits in common.
    dim = q.shape[2]
    block = dim & -dim
    signs = [
        [(-1) ** (i % block & j % block).bit_count() if i // block == j // block else 0 for j in range(dim)]
        for i in range(dim)
    ]
    mix = torch.tensor(signs, dtype=c, device=q.device) / block**0.5
    q_out, k_out, v_out = q.to(c), k_cache.to(c), v_cache.to(c)
    for t, (position, slot) in enumerate(zip(positions.tolist(), slot_mapping.tolist(), strict=True)):
        q_out[t] = turn(q[t], q_norm_weight, position)
        if slot >= 0:
            k_out[slot // k_cache.shape[1], slot % k_cache.shape[1]] = turn(k[t], k_norm_weight, position)
            v_out[slot // k_cache.shape[1], slot % k_cache.shape[1]] = v[t].to(c)
    return [q_out, k_out, v_out]
