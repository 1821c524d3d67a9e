"""Declarative argument checks: symbolic sizes that must agree, one order, messages built from the actual values.

An operator states its arguments once::

    compile_check("rms_norm", TensorArg("x", "... N", FLOAT), TensorArg("weight", "N", "x"), NonNegative("eps"))

From that table `compile_check` writes a function of plain comparisons, a microsecond or two for a valid call, which
torch.compile can trace. Only when one of them fails does `explain` go through the table again and raise for the first
thing that is wrong, in the order type → dims → device → dtype → shape → stride → grad → range. `explain` has the last
word: a comparison may be too strict (an unusual stride), never too lax.

Shapes: `N` is a size that all arguments share, `2N` and `B+1` are sizes computed from one, `... N` has 1 to 3
dimensions, `[B] N` has one or two, `like x` is the shape of x. Dtypes: a set such as FLOAT, or the name of the argument
that has the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.config import validate_inputs
from fastattn.ops._args import (
    E4M3,
    FLOAT,
    FLOAT_OR_FP8,
    FP8,
    FP32,
    INT8,
    INT32,
    INT64,
    KV_CACHE,
    LOGITS,
    MAX_HEAD_DIM,
    MAX_LEADING_DIMS,
    UINT8,
    Arg,
    AtLeast,
    Dtypes,
    Flag,
    NonNegative,
    TensorArg,
    fail_type,
    fail_value,
    overlaps,
    split_dim,
)
from fastattn.ops._explain import explain
from fastattn.ops._library import has_cuda_kernel

__all__ = [
    "E4M3",
    "FLOAT",
    "FLOAT_OR_FP8",
    "FP8",
    "FP32",
    "INT8",
    "INT32",
    "INT64",
    "KV_CACHE",
    "LARGEST",
    "LOGITS",
    "MAX_HEAD_DIM",
    "UINT8",
    "AtLeast",
    "Flag",
    "NonNegative",
    "TensorArg",
    "check_numbers",
    "check_offsets",
    "check_range",
    "compile_check",
    "fail_type",
    "fail_value",
    "min_max",
    "values_readable",
]


def _tensor_conditions(arg: TensorArg, first: str, sizes: dict[str, str]) -> list[str]:
    """Python conditions that hold for a valid tensor; `sizes` maps each symbol to the expression that is its value."""
    n = arg.name
    out = [f"isinstance({n}, Tensor)", f"{n}.layout is strided"]
    if arg.like is not None:
        out.append(f"(shape_{n} := {n}.shape) == shape_{arg.like}")
    else:
        rank = f"len(shape_{n}) == {len(arg.dims)}"
        if arg.leading:
            rank = f"0 < len(shape_{n}) <= {MAX_LEADING_DIMS}"
        elif arg.may_lack_first:
            rank = f"{len(arg.dims) - 1} <= len(shape_{n}) <= {len(arg.dims)}"
        out += [f"(shape_{n} := {n}.shape) is not None", rank]
        for index, dim in enumerate(arg.dims):
            if dim == "...":
                continue
            symbol, factor, addend = split_dim(dim)
            if dim[0] == "[" and symbol not in sizes:
                raise ValueError(f"{n} is {arg.shape}: {symbol} is optional here, and must come from another argument")
            size = f"shape_{n}[{index - len(arg.dims) if arg.leading or arg.may_lack_first else index}]"
            if symbol in sizes:
                same = f"{size} == {sizes[symbol]} * {factor} + {addend}".replace(" * 1", "").replace(" + 0", "")
                lacks = f"len(shape_{n}) < {len(arg.dims)} or " if dim[0] == "[" else ""
                out.append(f"({lacks}{same})")
            else:
                sizes[symbol] = f"({size} - {addend}) // {factor}" if factor > 1 or addend else size
                out += [f"{size} % {factor} == 0"] * (factor > 1) + [f"{size} >= {addend}"] * (addend > 0)
    if n == first:
        out.append(f"((cpu := {n}.is_cpu) or (has_cuda and {n}.is_cuda)) and (device := {n}.device) is not None")
    else:
        out.append(f"{n}.device == device")
    if isinstance(arg.dtype, str):
        out.append(f"{n}.dtype is dtype_{arg.dtype}")
    else:
        out.append(f"(dtype_{n} := {n}.dtype) in (cpu_{n} if cpu else cuda_{n})")
    strides = f"({n}.stride(-1) == 1 and not overlaps({n}))" if arg.mutated else f"{n}.stride(-1) == 1"
    if not arg.any_strides:
        out.append(f"({n}.is_contiguous() or {strides})")
    elif arg.mutated:
        out.append(f"not overlaps({n})")
    return [f"({n} is None or ({' and '.join(out)}))"] if arg.optional else out


def _conditions(args: tuple[Arg, ...]) -> list[str]:
    tensors = [arg for arg in args if isinstance(arg, TensorArg)]
    sizes: dict[str, str] = {}
    out: list[str] = []
    for arg in tensors:
        out += _tensor_conditions(arg, tensors[0].name, sizes)
    for other in args:
        if isinstance(other, NonNegative):
            out.append(f"{other.name}.__class__ is float and 0.0 <= {other.name} < inf")
        elif isinstance(other, AtLeast):
            out.append(f"{other.name}.__class__ is int and {other.minimum} <= {other.name} < {2**31}")
        elif isinstance(other, Flag):
            out.append(f"({other.name} is True or {other.name} is False)")
    grads = " or ".join(
        f"({a.name} is not None and {a.name}.requires_grad)" if a.optional else f"{a.name}.requires_grad"
        for a in tensors
        if not a.grad
    )
    return [*out, f"not (is_grad_enabled() and ({grads}))"] if grads else out


def compile_check(op: str, *args: Arg, kernel: str | None = None) -> Callable[..., None]:
    """A function of these arguments, in order, that returns for a valid call of `op` and raises for any other.

    kernel: name of the torch operator that `op` calls, if it is another; it must be defined already.
    """
    kernel = kernel or op
    names = ", ".join(arg.name for arg in args)
    environment: dict[str, Any] = {
        "Tensor": Tensor,
        "strided": torch.strided,
        "inf": math.inf,
        "has_cuda": has_cuda_kernel(kernel),
        "is_grad_enabled": torch.is_grad_enabled,
        "overlaps": overlaps,
        "explain": lambda *values: explain(op, kernel, args, values),
    }
    for arg in args:
        if isinstance(arg, TensorArg) and isinstance(arg.dtype, Dtypes):
            environment |= {f"cpu_{arg.name}": arg.dtype.cpu, f"cuda_{arg.name}": arg.dtype.cuda}
    # As dataclasses do: the environment is a closure, so that each name is a fast local cell and torch.compile sees
    # no globals.
    source = (
        f"def make({', '.join(environment)}):\n"
        f" def check({names}):\n"
        f"  if {' and '.join(_conditions(args))}:\n"
        f"   return\n"
        f"  explain({names})\n"
        f" return check\n"
    )
    scope: dict[str, Any] = {}
    exec(compile(source, f"<check of {op}>", "exec"), {"__name__": __name__}, scope)  # noqa: S102
    check: Callable[..., None] = scope["make"](**environment)
    return check


def values_readable(t: Tensor) -> bool:
    """Whether to check the values in t: on the CPU always, on the GPU, where that waits for it, only on request."""
    if torch.compiler.is_compiling() or type(t) is not Tensor:  # a fake or functional tensor has no values
        return False
    return t.is_cpu or validate_inputs()


LARGEST = torch.finfo(torch.float32).max


def check_numbers(op: str, name: str, t: Tensor, low: float, high: float, allowed: str) -> None:
    """All of t (n), floats, is in low … high, which `allowed` says in words; a NaN is not."""
    for index, value in enumerate(t.tolist()):
        if not low <= value <= high:
            fail_value(op, f"{name}[{index}] is {value}, expected {allowed}")


def check_range(op: str, name: str, t: Tensor, low: int, high: int, meaning: str, source: Tensor) -> None:
    """All of t (n) is in low … high, where high is `meaning` of `source`."""
    if t.numel() == 0:
        return
    least, most = min_max(t)
    if least < low or most > high:
        index, value = next((i, v) for i, v in enumerate(t.tolist()) if not low <= v <= high)
        fail_value(op, f"{name}[{index}] is {value}, expected {low} ≤ {name} ≤ {high}, {meaning} {tuple(source.shape)}")


def min_max(t: Tensor) -> tuple[int, int]:
    if t.dim() == 1 and t.shape[0] <= 64:  # a short list is faster without torch
        values = t.tolist()
        return min(values), max(values)
    least, most = t.aminmax()
    return int(least), int(most)


def check_offsets(op: str, name: str, offsets: list[int]) -> None:
    """Offsets start at 0 and never descend."""
    if offsets[0] != 0:
        fail_value(op, f"{name}[0] is {offsets[0]}, expected 0")
    for i in range(1, len(offsets)):
        if offsets[i] < offsets[i - 1]:
            fail_value(op, f"{name}[{i}] is {offsets[i]}, expected {name}[{i}] ≥ {name}[{i - 1}] = {offsets[i - 1]}")
