"""FlashInfer's norms, gated activations and rotary embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.integrations.flashinfer._common import given
from fastattn.ops import add_rms_norm, geglu, rms_norm, rope_kv_write, swiglu


def rmsnorm(
    input: Tensor, weight: Tensor, eps: float = 1e-6, out: Tensor | None = None, enable_pdl: bool | None = None
) -> Tensor:
    """`input / sqrt(mean(input²) + eps) * weight` over the last dimension.

    input: (T, N) or (T, H, N). weight: (N), input's dtype. out: like input, to write to. enable_pdl: not needed.
    """
    return given(rms_norm(input, weight, eps), out)


def fused_add_rmsnorm(
    input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    """`residual ← input + residual`, then `input ← rmsnorm(residual)`; both in place, one kernel and a copy.

    input, residual: (T, N). weight: (N). enable_pdl: not needed.
    """
    input.copy_(add_rms_norm(input, residual, weight, eps))


def silu_and_mul(input: Tensor, out: Tensor | None = None, enable_pdl: bool | None = None) -> Tensor:
    """`silu(input[…, :N]) * input[…, N:]`.

    input: (…, 2N). out: (…, N), to write to. enable_pdl: not needed.
    """
    return given(swiglu(input), out)


def gelu_tanh_and_mul(input: Tensor, out: Tensor | None = None, enable_pdl: bool | None = None) -> Tensor:
    """`silu_and_mul` with GELU, by its tanh formula."""
    return given(geglu(input, "tanh"), out)


def gelu_and_mul(input: Tensor, out: Tensor | None = None, enable_pdl: bool | None = None) -> Tensor:
    """`silu_and_mul` with GELU, by erf."""
    return given(geglu(input, "none"), out)


def _rotate(x: Tensor, cos_sin: Tensor, positions: Tensor, interleave: bool) -> None:
    """x (T, H, D) turned in place: `rope_kv_write` with nothing to write."""
    none = x.new_empty((x.shape[0], 0, x.shape[2]))
    cache = x.new_empty((1, 1, 0, x.shape[2]))
    slots = torch.full_like(positions, -1)
    rope_kv_write(x, none, none, cos_sin, positions, slots, cache, cache.clone(), interleaved=interleave)


def _apply(q: Tensor, k: Tensor, positions: Tensor, interleave: bool, frequencies: Tensor) -> None:
    angles = positions.float().unsqueeze(1) * frequencies
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    rows = torch.arange(positions.shape[0], dtype=torch.int32, device=q.device)
    for x in (q, k):
        _rotate(x, cos_sin, rows, interleave)


def _frequencies(q: Tensor, rotary_dim: int | None, rope_theta: float) -> Tensor:
    """(rotary_dim / 2) fp32: theta^(-2i / rotary_dim)."""
    width = q.shape[-1] if rotary_dim is None else rotary_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=q.device) / width
    return torch.exp2(exponents * -math.log2(rope_theta))


def _llama31(
    q: Tensor, rotary_dim: int | None, scale: float, theta: float, low_freq: float, high_freq: float, old_len: int
) -> Tensor:
    """Long waves are slowed by `scale`, short ones stay, those between are blended."""
    frequencies = _frequencies(q, rotary_dim, theta)
    turns = old_len * frequencies / (2 * math.pi)
    keep = ((turns - low_freq) / (high_freq - low_freq)).clamp(0.0, 1.0)
    return (1 - keep) * frequencies / scale + keep * frequencies


def _positions(q: Tensor, indptr: Tensor, offsets: Tensor) -> Tensor:
    """offsets (B): the position of each request's first token; indptr (B + 1): where its tokens begin."""
    token = torch.arange(q.shape[0], device=q.device)
    request = torch.searchsorted(indptr[1:].contiguous(), token, right=True).clamp(max=offsets.shape[0] - 1)
    return offsets[request] + token - indptr[request]


