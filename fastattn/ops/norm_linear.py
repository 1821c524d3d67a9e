"""A norm and the dense layer behind it as one operator."""

from __future__ import annotations

from torch import Tensor

from fastattn.ops._library import define
from fastattn.ops.checks import FLOAT, FP32, NonNegative, TensorArg, compile_check, fail_value
from fastattn.ops.linear import sums_shape
from fastattn.reference import norm_linear as reference


def _fake(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_rms_norm_linear = define(
    "rms_norm_linear(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor? sums_of_squares) -> Tensor",
    reference.rms_norm_linear,
    _fake,
)
_layer_norm_linear = define(
    "layer_norm_linear(Tensor x, Tensor weight, Tensor weight_sum, Tensor? bias, float eps) -> Tensor",
    reference.layer_norm_linear,
    _fake,
)

_X, _WEIGHT = TensorArg("x", "... K", FLOAT), TensorArg("weight", "N K", "x")
_BIAS = TensorArg("bias", "N", "x", optional=True)
_SUMS = TensorArg("sums_of_squares", "... P", FP32, optional=True)
_check_rms_norm_linear = compile_check("rms_norm_linear", _X, _WEIGHT, _BIAS, _SUMS, NonNegative("eps"))
_check_layer_norm_linear = compile_check(
    "layer_norm_linear", _X, _WEIGHT, TensorArg("weight_sum", "N", FP32), _BIAS, NonNegative("eps")
)


def check_sums(op: str, x: Tensor, sums_of_squares: Tensor | None) -> None:
    """That they are of x's rows."""
    if sums_of_squares is not None and sums_of_squares.shape != (expected := sums_shape(x.shape)):
        fail_value(
            op,
            f"sums_of_squares has shape {tuple(sums_of_squares.shape)}, expected {expected} as x is {tuple(x.shape)}",
        )


def rms_norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    sums_of_squares: Tensor | None = None,
) -> Tensor:
    """`linear(rms_norm(x), weight, bias)`, with the norm's weight in `weight`: `fastattn.nn.fold_rms_norm` puts it there.

    On Hopper the product takes x as it is, and divides by the root of its rows' squares where it rounds; no normalized x is
    written. Few rows' squares are added up beside the products, many rows' by a short kernel in front. K and N must be
    multiples of 8 for it, and rows 16-byte aligned; other calls, and other GPUs, take a norm and a product.

    x: (…, K), 1 to 3 dimensions, bf16 or fp16, on the CPU also fp32; the last dimension contiguous.
    weight: (N, K), bias: (N), x's dtype.
    eps: finite, ≥ 0.
    sums_of_squares: (…, ⌈K / 32⌉) fp32, of the squares of 32 columns of x each, as `linear(…, residual=, with_sums=True)`
        gives them with x. x's own are then not added up.

    Returns (…, N) in x's dtype, contiguous; fp32 inside, rounded once.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    _check_rms_norm_linear(x, weight, bias, sums_of_squares, eps)
    check_sums("rms_norm_linear", x, sums_of_squares)
    out: Tensor = _rms_norm_linear(x, weight, bias, eps, sums_of_squares)
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
