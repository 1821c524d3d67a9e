"""What a test needs to know about an operator, and the bad calls that follow from the roles of its arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.harness.generators import Gen, gapped

Call = dict[str, Any]  # argument name → value
# name, what differs from a valid call, the error, what it says
Bad = Iterator[tuple[str, Call, type[Exception], tuple[str, ...]]]
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class BadCall:
    name: str
    call: Call
    error: tuple[type[Exception], ...]
    says: tuple[str, ...]  # all of these are in the message


@dataclass(frozen=True)
class Role:
    """One tensor argument: what it holds, and which of its dimensions another argument or a rule fixes."""

    fixed: tuple[int, ...] = ()
    optional: bool = False
    grad: bool = False  # it may require grad
    layout: bool = True  # its strides are checked (the last dimension is longer than 1 in the base call)


@dataclass(frozen=True)
class OpSpec:
    name: str
    fn: Callable[..., Any]
    calls: Callable[[Gen, torch.dtype], Iterator[tuple[str, Call]]]  # valid calls, hostile sizes among them
    roles: dict[str, Role]
    formula: Callable[..., list[Tensor]] | None = None
    verify: Callable[[Call, list[Tensor]], None] | None = None  # instead of the formula, where many answers are right
    mutates: tuple[str, ...] = ()
    scalars: dict[str, str] = field(default_factory=dict)  # name → "nonnegative", "count", "size", "window" or "flag"
    bad: Callable[[Gen, Call], Bad] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALVES)
    cuda_dtypes: tuple[torch.dtype, ...] = HALVES
    noise: float = 0.0  # absolute error of fp32 sums whose exact value may be 0
    keeps_dtype: bool = True  # the first result has the dtype of the inputs

    def device_dtypes(self, device: str) -> tuple[torch.dtype, ...]:
        return self.cuda_dtypes if device == "cuda" else self.dtypes

    def run(self, call: Call) -> list[Tensor]:
        """The results, then the arguments that are changed."""
        out = self.fn(**call)
        results = [] if out is None else [out] if isinstance(out, Tensor) else list(out)
        return results + [call[name] for name in self.mutates]


def fresh(call: Call, transform: Callable[[Tensor], Tensor] = Tensor.clone) -> Call:
    """A copy of a call, for a run that changes its arguments. The copy keeps the strides."""
    return {k: transform(v) if isinstance(v, Tensor) else v for k, v in call.items()}


def to_device(call: Call, device: str) -> Call:
    return fresh(call, lambda t: t.to(device))


def with_gaps(call: Call) -> Call:
    """The same call with hostile strides."""
    return fresh(call, gapped)


_FOREIGN = (torch.float64, torch.int64, torch.int32, torch.float32, torch.int8, torch.bool, torch.complex64)
_NOT_TENSORS: tuple[Any, ...] = ([1.0], (), 3, 1.5, "x", {}, None, object())


def _tensor_cases(
    call: Call, name: str, role: Role, spec: OpSpec
) -> Iterator[tuple[str, Any, type[Exception], tuple[str, ...]]]:
    t = call[name]
    for value in _NOT_TENSORS:
        if value is not None or not role.optional:
            yield f"is {type(value).__name__}", value, TypeError, (name, type(value).__name__, "expected")
    for dtype in _FOREIGN:
        # a float argument alone may have any float dtype: then it is another that does not agree
        if dtype is not t.dtype and not (dtype.is_floating_point and t.is_floating_point() and dtype is torch.float32):
            yield f"{dtype}", t.to(dtype), TypeError, (name, str(dtype), "expected")
    yield "no dimensions", t.new_zeros(()), ValueError, (name, "0 dimensions", "expected")
    yield "4 more dimensions", t[None, None, None, None], ValueError, (name, f"{t.dim() + 4} dimensions", "expected")
    for dim in role.fixed:
        grown = torch.cat([t, t.narrow(dim, 0, 1)], dim)
        yield f"dimension {dim} grown", grown, ValueError, ("shape", "expected")
        yield f"dimension {dim} shrunk", t.narrow(dim, 0, t.shape[dim] - 1).clone(), ValueError, ("shape", "expected")
    if role.layout:
        stepped = torch.stack([t, t], -1)[..., 0]
        yield "every other element", stepped, ValueError, (name, "strides", "contiguous last dimension")
        yield "one element repeated", t[..., :1].expand(t.shape), ValueError, (name, "strides", "expected")
    if name in spec.mutates:
        yield (
            "rows share memory",
            t[:1].expand(2 * t.shape[0], *t.shape[1:])[: t.shape[0]],
            ValueError,
            (name, "overlap"),
        )
    yield "meta", t.to("meta"), ValueError, ("meta", "expected")
    if t.dtype is not torch.float8_e4m3fn:  # torch makes no sparse ones
        yield "sparse", t.to_sparse(), ValueError, (name, "sparse", "expected")
    if t.is_floating_point() and not role.grad:
        yield "requires grad", t.clone().requires_grad_(), ValueError, (name, "requires grad", "no backward")
        derived = t.clone().requires_grad_().view(t.shape)
        yield "derived from a leaf that requires grad", derived, ValueError, (name, "requires grad", "no backward")
    if t.is_cuda and len(spec.roles) > 1:  # alone it would be a valid call on the CPU
        yield "on the CPU", t.cpu(), ValueError, ("expected", "cpu")


_SCALAR_CASES: dict[str, tuple[tuple[Any, type[Exception]], ...]] = {
    "nonnegative": (
        (-1.0, ValueError),
        (-1e-30, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        (-math.inf, ValueError),
        (-1, ValueError),
        ("1", TypeError),
        (True, TypeError),
        ([1.0], TypeError),
        (1j, TypeError),
    ),
    "count": (
        (-1, ValueError),
        (2**31, ValueError),
        (1.0, TypeError),
        ("1", TypeError),
        (None, TypeError),
        (True, TypeError),
    ),
    "size": (
        (0, ValueError),
        (-1, ValueError),
        (2**31, ValueError),
        (16.0, TypeError),
        ("16", TypeError),
        (None, TypeError),
    ),
    "window": ((-2, ValueError), (2**31, ValueError), (1.5, TypeError), (None, TypeError), (False, TypeError)),
    "flag": ((1, TypeError), (0, TypeError), (None, TypeError), ("yes", TypeError), (1.0, TypeError)),
}


def bad_calls(spec: OpSpec, gen: Gen, dtype: torch.dtype) -> Iterator[BadCall]:
    """Every way to get one argument wrong in the first valid call."""
    base = next(iter(spec.calls(gen, dtype)))[1]

    def case(what: str, changed: Call, error: type[Exception], says: tuple[str, ...]) -> BadCall:
        return BadCall(what, fresh(base) | changed, (error,), (f"{spec.name}: ", *says))

    for name, role in spec.roles.items():
        for what, value, error, says in _tensor_cases(base, name, role, spec):
            yield case(f"{name}: {what}", {name: value}, error, says)
    for name, kind in spec.scalars.items():
        for value, error in _SCALAR_CASES[kind]:
            yield case(f"{name} = {value!r}", {name: value}, error, (name, str(value), "expected"))
    if spec.bad is not None:
        for what, changed, error, says in spec.bad(gen, base):
            yield case(what, changed, error, says)
