"""What the attention operators ask of their arguments beyond dtypes and shapes of each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from fastattn.ops._kv_cache import cache_args, scale_args
from fastattn.ops._library import HOW_TO_BUILD, has_cuda_kernel
from fastattn.ops.checks import (
    FLOAT,
    FLOAT_OR_FP8,
    FP8,
    FP32,
    INT32,
    INT64,
    LOGITS,
    MAX_HEAD_DIM,
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
from fastattn.reference.attention_scores import MAX_TREE_TOKENS

KERNELS = {"auto": 0, "sm80": 80, "sm90": 90}

_SCALARS = (
    NonNegative("softmax_scale"),
    Flag("causal"),
    AtLeast("window_left", -1),
    AtLeast("window_right", -1),
    NonNegative("softcap"),
)
_OFFSETS = (TensorArg("cu_seqlens_q", "B+1", INT32), TensorArg("cu_seqlens_k", "B+1", INT32))
_USED = (TensorArg("seqused_q", "B", INT32, optional=True), TensorArg("seqused_k", "B", INT32, optional=True))
_LONGEST = (AtLeast("max_seqlen_q", 0), AtLeast("max_seqlen_k", 0))
_SLOPES = TensorArg("alibi_slopes", "[B] H", FP32, optional=True)
_SINKS = TensorArg("sinks", "H", LOGITS, optional=True, grad=True)
_DESCALES = tuple(
    TensorArg(f"{name}_descale", "B Hk", FP32, optional=True, any_strides=True) for name in ("q", "k", "v")
)
_DETERMINISTIC = Flag("deterministic")

check_paged_attention = compile_check(
    "paged_attention",
    TensorArg("q", "T H D", FLOAT),
    *cache_args(mutated=False),
    TensorArg("cu_seqlens_q", "B+1", INT32),
    TensorArg("seqused_k", "B", INT32),
    TensorArg("block_table", "B max_blocks", INT32),
    _SLOPES,
    TensorArg("sinks", "H", LOGITS, optional=True),
    *scale_args(mutated=False),
    TensorArg("tree_mask", "T", INT64, optional=True),
    TensorArg("out_scale", "S", FP32, optional=True),
    TensorArg("out", "like q", FLOAT_OR_FP8, optional=True, mutated=True),
    AtLeast("max_seqlen_q", 0),
    *_SCALARS,
    Flag("batch_invariant"),
)
check_batch_attention = compile_check(
    "batch_attention",
    TensorArg("q", "B Sq H D", FLOAT_OR_FP8, grad=True),
    TensorArg("k", "B Sk Hk D", "q", grad=True),
    TensorArg("v", "B Sk Hk Dv", "q", grad=True),
    _SLOPES,
    _SINKS,
    *_DESCALES,
    *_SCALARS,
    _DETERMINISTIC,
)
check_varlen_attention = compile_check(
    "varlen_attention",
    TensorArg("q", "T H D", FLOAT_OR_FP8, grad=True),
    TensorArg("k", "Tk Hk D", "q", grad=True),
    TensorArg("v", "Tk Hk Dv", "q", grad=True),
    *_OFFSETS,
    *_USED,
    _SLOPES,
    _SINKS,
    *_DESCALES,
    *_LONGEST,
    *_SCALARS,
    _DETERMINISTIC,
)
check_batch_attention_backward = compile_check(
    "batch_attention_backward",
    TensorArg("q", "B Sq H D", FLOAT),
    TensorArg("k", "B Sk Hk D", "q"),
    TensorArg("v", "B Sk Hk Dv", "q"),
    TensorArg("dout", "B Sq H Dv", "q"),
    TensorArg("out", "like dout", "q"),
    TensorArg("lse", "B H Sq", FP32),
    TensorArg("dlse", "like lse", FP32, optional=True),
    _SLOPES,
    *_SCALARS,
    _DETERMINISTIC,
)
check_varlen_attention_backward = compile_check(
    "varlen_attention_backward",
    TensorArg("q", "T H D", FLOAT),
    TensorArg("k", "Tk Hk D", "q"),
    TensorArg("v", "Tk Hk Dv", "q"),
    TensorArg("dout", "T H Dv", "q"),
    TensorArg("out", "like dout", "q"),
    TensorArg("lse", "H T", FP32),
    TensorArg("dlse", "like lse", FP32, optional=True),
    *_OFFSETS,
    *_USED,
    _SLOPES,
    *_LONGEST,
    *_SCALARS,
    _DETERMINISTIC,
)


def window(op: str, window_size: object) -> tuple[int, int]:
    if isinstance(window_size, list | tuple) and len(window_size) == 2:
        return window_size[0], window_size[1]
    fail_type(op, f"window_size is {window_size!r}, expected (left, right)")


def check_kernel(op: str, q: Tensor, scale: float, kernel: str) -> None:
    if kernel not in KERNELS:
        fail_value(op, f"kernel is {kernel!r}, expected one of {', '.join(map(repr, KERNELS))}")
    if kernel == "sm90" and q.is_cuda and (scale == 0 or torch.cuda.get_device_capability(q.device) != (9, 0)):
        capability = ".".join(map(str, torch.cuda.get_device_capability(q.device)))
        fail_value(
            op,
            f"kernel is 'sm90', expected 'sm80' for a GPU of capability {capability} and softmax_scale {scale}",
        )


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under torch.autocast in its dtype, as torch's own attention does it; fp64 and fp8 stay."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "meta"
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in FLOAT.cpu else t for t in tensors)


def default_scale(op: str, q: Tensor, num_dims: int = 3) -> float:
    """1/√D; called before the checks, so that they see every scalar."""
    if not isinstance(q, Tensor):
        fail_type(op, f"q is a {type(q).__name__}, expected a torch.Tensor")
    if q.dim() != num_dims:
        wanted = "(T, H, D)" if num_dims == 3 else "(B, Sq, H, D)"
        fail_value(op, f"q has {q.dim()} dimensions, shape {tuple(q.shape)}, expected {num_dims}: {wanted}")
    return float(max(q.shape[-1], 1) ** -0.5)


def is_deterministic(asked: bool) -> bool:
    return asked or torch.are_deterministic_algorithms_enabled()


def check_heads(op: str, q: Tensor, name: str, k: Tensor, v: Tensor | None = None) -> None:
    """Head dims of q and v, and that k's heads divide q's. v: None if its shape is k's."""
    (num_heads, head_dim), num_kv_heads = q.shape[-2:], k.shape[-2]
    step = 16 if q.dtype is FP8 else 8
    if head_dim % step != 0 or not step <= head_dim <= MAX_HEAD_DIM:
        wanted = "(T, H, D)" if q.dim() == 3 else "(B, Sq, H, D)"
        _fail_head_dim(op, "q", q, f"{wanted} with D", step)
    if v is not None and (v.shape[-1] % step != 0 or not step <= v.shape[-1] <= MAX_HEAD_DIM):
        wanted = "(Tk, Hk, Dv)" if q.dim() == 3 else "(B, Sk, Hk, Dv)"
        _fail_head_dim(op, "v", v, f"{wanted} with Dv", step)
    if num_kv_heads == 0 or num_heads % num_kv_heads != 0:
        fail_value(
            op,
            f"{name} has shape {tuple(k.shape)} with Hk = {num_kv_heads}, expected Hk ≥ 1 that divides H = {num_heads} "
            f"from q {tuple(q.shape)}",
        )