def apply_rope_inplace(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """`apply_rope_pos_ids_inplace` where the tokens of a request stand one after another.

    indptr: (B + 1) int32, where each request's tokens begin. offsets: (B) int32, the position of its first token.
    """
    apply_rope_pos_ids_inplace(q, k, _positions(q, indptr, offsets), rotary_dim, interleave, rope_scale, rope_theta)


def apply_rope_pos_ids_inplace(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """Rotary embedding of q and k, in place; angles are `position / rope_scale * rope_theta^(-2i / rotary_dim)`.

    q: (T, H, D). k: (T, Hk, D). pos_ids: (T), the position of each token.
    rotary_dim: how many dimensions turn, D if None. interleave: pairs are (2i, 2i + 1) if True, (i, i + rotary_dim / 2) if
      False.
    """
    _apply(q, k, pos_ids, interleave, _frequencies(q, rotary_dim, rope_theta) / rope_scale)


def apply_llama31_rope_inplace(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """`apply_rope_inplace` with the frequencies of Llama 3.1."""
    apply_llama31_rope_pos_ids_inplace(
        q, k, _positions(q, indptr, offsets), rotary_dim, interleave, rope_scale, rope_theta, low_freq_factor,
        high_freq_factor, old_context_len,
    )  # fmt: skip


def apply_llama31_rope_pos_ids_inplace(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """`apply_rope_pos_ids_inplace` with the frequencies of Llama 3.1."""
    frequencies = _llama31(q, rotary_dim, rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    _apply(q, k, pos_ids, interleave, frequencies)


def apply_rope(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> tuple[Tensor, Tensor]:
    """`apply_rope_inplace` on copies, which are returned."""
    q, k = q.clone(), k.clone()
    apply_rope_inplace(q, k, indptr, offsets, rotary_dim, interleave, rope_scale, rope_theta)
    return q, k


def apply_rope_pos_ids(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> tuple[Tensor, Tensor]:
    """`apply_rope_pos_ids_inplace` on copies, which are returned."""
    q, k = q.clone(), k.clone()
    apply_rope_pos_ids_inplace(q, k, pos_ids, rotary_dim, interleave, rope_scale, rope_theta)
    return q, k


def apply_llama31_rope(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> tuple[Tensor, Tensor]:
    """`apply_llama31_rope_inplace` on copies, which are returned."""
    q, k = q.clone(), k.clone()
    apply_llama31_rope_inplace(
        q, k, indptr, offsets, rotary_dim, interleave, rope_scale, rope_theta, low_freq_factor, high_freq_factor,
        old_context_len,
    )  # fmt: skip
    return q, k


def apply_llama31_rope_pos_ids(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> tuple[Tensor, Tensor]:
    """`apply_llama31_rope_pos_ids_inplace` on copies, which are returned."""
    q, k = q.clone(), k.clone()
    apply_llama31_rope_pos_ids_inplace(
        q, k, pos_ids, rotary_dim, interleave, rope_scale, rope_theta, low_freq_factor, high_freq_factor,
        old_context_len,
    )  # fmt: skip
    return q, k


def apply_rope_with_cos_sin_cache(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool = True
) -> tuple[Tensor, Tensor]:
    """`apply_rope_with_cos_sin_cache_inplace` on copies, which are returned."""
    query, key = query.clone(), key.clone()
    apply_rope_with_cos_sin_cache_inplace(positions, query, key, head_size, cos_sin_cache, is_neox)
    return query, key


def apply_rope_with_cos_sin_cache_inplace(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool = True
) -> None:
    """Rotary embedding by a table, in place; vLLM's arguments.

    positions: (T). query: (T, H * head_size). key: (T, Hk * head_size).
    cos_sin_cache: (max_position, rotary_dim) fp32, cosines in the first half of a row, sines in the second.
    is_neox: pairs are (i, i + rotary_dim / 2) if True, (2i, 2i + 1) if False.
    """
    if cos_sin_cache.dtype != torch.float32:
        raise ValueError(
            f"flashinfer.apply_rope_with_cos_sin_cache: cos_sin_cache is {cos_sin_cache.dtype}, expected torch.float32"
        )
    rows = positions.to(torch.int32)
    for x in (query, key):
        _rotate(x.view(*x.shape[:-1], -1, head_size), cos_sin_cache, rows, not is_neox)
