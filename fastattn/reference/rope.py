"""Rotary embedding (https://arxiv.org/abs/2104.09864) of q and k, and the write of k and v to the paged cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.reference.kv_8bit import LARGEST, to_8bit, token_scales
from fastattn.reference.norm import rms_norm


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn each pair (a, b) of x (T, heads, D) by its angle: (a cos - b sin, b cos + a sin), in fp32."""
    half = cos.shape[-1]
    xf = x.float()
    turned, rest = xf[..., : 2 * half], xf[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = turned[..., :half], turned[..., half:]
    pair = (torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin))
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def hadamard_product(x: Tensor) -> Tensor:
    """x (T, heads, D) times orthonormal Hadamard matrices along the diagonal, of the largest power of two that divides D.

    By butterflies, as the kernel does it: a BLAS library's sums would depend on the number of rows.
    """
    dim = x.shape[-1]
    block, distance = dim & -dim, 1
    while distance < block:
        low, high = x.reshape(*x.shape[:-1], dim // (2 * distance), 2, distance).unbind(-2)
        x = torch.stack((low + high, low - high), -2).flatten(-3)
        distance *= 2
    return x * (1 / math.sqrt(block))


def _write(cache: Tensor, rows: Tensor, slots: Tensor, scale: Tensor | None = None) -> None:
    """cache (num_blocks, block_size, Hk, D)[slot] ← rows (T, Hk, D), in 8 bits divided by their scale.

    scale: (Hk), or (num_blocks, block_size, Hk) to be written too.
    """
    if cache.dtype in LARGEST:
        rows = rows.float()
        own = torch.ones(rows.shape[1]) if scale is None else scale
        if scale is not None and scale.dim() == 3:
            own = token_scales(rows, cache.dtype)
            scale[slots // cache.shape[1], slots % cache.shape[1]] = own
        rows = to_8bit(rows / own.unsqueeze(-1), cache.dtype)
        cache, rows = cache.view(torch.uint8), rows.view(torch.uint8)  # torch indexes no fp8
    block_size = cache.shape[1]
    if cache.stride(0) == block_size * cache.stride(1):  # the blocks are one row of slots
        cache.flatten(0, 1).index_copy_(0, slots, rows)
    else:
        cache[slots // block_size, slots % block_size] = rows


def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    norm_eps: float,
    interleaved: bool,
    hadamard: bool,
) -> None:
    """Rotate q in place; write rotated k and plain v to their slots, none for slot -1; and, of tokens, their scales."""
    if q.shape[0] == 0:
        return
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, -1)  # (T, 1, rotary_dim / 2) each
    q_normed = q if q_norm_weight is None else rms_norm(q, q_norm_weight, norm_eps)
    turned = _rotate(q_normed, cos, sin, interleaved)
    q.copy_(hadamard_product(turned) if hadamard else turned)

    slots = slot_mapping.long()
    if int(slots.min()) < 0:
        written = (slots >= 0).nonzero().squeeze(1)
        slots, k, v, cos, sin = (t.index_select(0, written) for t in (slots, k, v, cos, sin))
    k_normed = k if k_norm_weight is None else rms_norm(k, k_norm_weight, norm_eps)
    rotated = _rotate(k_normed, cos, sin, interleaved)
    if hadamard:
        rotated = hadamard_product(rotated)
    _write(k_cache, rotated if k_cache.dtype in LARGEST else rotated.to(k_cache.dtype), slots, k_scale)
    _write(v_cache, v, slots, v_scale)
