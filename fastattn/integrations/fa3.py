"""FlashAttention-3's functions (`flash_attn_interface`): same names, arguments, order, defaults and results.

Letters and limits are those of `fastattn.integrations.flash_attn`. What differs from flash-attn 2:

- There is no dropout_p: the fourth argument is softmax_scale.
- A row that sees no key has −inf as its LSE, except where the call brings no keys at all: +inf.
- q, k and v may all be float8_e4m3fn (D a multiple of 16), then out is bf16: q_descale, k_descale, v_descale (B, Hk) fp32
  multiply their tensor. No gradient then.
- s_aux: (H), a further logit of each row that has no value; the last argument, as in vLLM's and Hugging Face's forks.
- num_splits, pack_gqa, sm_margin, scheduler_metadata: for the signature; the kernel decides.
- attention_chunk must be 0, qv must be None.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.integrations._common import (
    check,
    cut,
    fit,
    length,
    not_implemented,
    scores_of,
)
from fastattn.integrations._kv_cache import cached_attention
from fastattn.ops.attention import batch_attention, varlen_attention
from fastattn.ops.checks import FP8

Result = Tensor | tuple[Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    s_aux: Tensor | None = None,
) -> Result:
    """Attention of a batch, differentiable.

    q: (B, Sq, H, D). k: (B, Sk, Hk, D). v: (B, Sk, Hk, Dv).

    Returns out (B, Sq, H, Dv), with return_attn_probs also softmax_lse (B, H, Sq).
    """
    op = "fa3.flash_attn_func"
    _refuse(op, qv, attention_chunk)
    check(op, q, k, v, fp8=True)
    out, lse = batch_attention(
        fit(q), fit(k), fit(v), **scores_of(q, softmax_scale, causal, window_size, softcap), sinks=s_aux,
        q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, deterministic=deterministic,
    )  # fmt: skip
    return _result(k, v, out, lse, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with all three in one tensor, and one gradient for it.

    qkv: (B, S, 3, H, D), or (B, S, H + 2 Hk, D) with num_heads_q.
    """
    op = "fa3.flash_attn_qkvpacked_func"
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        q, k, v = qkv.unbind(2)
    elif qkv.dim() == 4 and num_heads_q is not None and (qkv.shape[2] - num_heads_q) % 2 == 0:
        num_heads_k = (qkv.shape[2] - num_heads_q) // 2
        q, k, v = torch.split(qkv, [num_heads_q, num_heads_k, num_heads_k], dim=2)
    else:
        raise ValueError(
            f"{op}: qkv has shape {tuple(qkv.shape)} and num_heads_q is {num_heads_q}, expected (B, S, 3, H, D), or "
            "(B, S, num_heads_q + 2 Hk, D) with num_heads_q"
        )
    _refuse(op, None, attention_chunk)
    check(op, q, k, v, fp8=True)
    out, lse = batch_attention(
        fit(q), fit(k), fit(v), **scores_of(q, softmax_scale, causal, window_size, softcap),
        q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, deterministic=deterministic,
    )  # fmt: skip
    return _result(k, v, out, lse, return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    s_aux: Tensor | None = None,
) -> Result:
    """Attention of sequences in one row, differentiable.

    q: (Tq, H, D). k: (Tk, Hk, D). v: (Tk, Hk, Dv).
    cu_seqlens_q, cu_seqlens_k: (B + 1) int32, where each sequence begins. max_seqlen_q, max_seqlen_k: at least the longest.
    seqused_q, seqused_k: (B) int32, how many of a sequence's tokens count, from its beginning.

    Returns out (Tq, H, Dv), with return_attn_probs also softmax_lse (H, Tq).
    """
    op = "fa3.flash_attn_varlen_func"
    _refuse(op, qv, attention_chunk)
    check(op, q, k, v, fp8=True)
    out, lse = varlen_attention(
        fit(q), fit(k), fit(v), cu_seqlens_q, cu_seqlens_k, length(max_seqlen_q, q.shape[0]),
        length(max_seqlen_k, k.shape[0]), seqused_q=seqused_q, seqused_k=seqused_k,
        **scores_of(q, softmax_scale, causal, window_size, softcap), sinks=s_aux, q_descale=q_descale,
        k_descale=k_descale, v_descale=v_descale, deterministic=deterministic,
    )  # fmt: skip
    return _result(k, v, out, lse, return_attn_probs)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention to a cache, to which new keys and values are appended first. No gradient, no fp8.

    q: (B, Sq, H, D), or with cu_seqlens_q and max_seqlen_q (T, H, D).
    k_cache, v_cache: (Bc, Sc, Hk, D), or with page_table (num_blocks, block_size, Hk, D), any block_size; changed in place
      where k and v are given.
    k, v: (B, Snew, Hk, D), or with cu_seqlens_k_new (Tnew, Hk, D).
    page_table: (B, max_blocks) int32. rotary_seqlens: (B) int32, the first position of the rotation if not cache_seqlens.
    The rest is as in `fastattn.flash_attn_with_kvcache`.

    Returns out like q, with return_softmax_lse also softmax_lse (B, H, Sq) or (H, T) and two empty tensors, in the places
    of FA3's partial results.
    """
    op = "fa3.flash_attn_with_kvcache"
    _refuse(op, qv, attention_chunk)
    if q.dtype == FP8 or any(scale is not None for scale in (q_descale, k_descale, v_descale)):
        not_implemented(op, f"q is {q.dtype}, expected fp16 or bf16 and no descale; flash_attn_varlen_func runs fp8")
    out, lse = cached_attention(
        op, q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad,
        page_table, softmax_scale, causal, window_size, softcap, rotary_interleaved, None, s_aux, cu_seqlens_q,
        cu_seqlens_k_new, max_seqlen_q, rotary_seqlens,
    )  # fmt: skip
    empty = lse.new_empty(0)
    return (out, lse, empty, empty.clone()) if return_softmax_lse else out


def flash_attn_combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over all keys out of attention over parts of them.

    out_partial: (splits, B, S, H, D) fp32. lse_partial: (splits, B, S, H) fp32; −inf for a part without keys.
    out: (B, S, H, D), to write to. out_dtype: of the result, fp32 if None.

    Returns out (B, S, H, D) and softmax_lse (B, S, H) fp32.
    """
    if out_partial.dtype != torch.float32 or lse_partial.dtype != torch.float32:
        name, t = ("out", out_partial) if out_partial.dtype != torch.float32 else ("lse", lse_partial)
        raise RuntimeError(
            f"fa3.flash_attn_combine: {name}_partial is {t.dtype}, expected torch.float32: "
            "Attention combine function only support fp32 data type"
        )
    if out_partial.dim() < 3 or lse_partial.shape != out_partial.shape[:-1]:
        raise ValueError(
            f"fa3.flash_attn_combine: lse_partial has shape {tuple(lse_partial.shape)}, expected (splits, B, S, H) from "
            f"out_partial {tuple(out_partial.shape)}"
        )
    lse = lse_partial.logsumexp(0)
    weights = (lse_partial - lse.masked_fill(lse == -torch.inf, 0.0)).exp().unsqueeze(-1)
    # A part without keys has no weight, and its rows may hold anything.
    merged = torch.where(weights > 0, weights * out_partial, 0.0).sum(0)
    merged = merged.to(out_dtype or (torch.float32 if out is None else out.dtype))
    return (merged if out is None else out.copy_(merged)), lse


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """An empty int32 tensor on cache_seqlens' device: the kernels plan within each call, so there is nothing to keep."""
    return torch.empty(0, dtype=torch.int32, device=cache_seqlens.device)


def _refuse(op: str, qv: Tensor | None, attention_chunk: int) -> None:
    if qv is not None:
        not_implemented(op, "qv is given, expected None: scores of two parts are not supported")
    if attention_chunk != 0:
        not_implemented(op, f"attention_chunk is {attention_chunk}, expected 0: use window_size for local attention")


def _result(k: Tensor, v: Tensor, out: Tensor, lse: Tensor, return_attn_probs: bool) -> Result:
    out = cut(out, v.shape[-1])
    if not return_attn_probs:
        return out
    return out, (lse if k.shape[-3] > 0 else torch.full_like(lse, torch.inf))
