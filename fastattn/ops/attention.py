"""Attention over packed sequences, with the keys in pages or in a row."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops._library import define
from fastattn.ops.checks import (
    FLOAT,
    INT32,
    AtLeast,
    Flag,
    NonNegative,
    TensorArg,
    check_offsets,
    compile_check,
    fail_type,
    fail_value,
    min_max,
    values_readable,
)
from fastattn.reference import attention as reference

MAX_HEAD_DIM = 256
KERNELS = {"auto": 0, "sm80": 80, "sm90": 90}


def _fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


_paged_attention = define(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cu_seqlens_q, Tensor seqused_k, "
    "Tensor block_table, int max_seqlen_q, float softmax_scale, bool causal, int window_left, int window_right, "
    "float softcap) -> (Tensor, Tensor)",
    reference.paged_attention,
    _fake,
)
_batch_attention = define(
    "batch_attention(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal, int window_left, int window_right, "
    "float softcap, int kernel) -> (Tensor, Tensor)",
    reference.batch_attention,
    lambda q, *_: (q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)),
)
_varlen_attention = define(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, "
    "int max_seqlen_k, float softmax_scale, bool causal, int window_left, int window_right, float softcap, int kernel) "
    "-> (Tensor, Tensor)",
    reference.varlen_attention,
    _fake,
)

_SCALARS = (
    NonNegative("softmax_scale"),
    Flag("causal"),
    AtLeast("window_left", -1),
    AtLeast("window_right", -1),
    NonNegative("softcap"),
)
_check_paged_attention = compile_check(
    "paged_attention",
    TensorArg("q", "T H D", FLOAT),
    TensorArg("k_cache", "num_blocks block_size Hk D", "q"),
    TensorArg("v_cache", "like k_cache", "q"),
    TensorArg("cu_seqlens_q", "B+1", INT32),
    TensorArg("seqused_k", "B", INT32),
    TensorArg("block_table", "B max_blocks", INT32),
    AtLeast("max_seqlen_q", 0),
    *_SCALARS,
)
_check_batch_attention = compile_check(
    "batch_attention",
    TensorArg("q", "B Sq H D", FLOAT),
    TensorArg("k", "B Sk Hk D", "q"),
    TensorArg("v", "like k", "q"),
    *_SCALARS,
)
_check_varlen_attention = compile_check(
    "varlen_attention",
    TensorArg("q", "T H D", FLOAT),
    TensorArg("k", "Tk Hk D", "q"),
    TensorArg("v", "like k", "q"),
    TensorArg("cu_seqlens_q", "B+1", INT32),
    TensorArg("cu_seqlens_k", "B+1", INT32),
    AtLeast("max_seqlen_q", 0),
    AtLeast("max_seqlen_k", 0),
    *_SCALARS,
)


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
) -> tuple[Tensor, Tensor]:
    """Attention of packed queries to keys and values in pages (https://arxiv.org/abs/2309.06180).

    q: (T, H, D), bf16 or fp16, on the CPU also fp32; D a multiple of 8 up to 256, Hk divides H.
    k_cache, v_cache: (num_blocks, block_size, Hk, D), q's dtype, any block_size ≥ 1.
    cu_seqlens_q: (B + 1) int32, ascending from 0 to T: sequence b has the queries from cu_seqlens_q[b] up to
      cu_seqlens_q[b + 1].
    seqused_k: (B) int32, keys of each sequence. block_table: (B, max_blocks) int32, its pages; what lies past
      ceil(seqused_k / block_size) is never read.
    max_seqlen_q: at least the longest query run.
    softmax_scale: 1/√D if None. causal: aligned bottom-right, the last query stands at the last key.
    window_size: how many keys to the left and to the right a query sees besides its own, -1 is open.
    softcap: `softcap * tanh(score / softcap)`, 0 is off.

    Returns out (T, H, D) in q's dtype and lse (H, T) fp32, natural logarithm; a row that sees no key gives 0 and -inf.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    Values in the int32 tensors are checked on the CPU, and on the GPU only with FASTATTN_VALIDATE_INPUTS=1.
    """
    left, right = _window("paged_attention", window_size)
    scale = _scale("paged_attention", q) if softmax_scale is None else softmax_scale
    _check_paged_attention(
        q, k_cache, v_cache, cu_seqlens_q, seqused_k, block_table, max_seqlen_q, scale, causal, left, right, softcap
    )
    _check_heads("paged_attention", q, "k_cache", k_cache)
    if k_cache.shape[1] == 0:
        fail_value("paged_attention", f"k_cache has shape {tuple(k_cache.shape)}, expected block_size ≥ 1")
    if values_readable(cu_seqlens_q):
        _check_queries("paged_attention", q, cu_seqlens_q.tolist(), max_seqlen_q)
        _check_pages(k_cache, seqused_k, block_table)
    out, lse = _paged_attention(
        q, k_cache, v_cache, cu_seqlens_q, seqused_k, block_table, max_seqlen_q, scale, causal, left, right, softcap
    )
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
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of a batch of queries to a batch of keys and values.

    q: (B, Sq, H, D), bf16 or fp16, on the CPU also fp32; D a multiple of 8 up to 256, Hk divides H.
    k, v: (B, Sk, Hk, D), q's dtype. Of each, only the last dimension must be contiguous.
    The rest is as in `varlen_attention`.

    Returns out (B, Sq, H, D) in q's dtype and lse (B, H, Sq) fp32, natural logarithm; a row that sees no key gives 0 and
    -inf.
    """
    left, right = _window("batch_attention", window_size)
    scale = _scale("batch_attention", q, 4) if softmax_scale is None else softmax_scale
    _check_kernel("batch_attention", q, scale, kernel)
    _check_batch_attention(q, k, v, scale, causal, left, right, softcap)
    _check_heads("batch_attention", q, "k", k)
    out, lse = _batch_attention(q, k, v, scale, causal, left, right, softcap, KERNELS[kernel])
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
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of packed queries to packed keys and values.

    k, v: (Tk, Hk, D), q's dtype. cu_seqlens_k: (B + 1) int32, ascending from 0 to at most Tk; what lies past its end
    has no effect. max_seqlen_k: at least the longest key run. The rest, and the results, are as in `paged_attention`.
    kernel: "sm80" or "sm90" to have that one on a GPU, which must be able to run it; "sm90" wants softmax_scale > 0.
    """
    left, right = _window("varlen_attention", window_size)
    scale = _scale("varlen_attention", q) if softmax_scale is None else softmax_scale
    _check_kernel("varlen_attention", q, scale, kernel)
    _check_varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, left, right, softcap
    )
    _check_heads("varlen_attention", q, "k", k)
    if values_readable(cu_seqlens_q):
        _check_queries("varlen_attention", q, cu_seqlens_q.tolist(), max_seqlen_q)
        _check_keys(k, cu_seqlens_k.tolist(), max_seqlen_k)
    out, lse = _varlen_attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale,
        causal,
        left,
        right,
        softcap,
        KERNELS[kernel],
    )
    return out, lse


def _window(op: str, window_size: object) -> tuple[int, int]:
    if isinstance(window_size, list | tuple) and len(window_size) == 2:
        return window_size[0], window_size[1]
    fail_type(op, f"window_size is {window_size!r}, expected (left, right)")


def _check_kernel(op: str, q: Tensor, scale: float, kernel: str) -> None:
    if kernel not in KERNELS:
        fail_value(op, f"kernel is {kernel!r}, expected one of {', '.join(map(repr, KERNELS))}")
    if kernel == "sm90" and q.is_cuda and (scale == 0 or torch.cuda.get_device_capability(q.device) != (9, 0)):
        capability = ".".join(map(str, torch.cuda.get_device_capability(q.device)))
        fail_value(
            op,
            f"kernel is 'sm90', expected 'sm80' for a GPU of capability {capability} and softmax_scale {scale}",
        )


def _scale(op: str, q: Tensor, num_dims: int = 3) -> float:
    """1/√D; called before the checks, so that they see every scalar."""
    if not isinstance(q, Tensor):
        fail_type(op, f"q is a {type(q).__name__}, expected a torch.Tensor")
    if q.dim() != num_dims:
        wanted = "(T, H, D)" if num_dims == 3 else "(B, Sq, H, D)"
        fail_value(op, f"q has {q.dim()} dimensions, shape {tuple(q.shape)}, expected {num_dims}: {wanted}")
    return float(max(q.shape[-1], 1) ** -0.5)


def _check_heads(op: str, q: Tensor, name: str, k: Tensor) -> None:
    (num_heads, head_dim), num_kv_heads = q.shape[-2:], k.shape[-2]
    if head_dim % 8 != 0 or not 8 <= head_dim <= MAX_HEAD_DIM:
        wanted = "(T, H, D)" if q.dim() == 3 else "(B, Sq, H, D)"
        fail_value(
            op, f"q has shape {tuple(q.shape)}, expected {wanted} with D a multiple of 8 from 8 to {MAX_HEAD_DIM}"
        )
    if num_kv_heads == 0 or num_heads % num_kv_heads != 0:
        fail_value(
            op,
            f"{name} has shape {tuple(k.shape)} with Hk = {num_kv_heads}, expected Hk ≥ 1 that divides H = {num_heads} "
            f"from q {tuple(q.shape)}",
        )


def _check_longest(op: str, name: str, offsets: list[int], longest: int) -> None:
    for b in range(len(offsets) - 1):
        if offsets[b + 1] - offsets[b] > longest:
            fail_value(
                op,
                f"max_seqlen_{name} is {longest}, expected at least {offsets[b + 1] - offsets[b]}, as sequence {b} has",
            )


def _check_queries(op: str, q: Tensor, offsets: list[int], longest: int) -> None:
    check_offsets(op, "cu_seqlens_q", offsets)
    if offsets[-1] != q.shape[0]:
        fail_value(op, f"cu_seqlens_q[-1] is {offsets[-1]}, expected T = {q.shape[0]} from q {tuple(q.shape)}")
    _check_longest(op, "q", offsets, longest)


def _check_keys(k: Tensor, offsets: list[int], longest: int) -> None:
    check_offsets("varlen_attention", "cu_seqlens_k", offsets)
    if offsets[-1] > k.shape[0]:
        fail_value(
            "varlen_attention",
            f"cu_seqlens_k[-1] is {offsets[-1]}, expected at most Tk = {k.shape[0]} from k {tuple(k.shape)}",
        )
    _check_longest("varlen_attention", "k", offsets, longest)


def _check_pages(k_cache: Tensor, seqused_k: Tensor, block_table: Tensor) -> None:
    """Lengths fit the table, and used entries name blocks. Unused entries may hold anything."""
    op = "paged_attention"
    num_blocks, block_size = k_cache.shape[:2]
    capacity = block_table.shape[1] * block_size
    lengths = seqused_k.tolist()
    for b, length in enumerate(lengths):
        if not 0 <= length <= capacity:
            fail_value(
                op,
                f"seqused_k[{b}] is {length}, expected 0 ≤ seqused_k ≤ {capacity}, max_blocks * block_size from "
                f"block_table {tuple(block_table.shape)} and k_cache {tuple(k_cache.shape)}",
            )
    if block_table.numel() == 0:
        return
    least, most = min_max(block_table)
    if least >= 0 and most < num_blocks:  # the whole table is fine, as it mostly is
        return
    for b, length in enumerate(lengths):
        for i, block in enumerate(block_table[b, : -(-length // block_size)].tolist()):
            if not 0 <= block < num_blocks:
                fail_value(
                    op,
                    f"block_table[{b}, {i}] is {block}, expected 0 ≤ block < {num_blocks}, num_blocks from k_cache "
                    f"{tuple(k_cache.shape)}",
                )
