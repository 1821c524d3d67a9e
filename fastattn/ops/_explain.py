"""The slow path of a check: find what is wrong and say it.

The order is type → dims → device → dtype → shape → stride → grad → range.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastattn.ops._args import (
    MAX_LEADING_DIMS,
    Arg,
    AtLeast,
    Flag,
    NonNegative,
    TensorArg,
    fail_type,
    fail_value,
    overlaps,
    split_dim,
)
from fastattn.ops._library import HOW_TO_BUILD, has_cuda_kernel


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def _pattern(arg: TensorArg) -> str:
    dims = [d.replace("+", " + ") for d in arg.dims]
    return f"({dims[0]},)" if len(dims) == 1 else f"({', '.join(dims)})"


def _check_shapes(op: str, given: list[tuple[TensorArg, Tensor]]) -> None:
    sizes: dict[str, tuple[int, TensorArg, Tensor]] = {}  # symbol → its value and where it comes from
    tensors = {arg.name: t for arg, t in given}
    for arg, t in given:
        if arg.like is not None:
            if t.shape != tensors[arg.like].shape:
                expected = _shape(tensors[arg.like])
                fail_value(op, f"{arg.name} has shape {_shape(t)}, expected {expected}, the shape of {arg.like}")
            continue
        named = [(split_dim(d), n) for d, n in zip(reversed(arg.dims), reversed(t.shape), strict=False) if d != "..."]
        for (symbol, factor, addend), size in reversed(named):
            known = sizes.get(symbol)
            if known is not None and known[0] * factor + addend != size:
                _fail_shape(op, arg, t, sizes)
            if known is None:
                if size % factor != 0 or size < addend:
                    reason = "an even last dimension" if factor == 2 else f"at least {addend} elements"
                    fail_value(op, f"{arg.name} has shape {_shape(t)}, expected {_pattern(arg)}: {reason}")
                sizes[symbol] = ((size - addend) // factor, arg, t)


def _fail_shape(op: str, arg: TensorArg, t: Tensor, sizes: dict[str, tuple[int, TensorArg, Tensor]]) -> NoReturn:
    sources: dict[str, list[str]] = {}
    for dim in arg.dims:
        symbol = split_dim(dim)[0] if dim != "..." else dim
        if symbol in sizes and sizes[symbol][1] is not arg:
            value, source, tensor = sizes[symbol]
            sources.setdefault(f"{source.name} {_shape(tensor)}", []).append(f"{symbol} = {value}")
    origin = " and ".join(f"{', '.join(dict.fromkeys(values))} from {source}" for source, values in sources.items())
    fail_value(op, f"{arg.name} has shape {_shape(t)}, expected {_pattern(arg)} with {origin}")


def _is_int(value: object) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, int | float | torch.SymInt | torch.SymFloat) and not isinstance(value, bool)


def _check_scalar_type(op: str, arg: Arg, value: object) -> None:
    kind = type(value).__name__
    if isinstance(arg, NonNegative) and not _is_real(value):
        fail_type(op, f"{arg.name} is {value!r}, a {kind}, expected a number")
    if isinstance(arg, AtLeast) and not _is_int(value):
        fail_type(op, f"{arg.name} is {value!r}, a {kind}, expected an int")
    if isinstance(arg, Flag) and not isinstance(value, bool):
        fail_type(op, f"{arg.name} is {value!r}, a {kind}, expected True or False")


def _check_scalar_range(op: str, arg: Arg, value: Any) -> None:
    if isinstance(arg, NonNegative) and not 0 <= value < math.inf:
        fail_value(op, f"{arg.name} is {value}, expected a finite number ≥ 0")
    if isinstance(arg, AtLeast) and not arg.minimum <= value < 2**31:
        fail_value(op, f"{arg.name} is {value}, expected {arg.minimum} ≤ {arg.name} < 2³¹")


def _check_dims(op: str, arg: TensorArg, t: Tensor, tensors: dict[str, Tensor]) -> None:
    least = most = tensors[arg.like].dim() if arg.like is not None else len(arg.dims)
    if arg.leading:
        least, most = 1, MAX_LEADING_DIMS
    if arg.may_lack_first:
        least -= 1
    if not least <= t.dim() <= most:
        allowed = f"{least} to {most} dimensions" if least < most else str(least)
        shape = _shape(tensors[arg.like]) if arg.like is not None else _pattern(arg)
        fail_value(op, f"{arg.name} has {t.dim()} dimensions, shape {_shape(t)}, expected {allowed}: {shape}")


def _check_device(op: str, kernel: str, arg: TensorArg, t: Tensor, first_arg: TensorArg, first: Tensor) -> None:
    if t.layout is not torch.strided:
        fail_value(op, f"{arg.name} has layout {t.layout}, expected torch.strided")
    if t.device.type not in ("cpu", "cuda"):
        fail_value(op, f"{arg.name} is on {t.device}, expected cpu or cuda")
    if t.device != first.device:
        fail_value(op, f"{arg.name} is on {t.device}, expected {first.device} as {first_arg.name}")
    if t.is_cuda and not has_cuda_kernel(kernel):
        raise RuntimeError(f"{op}: {arg.name} is on {t.device}, but no CUDA kernel is loaded for it; {HOW_TO_BUILD}")


def _check_dtype(op: str, arg: TensorArg, t: Tensor, tensors: dict[str, Tensor]) -> None:
    if isinstance(arg.dtype, str):
        if t.dtype is not tensors[arg.dtype].dtype:
            fail_type(op, f"{arg.name} is {t.dtype}, expected {tensors[arg.dtype].dtype} as {arg.dtype}")
        return
    allowed = arg.dtype.cpu if t.is_cpu else arg.dtype.cuda
    if t.dtype not in allowed:
        fail_type(op, f"{arg.name} is {t.dtype}, expected {' or '.join(map(str, allowed))} on {t.device.type}")


def _check_strides(op: str, arg: TensorArg, t: Tensor) -> None:
    if not arg.any_strides and t.shape[-1] > 1 and t.stride(-1) != 1:
        fail_value(op, f"{arg.name} has strides {t.stride()}, expected a contiguous last dimension (stride 1)")
    if arg.mutated and overlaps(t):
        fail_value(op, f"{arg.name} has shape {_shape(t)} and strides {t.stride()}: it is written, expected no overlap")


def _differentiable(args: tuple[Arg, ...]) -> bool:
    return any(isinstance(arg, TensorArg) and arg.grad for arg in args)


def explain(op: str, kernel: str, args: tuple[Arg, ...], values: tuple[object, ...]) -> None:
    """Raise for the first thing that is wrong; return if nothing is."""
    given: list[tuple[TensorArg, Tensor]] = []
    for arg, value in zip(args, values, strict=True):
        if not isinstance(arg, TensorArg):
            _check_scalar_type(op, arg, value)
        elif isinstance(value, Tensor):
            given.append((arg, value))
        elif not (arg.optional and value is None):
            or_none = " or None" if arg.optional else ""
            fail_type(op, f"{arg.name} is a {type(value).__name__}, expected a torch.Tensor{or_none}")
    tensors = {arg.name: t for arg, t in given}
    for arg, t in given:
        _check_dims(op, arg, t, tensors)
    for arg, t in given:
        _check_device(op, kernel, arg, t, *given[0])
    for arg, t in given:
        _check_dtype(op, arg, t, tensors)
    _check_shapes(op, given)
    for arg, t in given:
        _check_strides(op, arg, t)
    for arg, t in given:
        if t.requires_grad and not arg.grad and torch.is_grad_enabled():
            way = (
                "has no backward for it; use .detach()"
                if _differentiable(args)
                else "has no backward; use torch.no_grad()"
            )
            fail_value(op, f"{arg.name} requires grad, expected no grad: {op} {way}")
    for arg, value in zip(args, values, strict=True):
        _check_scalar_range(op, arg, value)
