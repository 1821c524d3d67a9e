"""flash-attn 2.8's functions: same names, arguments, order, defaults and results.

Letters: B sequences, Sq and Sk queries and keys of each, T tokens in a row, H query heads, Hk key-value heads that
divide H, D head dim up to 256. Tensors are bf16 or fp16, on the CPU also fp32; of each, only the last dimension must be
contiguous, or it is copied.

What all have in common:

- softmax_scale: 1/√D if None.
- causal: aligned bottom-right, the last query stands at the last key.
- window_size: how many keys to the left and to the right a query sees besides its own, -1 is open.
- softcap: `softcap * tanh(score / softcap)`, 0 is off.
- alibi_slopes: (H) or (B, H) fp32; `-slope * |i + Sk - Sq - j|` is added to the score of query i and key j.
- deterministic: two backward passes give the same bits.
- dropout_p: 0; anything else is an error.
- return_attn_probs: give (out, softmax_lse, S_dmask), S_dmask empty as flash-attn's is without dropout.

A row that sees no key gives 0, and +inf as its LSE.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.integrations._common import (
    check,
    cut,
    fit,
    length,
    no_dropout,
    plus_infinity,
    scores_of,
)
from fastattn.integrations._kv_cache import cached_attention
from fastattn.ops.attention import batch_attention, paged_attention, varlen_attention

__version__ = "2.8.3+fastattn"  # the interface that this is; the rest says whose it is

Result = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention of a batch, differentiable.

    q: (B, Sq, H, D). k, v: (B, Sk, Hk, D).

    Returns out (B, Sq, H, D), with return_attn_probs also softmax_lse (B, H, Sq) and S_dmask.
    """
    return _batch(
        "flash_attn_func", q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with keys and values in one tensor, and one gradient for it.

    q: (B, Sq, H, D). kv: (B, Sk, 2, Hk, D).
    """
    k, v = _unpack("flash_attn_kvpacked_func", "kv", kv, 2, "(B, Sk, 2, Hk, D)")
    return _batch(
        "flash_attn_kvpacked_func", q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with all three in one tensor, and one gradient for it.

    qkv: (B, S, 3, H, D).
    """
    q, k, v = _unpack("flash_attn_qkvpacked_func", "qkv", qkv, 3, "(B, S, 3, H, D)")
    return _batch(
        "flash_attn_qkvpacked_func", q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Attention of sequences in one row, differentiable.

    q: (Tq, H, D). k, v: (Tk, Hk, D), or with block_table (num_blocks, block_size, Hk, D), any block_size.
    cu_seqlens_q, cu_seqlens_k: (B + 1) int32, where each sequence begins. max_seqlen_q, max_seqlen_k: at least the longest.
    block_table: (B, max_blocks) int32, the pages of each sequence; without gradient.

    Returns out (Tq, H, D), with return_attn_probs also softmax_lse (H, Tq) and S_dmask.
    """
    return _varlen(
        "flash_attn_varlen_func", q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs, block_table,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with keys and values in one tensor, and one gradient for it.

    q: (Tq, H, D). kv: (Tk, 2, Hk, D).
    """
    k, v = _unpack("flash_attn_varlen_kvpacked_func", "kv", kv, 2, "(Tk, 2, Hk, D)")
    return _varlen(
        "flash_attn_varlen_kvpacked_func", q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with all three in one tensor, and one gradient for it.

    qkv: (T, 3, H, D). cu_seqlens: (B + 1) int32. max_seqlen: at least the longest.
    """
    q, k, v = _unpack("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 3, "(T, 3, H, D)")
    return _varlen(
        "flash_attn_varlen_qkvpacked_func", q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to a cache, to which new keys and values are appended first. No gradient.

    q: (B, Sq, H, D).
    k_cache, v_cache: (Bc, Sc, Hk, D), or with block_table (num_blocks, block_size, Hk, D), any block_size; changed in place
      where k and v are given.
    k, v: (B, Snew, Hk, D), written to the cache from cache_seqlens on. The caller's cache_seqlens is not advanced.
    rotary_cos, rotary_sin: (max_position, rotary_dim / 2): k is rotated at the positions it is written to, and q at
      cache_seqlens, cache_seqlens + 1, … if causal or with a window, else all at cache_seqlens.
    cache_seqlens: keys in the cache, an int or (B) int32; the whole cache if None.
    cache_batch_idx: (B) int32, each sequence's row of the cache. Several may read one row. With k and v, sequences of one row must
      write to different places, else each place holds what any one of them brought, as in flash-attn; the CPU, which can
      look, raises ValueError. cache_leftpad: (B) int32, where its keys begin.
    block_table: (B, max_blocks) int32, the pages of each sequence.
    rotary_interleaved: pairs are (2i, 2i + 1) if True, (i, i + rotary_dim / 2) if False.
    num_splits: for flash-attn's signature; the kernel decides.

    Returns out (B, Sq, H, D), with return_softmax_lse also softmax_lse (B, H, Sq).
    """
    out, lse = cached_attention(
        "flash_attn_with_kvcache", q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,
        cache_leftpad, block_table, softmax_scale, causal, window_size, softcap, rotary_interleaved, alibi_slopes,
    )  # fmt: skip
    return (out, plus_infinity(lse)) if return_softmax_lse else out


def _unpack(op: str, name: str, packed: Tensor, count: int, shape: str) -> tuple[Tensor, ...]:
    if not isinstance(packed, Tensor):
        raise TypeError(f"{op}: {name} is a {type(packed).__name__}, expected a torch.Tensor")
    if packed.dim() != len(shape.split(",")) or packed.shape[-3] != count:
        raise ValueError(f"{op}: {name} has shape {tuple(packed.shape)}, expected {shape}")
    return packed.unbind(-3)


def _result(v: Tensor, out: Tensor, lse: Tensor, return_attn_probs: bool) -> Result:
    out = cut(out, v.shape[-1])
    return (out, plus_infinity(lse), v.new_empty(0)) if return_attn_probs else out


def _batch(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
) -> Result:
    no_dropout(op, dropout_p)
    check(op, q, k, v)
    out, lse = batch_attention(
        fit(q), fit(k), fit(v), **scores_of(q, softmax_scale, causal, window_size, softcap),
        alibi_slopes=alibi_slopes, deterministic=deterministic,
    )  # fmt: skip
    return _result(v, out, lse, return_attn_probs)


def _varlen(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
    block_table: Tensor | None = None,
) -> Result:
    no_dropout(op, dropout_p)
    check(op, q, k, v)
    scores = scores_of(q, softmax_scale, causal, window_size, softcap)
    longest_q = length(max_seqlen_q, q.shape[0])
    if block_table is not None:
        with torch.no_grad():
            out, lse = paged_attention(
                fit(q), fit(k), fit(v), cu_seqlens_q, cu_seqlens_k.diff(), block_table, longest_q,
                **scores, alibi_slopes=alibi_slopes,
            )  # fmt: skip
        return _result(v, out, lse, return_attn_probs)
    out, lse = varlen_attention(
        fit(q), fit(k), fit(v), cu_seqlens_q, cu_seqlens_k, longest_q, length(max_seqlen_k, k.shape[0]),
        **scores, alibi_slopes=alibi_slopes, deterministic=deterministic,
    )  # fmt: skip
    return _result(v, out, lse, return_attn_probs)
