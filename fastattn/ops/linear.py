"""Dense layer."""

from __future__ import annotations

from torch import Tensor

from fastattn.ops._library import define
from fastattn.ops.checks import FLOAT, TensorArg, compile_check
from fastattn.reference import linear as reference


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_linear = define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", reference.linear, _fake)

_check_linear = compile_check(
    "linear",
    TensorArg("x", "... K", FLOAT),
    TensorArg("weight", "N K", "x"),
    TensorArg("bias", "N", "x", optional=True),
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weightᵀ + bias`, accumulated in fp32, rounded once.

    x: (…, K), 1 to 3 dimensions, bf16 or fp16, on the CPU also fp32; the last dimension contiguous.
    weight: (N, K), bias: (N), x's dtype.

    Returns (…, N) in x's dtype, contiguous.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    _check_linear(x, weight, bias)
    out: Tensor = _linear(x, weight, bias)
    return out
