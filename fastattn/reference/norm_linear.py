"""A norm of x and a dense layer in one: the norm's weight goes into the layer's, once, and its bias into the layer's bias."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from fastattn.reference.linear import linear


def rms_norm_linear(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x (…, K), weight (N, K), bias (N) → x / sqrt(mean(x²) + eps) · weightᵀ + bias, (…, N). fp32 inside."""
    return _linear(functional.rms_norm(x.float(), x.shape[-1:], None, eps), weight, bias).to(x.dtype)


def layer_norm_linear(x: Tensor, weight: Tensor, weight_sum: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x − mean) / sqrt(var + eps) · weightᵀ + bias. It subtracts the mean before the product, and so has no use for weight_sum."""
    return _linear(functional.layer_norm(x.float(), x.shape[-1:], None, None, eps), weight, bias).to(x.dtype)


def _linear(normalized: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(normalized, weight.float(), None if bias is None else bias.float())


def fold_rms_norm(norm_weight: Tensor | None, weight: Tensor) -> Tensor:
    """weight (N, K) for `rms_norm_linear`: of the layer behind a norm with norm_weight (K), None for ones. Rounded once."""
    if norm_weight is None:
        return weight.clone()
    return (weight.double() * norm_weight.double()).to(weight.dtype)


def fold_layer_norm(
    norm_weight: Tensor | None, norm_bias: Tensor | None, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """weight (N, K), weight_sum (N) in fp32 and bias (N) for `layer_norm_linear`.

    Of each row of the weight its mean is subtracted: a normalized x has the mean 0, so that the result is the same, and
    what is left for weight_sum to correct is the weight's rounding.
    """
    wide = weight.double()
    if norm_bias is not None:
        added = wide @ norm_bias.double()
        bias = (added if bias is None else added + bias.double()).to(weight.dtype)
    if norm_weight is not None:
        wide = wide * norm_weight.double()
    if wide.shape[1]:
        wide = wide - wide.mean(1, keepdim=True)
    folded = wide.to(weight.dtype)
    return folded, folded.double().sum(1).float(), bias
