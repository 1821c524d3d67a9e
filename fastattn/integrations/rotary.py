"""flash-attn's `layers.rotary`: rotary embedding (https://arxiv.org/abs/2104.09864) in plain torch, differentiable.

The arithmetic is fp32 and the result has x's dtype, as in flash-attn's kernel; torch.compile makes one kernel of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn the pairs of x by the angles of their positions, in the dtypes given.

    x: (B, S, H, D). cos, sin: (S, rotary_dim / 2) or (B, S, rotary_dim / 2); rotary_dim is at most D, and dimensions from
      it on pass through.
    interleaved: pairs are (2i, 2i + 1) if True, (i, i + rotary_dim / 2) if False (GPT-NeoX, Hugging Face).

    Returns (B, S, H, D).
    """
    return _rotate(x, cos.unsqueeze(-2), sin.unsqueeze(-2), interleaved)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Turn the pairs of x by the angles of their positions.

    x: (B, S, H, D), or packed (T, H, D) with cu_seqlens (B + 1). cos, sin: (max_position, rotary_dim / 2).
    interleaved: as in `apply_rotary_emb_torch`. inplace: write to x itself.
    seqlen_offsets: the position of each sequence's first token, an int or (B) int32.
    max_seqlen: for flash-attn's signature, not needed.

    Returns (B, S, H, D) or (T, H, D), x itself if inplace.
    """
    cos_rows, sin_rows = _angles(x, cos, sin, seqlen_offsets, cu_seqlens)
    if inplace:
        return _rotate_inplace(x, cos_rows, sin_rows, interleaved)
    return _rotate(x.float(), cos_rows.float(), sin_rows.float(), interleaved).to(x.dtype)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Turn q and k of a packed tensor in place.

    qkv: (B, S, 3, H, D), or (B, S, H + 2 Hk, D) with num_heads_q. cos, sin: (max_position, rotary_dim / 2).
    cos_k, sin_k: other angles for k. interleaved, seqlen_offsets: as in `apply_rotary_emb`.

    Returns qkv.
    """
    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    if qkv.dim() == 5:
        parts = [(0, 1), (1, 2)]
    else:
        if num_heads_q is None:
            raise ValueError(f"apply_rotary_emb_qkv_: num_heads_q is None, expected an int with qkv {tuple(qkv.shape)}")
        num_heads_k = (qkv.shape[2] - num_heads_q) // 2
        parts = [(0, num_heads_q), (num_heads_q, num_heads_q + num_heads_k)]
    tables = [_angles(qkv[:, :, 0], c, s, seqlen_offsets, None) for c, s in ((cos, sin), (cos_k, sin_k))]
    for (start, end), (cos_rows, sin_rows) in zip(parts, tables, strict=True):
        qkv = _rotate_part_inplace(qkv, cos_rows, sin_rows, interleaved, 2, start, end)
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Turn k of a packed tensor in place.

    kv: (B, S, 2, Hk, D). The rest is as in `apply_rotary_emb`.

    Returns kv.
    """
    cos_rows, sin_rows = _angles(kv[:, :, 0], cos, sin, seqlen_offsets, None)
    return _rotate_part_inplace(kv, cos_rows, sin_rows, interleaved, 2, 0, 1)


class RotaryEmbedding(torch.nn.Module):
    """Rotary embedding with a table of angles that grows with the sequences it meets."""

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """dim: how many dimensions of a head are turned. base: of the frequencies. interleaved: as in
        `apply_rotary_emb`. scale_base: of XPos (https://arxiv.org/abs/2212.10554), off if None. device: of the table.
        """
        super().__init__()
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._frequencies(device), persistent=False)
        even = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        scale = None if scale_base is None else (even + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._length = 0
        self._tables: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # cos, sin, and those of k

    def _frequencies(self, device: torch.device | str | None) -> Tensor:
        even = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return 1.0 / self.base ** (even / self.dim)

    def _grow(self, length: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        old = self._tables
        if old is not None:
            fits = length <= self._length and old[0].device == like.device and old[0].dtype == like.dtype
            if fits and not (self.training and old[0].is_inference()):  # autograd cannot save what inference mode made
                return old
        position = torch.arange(length, device=like.device, dtype=torch.float32)
        # A model cast to bf16 has cast this buffer too, and angles of far positions need all their bits.
        exact = self.inv_freq.dtype == torch.float32
        frequencies = self.inv_freq.to(like.device) if exact else self._frequencies(like.device)
        angles = torch.outer(position, frequencies)
        cos, sin = angles.cos(), angles.sin()
        cos_k, sin_k = cos, sin
        if self.scale is not None and self.scale_base is not None:
            power = (position - length // 2) / self.scale_base
            scale = self.scale.to(device=like.device, dtype=torch.float32) ** power.unsqueeze(1)
            cos, sin, cos_k, sin_k = cos * scale, sin * scale, cos / scale, sin / scale
        dtype = like.dtype
        self._length, self._tables = length, (cos.to(dtype), sin.to(dtype), cos_k.to(dtype), sin_k.to(dtype))
        return self._tables

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Turn q and k in place.

        qkv: (B, S, 3, H, D), or (B, S, H + 2 Hk, D) with num_heads_q; with kv it is q alone, (B, S, H, D).
        kv: (B, S, 2, Hk, D). seqlen_offset: the position of each sequence's first token, an int or (B).
        max_seqlen: positions that the table must have; needed where seqlen_offset is a tensor.

        Returns qkv, or q and kv.
        """
        if max_seqlen is None:
            if isinstance(seqlen_offset, Tensor) and self._tables is None:
                raise ValueError("RotaryEmbedding: max_seqlen is None, expected an int as seqlen_offset is a tensor")
            max_seqlen = qkv.shape[1] + seqlen_offset if isinstance(seqlen_offset, int) else self._length
        cos, sin, cos_k, sin_k = self._grow(max_seqlen, qkv)
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q)
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, inplace=True, seqlen_offsets=seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Each pair (a, b) of x becomes (a cos - b sin, b cos + a sin); cos and sin broadcast to it."""
    half = cos.shape[-1]
    if 2 * half > x.shape[-1]:
        raise ValueError(f"rotary: cos has {half} columns, expected at most D / 2 of x {tuple(x.shape)}")
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned, rest.to(turned.dtype)), -1) if rest.shape[-1] else turned


def _angles(
    x: Tensor, cos: Tensor, sin: Tensor, offsets: int | Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rows of the tables for x (B, S, H, D): (S or B S, 1, rotary_dim / 2); for packed x (T, H, D): (T, 1, ...)."""
    if cu_seqlens is None:
        if isinstance(offsets, int):
            rows = slice(offsets, offsets + x.shape[1])
            return cos[rows].unsqueeze(-2), sin[rows].unsqueeze(-2)
        position = offsets.unsqueeze(1) + torch.arange(x.shape[1], device=x.device)
    else:
        token = torch.arange(x.shape[0], device=x.device)
        sequence = torch.bucketize(token, cu_seqlens[1:-1], right=True)
        position = token - cu_seqlens[sequence]
        position = position + (offsets if isinstance(offsets, int) else offsets[sequence])
    return cos[position].unsqueeze(-2), sin[position].unsqueeze(-2)


class _RotateInplace(torch.autograd.Function):
    """x[..., start:end along dim, ...] turned in place; the gradient is turned back, and nothing but angles is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dim: int, start: int, end: int
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.how = (interleaved, dim, start, end)
        ctx.mark_dirty(x)
        _turn(x, cos, sin, interleaved, dim, start, end)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad = grad.clone()
        _turn(grad, cos, -sin, *ctx.how)
        return (grad, *(None,) * 6)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dim: int, start: int, end: int) -> None:
    part = x.narrow(dim, start, end - start)
    if part.dim() == 5:  # (B, S, 1, H, D)
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    part.copy_(_rotate(part.float(), cos.float(), sin.float(), interleaved))


def _rotate_part_inplace(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dim: int, start: int, end: int
) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        rotated: Tensor = _RotateInplace.apply(x, cos, sin, interleaved, dim, start, end)  # type: ignore[no-untyped-call]
        return rotated
    _turn(x, cos, sin, interleaved, dim, start, end)
    return x


def _rotate_inplace(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return _rotate_part_inplace(x, cos, sin, interleaved, x.dim() - 2, 0, x.shape[-2])
