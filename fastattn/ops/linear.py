"""Dense layer."""

from __future__ import annotations

from torch import Tensor

from fastattn.ops._library import define
from fastattn.ops.checks import FLOAT, Flag, TensorArg, compile_check, fail_value
from fastattn.reference import linear as reference


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, batch_invariant: bool = False) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return _fake(x, weight, bias)


_linear = define(
    "linear(Tensor x, Tensor weight, Tensor? bias, bool batch_invariant=False) -> Tensor", reference.linear, _fake
)

_linear_add = define(
    "linear_add(Tensor x, Tensor weight, Tensor? bias, Tensor residual) -> Tensor", reference.linear_add, _fake_add
)

_X, _WEIGHT = TensorArg("x", "... K", FLOAT), TensorArg("weight", "N K", "x")
_BIAS = TensorArg("bias", "N", "x", optional=True)
_check_linear = compile_check("linear", _X, _WEIGHT, _BIAS, Flag("batch_invariant"))
_check_linear_add = compile_check(
    "linear", _X, _WEIGHT, _BIAS, TensorArg("residual", "... N", "x"), Flag("batch_invariant"), kernel="linear_add"
)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """`x @ weightᵀ + bias + residual`, accumulated in fp32, rounded once.

    With a residual, on Hopper one kernel where `linear` takes its kernel for a few rows (K and N multiples of 8, rows
    16-byte aligned, the residual's 8-byte); `rms_norm_linear` behind it needs no norm of its own. Other calls, and other
    GPUs, take a second kernel that adds, in front of which the product is rounded; with many rows `add_rms_norm` or a norm
    behind is where to add.

    x: (…, K), 1 to 3 dimensions, bf16 or fp16, on the CPU also fp32; the last dimension contiguous.
    weight: (N, K), bias: (N), residual: (…, N), x's dtype.
    batch_invariant: a row's result is the same bits whatever rows are beside it and however many: its sums are added up in the
      order of K, by one CTA; on the CPU, one row after the other. On the same GPU and with the same build. Not with a residual.

    Returns (…, N) in x's dtype, contiguous.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    if residual is None:
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
    added: Tensor = _linear_add(x, weight, bias, residual)
    return added