def _fail_head_dim(op: str, name: str, t: Tensor, wanted: str, step: int) -> None:
    fail_value(
        op,
        f"{name} has shape {tuple(t.shape)}, expected {wanted} a multiple of {step} from {step} to {MAX_HEAD_DIM}"
        f"{' in fp8' if t.dtype is FP8 else ''}",
    )


def check_descales(op: str, q: Tensor, **descales: Tensor | None) -> None:
    for name, descale in descales.items():
        if descale is not None and q.dtype is not FP8:
            fail_value(op, f"{name} is given and q is {q.dtype}, expected {name} only with {FP8}")


def check_gradient(op: str, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    """That what this call asks of automatic differentiation is there."""
    for name, t in (("q", q), ("k", k), ("v", v), ("sinks", sinks)):
        if t is None:
            continue
        tangent = unpack_dual(t).tangent  # type: ignore[no-untyped-call]
        if tangent is not None:  # torch would go on with one of zero
            fail_value(op, f"{name} has a tangent, expected none: {op} has no forward mode (jvp)")
        if not t.requires_grad or not torch.is_grad_enabled():
            continue
        if q.dtype is FP8:
            fail_value(op, f"{name} requires grad and q is {q.dtype}, expected no grad: fp8 attention has no backward")
        if t.is_cuda and not has_cuda_kernel(f"{op}_backward"):
            raise RuntimeError(
                f"{op}: {name} requires grad and is on {t.device}, but no CUDA kernel of its backward is loaded; "
                f"{HOW_TO_BUILD}"
            )


def _check_longest(op: str, name: str, offsets: list[int], longest: int) -> None:
    for b in range(len(offsets) - 1):
        if offsets[b + 1] - offsets[b] > longest:
            fail_value(
                op,
                f"max_seqlen_{name} is {longest}, expected at least {offsets[b + 1] - offsets[b]}, as sequence {b} has",
            )


def check_queries(op: str, q: Tensor, offsets: list[int], longest: int) -> None:
    check_offsets(op, "cu_seqlens_q", offsets)
    if offsets[-1] != q.shape[0]:
        fail_value(op, f"cu_seqlens_q[-1] is {offsets[-1]}, expected T = {q.shape[0]} from q {tuple(q.shape)}")
    _check_longest(op, "q", offsets, longest)


def _check_keys(op: str, k: Tensor, offsets: list[int], longest: int) -> None:
    check_offsets(op, "cu_seqlens_k", offsets)
    if offsets[-1] > k.shape[0]:
        fail_value(
            op,
            f"cu_seqlens_k[-1] is {offsets[-1]}, expected at most Tk = {k.shape[0]} from k {tuple(k.shape)}",
        )
    _check_longest(op, "k", offsets, longest)


def _check_used(op: str, name: str, used: Tensor | None, offsets: list[int]) -> None:
    """No sequence uses more tokens than it has."""
    for b, count in enumerate([] if used is None else used.tolist()):
        if not 0 <= count <= offsets[b + 1] - offsets[b]:
            fail_value(
                op,
                f"seqused_{name}[{b}] is {count}, expected 0 ≤ seqused_{name} ≤ {offsets[b + 1] - offsets[b]}, the length "
                f"of sequence {b} by cu_seqlens_{name}",
            )


def check_sequences(
    op: str,
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
) -> None:
    if not values_readable(cu_seqlens_q):
        return
    starts, key_starts = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    check_queries(op, q, starts, max_seqlen_q)
    _check_keys(op, k, key_starts, max_seqlen_k)
    _check_used(op, "q", seqused_q, starts)
    _check_used(op, "k", seqused_k, key_starts)


def check_out(op: str, q: Tensor, out: Tensor | None, out_scale: Tensor | None) -> None:
    """Whether out is in 8 bits, which is what out_scale says, and that it is contiguous."""
    if out is not None:
        dtype, source = (q.dtype, "q") if out_scale is None else (FP8, "out_scale is given")
        if out.dtype is not dtype:
            fail_type(op, f"out is {out.dtype}, expected {dtype} as {source}")
        if not out.is_contiguous():
            fail_value(op, f"out has shape {tuple(out.shape)} and strides {out.stride()}, expected it contiguous")
    if out_scale is None:
        return
    if out_scale.shape[0] != 1:
        fail_value(op, f"out_scale has shape {tuple(out_scale.shape)}, expected (1,): one for all of out")
    if values_readable(out_scale) and not float(out_scale) > 0:
        fail_value(op, f"out_scale is {float(out_scale)}, expected it positive")


def check_trees(op: str, tree_mask: Tensor, offsets: list[int]) -> None:
    """Every query of a sequence that can be a tree sees itself and none behind it."""
    words = tree_mask.tolist()
    for b in range(len(offsets) - 1):
        start, end = offsets[b], offsets[b + 1]
        if end - start > MAX_TREE_TOKENS:
            continue
        for i, word in enumerate(words[start:end]):
            bits = word % 2**MAX_TREE_TOKENS
            if bits >> i != 1:
                fail_value(
                    op,
                    f"tree_mask[{start + i}] is {bits:#b}, expected bit {i} as the highest, as query {i} of sequence {b} "
                    "sees itself and none behind it",
                )


def check_pages(op: str, k_cache: Tensor, seqused_k: Tensor, block_table: Tensor) -> None:
    """Lengths fit the table, and used entries name blocks. Unused entries may hold anything."""
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
