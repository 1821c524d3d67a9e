"""Attention of a batch, over packed sequences, and over keys in pages."""

from __future__ import annotations

from torch import Tensor

from fastattn.ops import _attention as operators
from fastattn.ops._attention_checks import (
    KERNELS,
    autocast,
    check_batch_attention,
    check_descales,
    check_gradient,
    check_heads,
    check_kernel,
    check_out,
    check_paged_attention,
    check_pages,
    check_queries,
    check_sequences,
    check_trees,
    check_varlen_attention,
    default_scale,
    is_deterministic,
    window,
)
from fastattn.ops._kv_cache import check_cache
from fastattn.ops.checks import fail_value, values_readable


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    max_seqlen_q: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    tree_mask: Tensor | None = None,
    batch_invariant: bool = False,
    out_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of packed queries to keys and values in pages (https://arxiv.org/abs/2309.06180). It has no backward.

    q: (T, H, D), bf16 or fp16, on the CPU also fp32; D a multiple of 8 up to 256, Hk divides H.
    k_cache, v_cache: (num_blocks, block_size, Hk, D), any block_size ≥ 1; q's dtype, or float8_e4m3fn or int8 with D a
      multiple of 16, as `rope_kv_write` writes them.
    cu_seqlens_q: (B + 1) int32, ascending from 0 to T: sequence b has the queries from cu_seqlens_q[b] up to
      cu_seqlens_q[b + 1].
    seqused_k: (B) int32, keys of each sequence. block_table: (B, max_blocks) int32, its pages; what lies past
      ceil(seqused_k / block_size) is never used.
    max_seqlen_q: at least the longest query run.
    softmax_scale: 1/√D if None. causal: aligned bottom-right, the last query stands at the last key.
    window_size: how many keys to the left and to the right a query sees besides its own, -1 is open.
    softcap: `softcap * tanh(score / softcap)`, 0 is off.
    alibi_slopes: (H) or (B, H) fp32: `slope * |distance|` is subtracted from a score, after the softcap
      (https://arxiv.org/abs/2108.12409); the distance is to the key where the query stands.
    sinks: (H) bf16, fp16 or fp32: one more logit in the sum of each row's softmax, with no value
      (https://arxiv.org/abs/2309.17453, as in gpt-oss), neither scaled nor capped. The LSE includes it.
    k_scale, v_scale: fp32, what keys and values of 8 bits are multiplied by, positive: (Hk), or (num_blocks, block_size,
      Hk) for each token's, of any strides; those of pages whose tokens are neighbours in memory, as in
      `torch.empty(num_blocks, Hk, block_size).transpose(1, 2)`, are read fastest. Ones if None, which int8 may not be.
      On Hopper queries of 64 tokens and more (batch_invariant: of more than 32 · Hk / H) are fp16 beside such a cache: from
      2²⁰ on they are infinite.
    tree_mask: (T) int64, with causal: the queries of a sequence, whose keys are its last ones, are the nodes of a tree, as
      of guesses to verify (https://arxiv.org/abs/2305.09781). Bit j of a query's word says whether it sees its sequence's
      j-th query: its ancestors and itself do, which its highest bit is; all keys before the queries it sees. A word of
      bits 0 … i is query i's of a chain. Windows and ALiBi count distances along the tree's paths. A sequence of more
      than 64 queries is a chain, and its words may be anything.
    batch_invariant: a sequence's results are the same bits whatever else is in the batch, in which order, and wherever its
      pages lie. On the same GPU, of the same queries and keys, dtypes, strides of a page and options; not whether the
      queries come in one call or in several, for which docs/design/paged_decode.md has what holds. It takes more
      time where sequences are few.
    out_scale: (1) fp32, positive: out is float8_e4m3fn, of the fp32 results divided by it, rounded once, ties to even; beyond
      ±448 it is ±448. With it, `fp8_linear(out.flatten(1), out_scale, …)` is the projection behind attention.
    out: (T, H, D) in q's dtype, with out_scale float8_e4m3fn, contiguous, sharing no memory with q: written, and returned,
      instead of fresh memory.

    Returns out (T, H, D) in q's dtype or, with out_scale, float8_e4m3fn, and lse (H, T) fp32, natural logarithm; a row that
    sees no key gives 0 and -inf, or its sink.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    Values in the int32 tensors are checked on the CPU, and on the GPU only with FASTATTN_VALIDATE_INPUTS=1.
    """
    op = "paged_attention"
    left, right = window(op, window_size)
    scale = default_scale(op, q) if softmax_scale is None else softmax_scale
    check_paged_attention(
        q, k_cache, v_cache, cu_seqlens_q, seqused_k, block_table, alibi_slopes, sinks, k_scale, v_scale, tree_mask,
        out_scale, out, max_seqlen_q, scale, causal, left, right, softcap, batch_invariant,
    )  # fmt: skip
    check_heads(op, q, "k_cache", k_cache)
    check_cache(op, q, k_cache, k_scale, v_scale)
    if k_cache.shape[1] == 0:
        fail_value(op, f"k_cache has shape {tuple(k_cache.shape)}, expected block_size ≥ 1")
    check_out(op, q, out, out_scale)
    if tree_mask is not None and not causal:
        fail_value(op, "causal is False and tree_mask is given, expected causal=True with a tree_mask")
    if values_readable(cu_seqlens_q):
        starts = cu_seqlens_q.tolist()
        check_queries(op, q, starts, max_seqlen_q)
        check_pages(op, k_cache, seqused_k, block_table)
        if tree_mask is not None:
            check_trees(op, tree_mask, starts)
    call = (
        q, k_cache, v_cache, cu_seqlens_q, seqused_k, block_table, alibi_slopes,
        None if sinks is None else sinks.float(), k_scale, v_scale, tree_mask, out_scale,
        max_seqlen_q, scale, causal, left, right, softcap, batch_invariant,
    )  # fmt: skip
    if out is not None:
        return out, operators.paged_attention_out(out, *call)
    out, lse = operators.paged_attention(*call)
    return out, lse


def batch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    deterministic: bool = False,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of a batch of queries to a batch of keys and values.

    q: (B, Sq, H, D). k: (B, Sk, Hk, D). v: (B, Sk, Hk, Dv), q's dtype. Of each, only the last dimension must be contiguous.
    The rest, autograd and autocast too, is as in `varlen_attention`.

    Returns out (B, Sq, H, Dv) in q's dtype (bf16 from fp8) and lse (B, H, Sq) fp32, natural logarithm; a row that sees no
    key gives 0 and -inf, or its sink.
    """
    op = "batch_attention"
    left, right = window(op, window_size)
    q, k, v = autocast(q, k, v)
    scale = default_scale(op, q, 4) if softmax_scale is None else softmax_scale
    check_kernel(op, q, scale, kernel)
    check_batch_attention(
        q, k, v, alibi_slopes, sinks, q_descale, k_descale, v_descale,
        scale, causal, left, right, softcap, deterministic,
    )  # fmt: skip
    check_heads(op, q, "k", k, v)
    check_descales(op, q, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    check_gradient(op, q, k, v, sinks)
    sinks = None if sinks is None else sinks.float()
    out, lse = operators.batch_attention(
        q, k, v, alibi_slopes, sinks, q_descale, k_descale, v_descale,
        scale, causal, left, right, softcap, is_deterministic(deterministic), KERNELS[kernel],
    )  # fmt: skip
    return out, lse


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    deterministic: bool = False,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of packed queries to packed keys and values.

    q: (T, H, D). k: (Tk, Hk, D). v: (Tk, Hk, Dv), q's dtype; D and Dv multiples of 8 up to 256. fp8 (e4m3) besides the
      dtypes of `paged_attention`, D and Dv then multiples of 16.
    cu_seqlens_k: (B + 1) int32, ascending from 0 to at most Tk; what lies past its end has no effect.
    max_seqlen_q, max_seqlen_k: at least the longest run by cu_seqlens.
    seqused_q, seqused_k: (B) int32: only the first so many queries and keys of a sequence count, and are what masks are
      aligned to. A query behind them gives 0 and -inf; a key behind them has no effect, whatever it holds.
    alibi_slopes, sinks, scale, mask and softcap: as in `paged_attention`; H slopes, or H for each of B sequences.
    q_descale, k_descale, v_descale: (B, Hk) fp32, any strides, with fp8 only; what a KV head's values (its query heads'
      for q) are multiplied by, 1 if None.
    deterministic: two runs of the backward give the same bits, as those of the forward always do; so it is also under
      torch.use_deterministic_algorithms.
    kernel: "sm80" or "sm90" to have that one on a GPU, which must be able to run it; "sm90" wants softmax_scale > 0.

    Returns out (T, H, Dv) in q's dtype (bf16 from fp8) and lse (H, T) fp32, natural logarithm; a row that sees no key
    gives 0 and -inf, or its sink.
    Autograd: out and lse are differentiable in q, k, v and sinks, once (no second derivative, no forward mode); fp8 has no
    backward. Of torch.func, vmap works, one call after the other; grad and what is made of it does not.
    Under torch.autocast q, k and v are cast to its dtype first, as torch's own attention does it.
    Raises as `paged_attention` does, and RuntimeError on a GPU for whose kernels no backward was built.
    """
    op = "varlen_attention"
    left, right = window(op, window_size)
    q, k, v = autocast(q, k, v)
    scale = default_scale(op, q) if softmax_scale is None else softmax_scale
    check_kernel(op, q, scale, kernel)
    check_varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, alibi_slopes, sinks, q_descale, k_descale, v_descale,
        max_seqlen_q, max_seqlen_k, scale, causal, left, right, softcap, deterministic,
    )  # fmt: skip
    check_heads(op, q, "k", k, v)
    check_descales(op, q, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    check_gradient(op, q, k, v, sinks)
    check_sequences(op, q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k)
    sinks = None if sinks is None else sinks.float()
    out, lse = operators.varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, alibi_slopes, sinks, q_descale, k_descale, v_descale,
        max_seqlen_q, max_seqlen_k, scale, causal, left, right, softcap, is_deterministic(deterministic), KERNELS[kernel],
    )  # fmt: skip
    return out, lse
