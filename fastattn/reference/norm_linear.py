"""A norm of x and a dense layer in one: the norm's weight goes into the layer's, once, and its bias into the layer's bias."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from fastattn.reference.linear import linear


def rms_norm_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, sums_of_squares: Tensor | None = None
) -> Tensor:
    """x (…, K), weight (N, K), bias (N) → x / sqrt(mean(x²) + eps) · weightᵀ + bias, (…, N). fp32 inside.

    sums_of_squares: of x's rows, in parts, (…, P), in place of x's own.
    """
    if sums_of_squares is not None and x.shape[-1] > 0:
        mean = sums_of_squares.sum(-1, keepdim=True) / x.shape[-1]
        return _linear(x.float() * (mean + eps).rsqrt(), weight, bias).to(x.dtype)
    return _linear(functional.rms_norm(x.float(), x.shape[-1:], None, eps), weight, bias).to(x.dtype)


def layer_norm_linear(x: Tensor, weight: Tensor, weight_sum: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x − mean) / sqrt(var + eps) · weightᵀ + bias. It subtracts the mean before the product, and so has no use for weight_sum."""
    return _linear(functional.layer_norm(x.float(), x.shape[-1:], None, None, eps), weight, bias).to(x.dtype)


def _linear(normalized: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(normalized, weight.float(), None if bias is None else bias.float())


def fold_rms_norm(norm_weight: Tensor | None, weight: Tensor) -> Tensor:
    """The weight that `rms_norm_linear` takes for a dense layer behind a norm: weight · norm_weight, in fp64, rounded once.

    norm_weight: (K) of any float dtype, None for ones. weight: (N, K). Returns a fresh (N, K) in weight's dtype.
    Raises ValueError for shapes that do not fit.
    """
    _check("fold_rms_norm", weight, norm_weight=norm_weight)
    if norm_weight is None:
        return weight.clone()
    return (weight.double() * norm_weight.double()).to(weight.dtype)


def fold_layer_norm(
    norm_weight: Tensor | None, norm_bias: Tensor | None, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weight, weight_sum and bias that `layer_norm_linear` takes for a dense layer behind a norm; in fp64, rounded once.

    Of each row of the weight its mean is subtracted: a normalized x has the mean 0, so that the result is the same, and
    what is left for weight_sum to correct is the weight's rounding.

    norm_weight: (K), None for ones; norm_bias: (K) or None; weight: (N, K); bias: (N) or None; of any float dtypes. Returns
    fresh (N, K) in weight's dtype, (N) fp32, and (N) in weight's dtype, or None where no bias was given.
    Raises ValueError for shapes that do not fit.
    """
    _check("fold_layer_norm", weight, norm_weight=norm_weight, norm_bias=norm_bias, bias=bias)
    wide = weight.double()
    added = wide.new_zeros(wide.shape[0]) if bias is None else bias.double()
    if norm_bias is not None:
        added = added + wide @ norm_bias.double()
    if norm_weight is not None:
        wide = wide * norm_weight.double()
    if wide.shape[1]:
        wide = wide - wide.mean(1, keepdim=True)
    folded = wide.to(weight.dtype)
    return folded, sum_of_rows(folded), None if bias is None and norm_bias is None else added.to(weight.dtype)


def sum_of_rows(weight: Tensor) -> Tensor:
    """Each row of the weight (N, K) added up, (N) fp32."""
    return weight.double().sum(1).float()


def _check(op: str, weight: Tensor, **vectors: Tensor | None) -> None:
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected (N, K)")
    for name, t in vectors.items():
        size = weight.shape[0] if name == "bias" else weight.shape[1]
        if t is not None and tuple(t.shape) != (size,):
            raise ValueError(
                f"{op}: {name} has shape {tuple(t.shape)}, expected ({size},) as weight is {tuple(weight.shape)}"
            )
