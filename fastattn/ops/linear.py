"""Dense layer."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fastattn.ops._library import define
from fastattn.ops.checks import FLOAT, Flag, TensorArg, compile_check, fail_value
from fastattn.reference import linear as reference


def sums_shape(rows: torch.Size) -> tuple[int, ...]:
    """Of rows (…, N) that of their sums of squares, (…, ⌈N / 32⌉)."""
    return (*rows[:-1], -(-rows[-1] // reference.SQUARES_PART))


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, batch_invariant: bool = False) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return _fake(x, weight, bias)


def _fake_add_sums(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
    out = _fake(x, weight, bias)
    return out, out.new_empty(sums_shape(out.shape), dtype=torch.float32)


_linear = define(
    "linear(Tensor x, Tensor weight, Tensor? bias, bool batch_invariant=False) -> Tensor", reference.linear, _fake
)

_linear_add = define(
    "linear_add(Tensor x, Tensor weight, Tensor? bias, Tensor residual) -> Tensor", reference.linear_add, _fake_add
)

_linear_add_sums = define(
    "linear_add_sums(Tensor x, Tensor weight, Tensor? bias, Tensor residual) -> (Tensor, Tensor)",
    reference.linear_add_sums,
    _fake_add_sums,
)

_X, _WEIGHT = TensorArg("x", "... K", FLOAT), TensorArg("weight", "N K", "x")
_BIAS = TensorArg("bias", "N", "x", optional=True)
_check_linear = compile_check("linear", _X, _WEIGHT, _BIAS, Flag("batch_invariant"))
_check_linear_add = compile_check(
    "linear", _X, _WEIGHT, _BIAS, TensorArg("residual", "... N", "x"), Flag("batch_invariant"), kernel="linear_add"
)


@overload
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    with_sums: Literal[False] = False,
    batch_invariant: bool = False,
) -> Tensor: ...
@overload
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor,
    with_sums: Literal[True],
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]: ...
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    with_sums: bool = False,
    batch_invariant: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`x @ weightᵀ + bias + residual`, accumulated in fp32, rounded once.

    With a residual, on Hopper one kernel (K and N multiples of 8, rows 16-byte aligned). Other calls, and other GPUs, take a
    second kernel that adds, in front of which the product is rounded.

    x: (…, K), 1 to 3 dimensions, bf16 or fp16, on the CPU also fp32; the last dimension contiguous.
    weight: (N, K), bias: (N), residual: (…, N), x's dtype.
    with_sums: also gives what a norm behind needs, for `rms_norm_linear(…, sums_of_squares=)`; only with a residual.
    batch_invariant: a row's result is the same bits whatever rows are beside it and however many: its sums are added up in the
      order of K, by one CTA; on the CPU, one row after the other. On the same GPU and with the same build. Not with a residual.

    Returns (…, N) in x's dtype, contiguous; with_sums also the sums of its squares, as rounded, over 32 columns each,
    (…, ⌈N / 32⌉) fp32, contiguous.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    if residual is None:
        if with_sums:
            fail_value(
                "linear", "with_sums is True and residual None, expected a residual: its sum's squares are added up"
            )
        _check_linear(x, weight, bias, batch_invariant)
        out: Tensor = _linear(x, weight, bias, batch_invariant)
        return out
    _check_linear_add(x, weight, bias, residual, batch_invariant)
    if x.shape[:-1] != residual.shape[:-1]:
        fail_value("linear", f"residual has shape {tuple(residual.shape)}, expected {(*x.shape[:-1], weight.shape[0])}")
    if batch_invariant:
        fail_value(
            "linear", "batch_invariant is True with a residual, expected False: how it is rounded depends on the rows"
        )
    if with_sums:
        both: tuple[Tensor, Tensor] = _linear_add_sums(x, weight, bias, residual)
        return both
    added: Tensor = _linear_add(x, weight, bias, residual)
    return added
