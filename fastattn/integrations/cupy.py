"""Attention over CuPy arrays, and over any other arrays that speak DLPack: nothing is copied, neither in nor out.

A call runs on CuPy's current stream where an array is CuPy's, else on torch's current stream, of which the array's library
is told through `__dlpack__(stream=...)`. What a call returns is of the same kind as its first array. Arrays that a function
changes in place (the KV cache) are changed themselves. There is no gradient.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
import torch.utils.dlpack

from fastattn.integrations import flash_attn


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Any function of fastattn, with arrays where it takes tensors.

    function: for instance `fastattn.ops.varlen_attention`. args, kwargs: its arguments; what is not an array passes as it
      is.
    """
    values = [*args, *kwargs.values()]
    first = next((value for value in values if _is_array(value)), None)
    with ExitStack() as stack, torch.no_grad():
        if first is not None:
            for context in _stream_of(first):
                stack.enter_context(context)
        tensors = [_tensor(f"argument {i}", value) for i, value in enumerate(args)]
        result = function(*tensors, **{name: _tensor(name, value) for name, value in kwargs.items()})
        if first is None:
            return result
        if isinstance(result, tuple):
            return tuple(_array(part, first) for part in result)
        return _array(result, first)


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`fastattn.flash_attn_func` over arrays."""
    return call(
        flash_attn.flash_attn_func, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> Any:
    """`fastattn.flash_attn_varlen_func` over arrays."""
    return call(
        flash_attn.flash_attn_varlen_func, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs, block_table,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Any = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """`fastattn.flash_attn_with_kvcache` over arrays; k_cache and v_cache are changed in place, if there is a k."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)) if k is not None else ():
        if not getattr(getattr(cache, "flags", None), "writeable", True):
            raise ValueError(
                f"flash_attn_with_kvcache: {name} is read-only, expected an array that k can be written to"
            )
    return call(
        flash_attn.flash_attn_with_kvcache, q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens,
        cache_batch_idx, cache_leftpad, block_table, softmax_scale, causal, window_size, softcap, rotary_interleaved,
        alibi_slopes, num_splits, return_softmax_lse,
    )  # fmt: skip


def _is_array(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) and hasattr(value, "__dlpack__")


def _tensor(name: str, value: Any) -> Any:
    if not _is_array(value):
        return value
    strides = getattr(value, "strides", None)
    if isinstance(strides, tuple) and any(stride < 0 for stride in strides):  # torch ends the process
        raise ValueError(f"cupy.call: {name} has strides {strides}, in bytes, expected none below 0: copy it first")
    return torch.utils.dlpack.from_dlpack(value)


def _array(part: Any, first: Any) -> Any:
    """A tensor of a result as an array of the kind of `first`; what is none, such as None, as it is."""
    if not isinstance(part, torch.Tensor):
        return part
    back = _importer(first)
    try:
        return back(part)
    except (RuntimeError, TypeError, ValueError, BufferError) as error:
        raise TypeError(
            f"cupy.call: a result in {part.dtype} cannot be returned as an array of {_library(first)}: {error}"
        ) from error


def _library(array: Any) -> str:
    return type(array).__module__.partition(".")[0]


def _stream_of(array: Any) -> list[AbstractContextManager[Any]]:
    """What makes the stream that the array's library works on torch's current one."""
    if _library(array) != "cupy":
        return []
    pointer, device = sys.modules["cupy"].cuda.get_current_stream().ptr, array.device.id
    if pointer == 0:
        stream = torch.cuda.default_stream(device)
    else:
        stream = torch.cuda.ExternalStream(pointer, device)  # type: ignore[no-untyped-call]
    return [torch.cuda.device(device), torch.cuda.stream(stream)]


def _importer(array: Any) -> Callable[[torch.Tensor], Any]:
    """The `from_dlpack` of the array's library."""
    if hasattr(array, "__array_namespace__"):
        function: Callable[[torch.Tensor], Any] | None = array.__array_namespace__().from_dlpack
    else:
        function = getattr(sys.modules[_library(array)], "from_dlpack", None)
    if function is None:
        raise TypeError(f"cupy.call: a {type(array).__name__} cannot be returned: {_library(array)} has no from_dlpack")
    return function
