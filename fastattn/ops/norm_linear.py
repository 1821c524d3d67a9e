"""A norm and the dense layer behind it as one operator."""

from __future__ import annotations

from torch import Tensor

from fastattn.ops._library import define
from fastattn.ops.checks import FLOAT, FP32, NonNegative, TensorArg, compile_check
from fastattn.reference import norm_linear as reference


def _fake(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_rms_norm_linear = define(
    "rms_norm_linear(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor", reference.rms_norm_linear, _fake
)
_layer_norm_linear = define(
    "layer_norm_linear(Tensor x, Tensor weight, Tensor weight_sum, Tensor? bias, float eps) -> Tensor",
    reference.layer_norm_linear,
    _fake,
)

_X, _WEIGHT = TensorArg("x", "... K", FLOAT), TensorArg("weight", "N K", "x")
_BIAS = TensorArg("bias", "N", "x", optional=True)
_check_rms_norm_linear = compile_check("rms_norm_linear", _X, _WEIGHT, _BIAS, NonNegative("eps"))
_check_layer_norm_linear = compile_check(
    "layer_norm_linear", _X, _WEIGHT, TensorArg("weight_sum", "N", FP32), _BIAS, NonNegative("eps")
)


def rms_norm_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """`linear(rms_norm(x), weight, bias)`, with the norm's weight in `weight`: `fastattn.nn.fold_rms_norm` puts it there.

    On Hopper one kernel, which takes x as it is, adds up its rows' squares beside the product and divides by their root
    where it rounds; no normalized x is written. K and N must be multiples of 8 for it, and rows 16-byte aligned; other
    calls, and other GPUs, take two kernels.

    x: (…, K), 1 to 3 dimensions, bf16 or fp16, on the CPU also fp32; the last dimension contiguous.
    weight: (N, K), bias: (N), x's dtype.
    eps: finite, ≥ 0.

    Returns (…, N) in x's dtype, contiguous; fp32 inside, rounded once.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    _check_rms_norm_linear(x, weight, bias, eps)
    out: Tensor = _rms_norm_linear(x, weight, bias, eps)
    return out


def layer_norm_linear(
    x: Tensor, weight: Tensor, weight_sum: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`linear(layer_norm(x), weight, bias)`, with the norm's weight and bias in those of the layer.

    `fastattn.nn.fold_layer_norm` makes weight, weight_sum and bias. The kernel subtracts `mean(x) · weight_sum` from the
    product. What fp32 sums lose grows with |mean(x)| / std(x): in fp16, above 30, it can be more than twice the error of
    `layer_norm` and `linear`, which such rows should take; in bf16 it is not.

    weight_sum: (N) fp32, each row of weight added up. The rest is as in `rms_norm_linear`.
    """
    _check_layer_norm_linear(x, weight, weight_sum, bias, eps)
    out: Tensor = _layer_norm_linear(x, weight, weight_sum, bias, eps)
    return out
