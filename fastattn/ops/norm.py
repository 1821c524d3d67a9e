"""RMSNorm and LayerNorm."""

from __future__ import annotations

from torch import Tensor

from fastattn.ops._library import define
from fastattn.ops.checks import FLOAT, NonNegative, TensorArg, compile_check
from fastattn.reference import norm as reference


def _like(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


_rms_norm = define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", reference.rms_norm, _like)
_add_rms_norm = define(
    "add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps) -> Tensor", reference.add_rms_norm, _like
)
_layer_norm = define(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor", reference.layer_norm, _like
)

_check_rms_norm = compile_check(
    "rms_norm", TensorArg("x", "... N", FLOAT), TensorArg("weight", "N", "x"), NonNegative("eps")
)
_check_add_rms_norm = compile_check(
    "add_rms_norm",
    TensorArg("x", "... N", FLOAT),
    TensorArg("residual", "like x", "x", mutated=True),
    TensorArg("weight", "N", "x"),
    NonNegative("eps"),
)
_check_layer_norm = compile_check(
    "layer_norm",
    TensorArg("x", "... N", FLOAT),
    TensorArg("weight", "N", "x"),
    TensorArg("bias", "N", "x", optional=True),
    NonNegative("eps"),
)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dimension: `x / sqrt(mean(x²) + eps) * weight` (https://arxiv.org/abs/1910.07467).

    x: (…, N), 1 to 3 dimensions, bf16 or fp16, on the CPU also fp32; the last dimension contiguous.
    weight: (N), x's dtype, multiplied as it is.
    eps: finite, ≥ 0.

    Returns (…, N) in x's dtype, contiguous; fp32 inside, rounded once.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    _check_rms_norm(x, weight, eps)
    out: Tensor = _rms_norm(x, weight, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Residual addition and RMSNorm in one pass: `residual ← round(x + residual)`, then `rms_norm(residual)`.

    x, residual: (…, N), same shape and dtype; residual is updated in place. The rest is as in `rms_norm`.
    """
    _check_add_rms_norm(x, residual, weight, eps)
    out: Tensor = _add_rms_norm(x, residual, weight, eps)
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension: `(x - mean) / sqrt(var + eps) * weight + bias` (https://arxiv.org/abs/1607.06450).

    x: (…, N) as in `rms_norm`; weight, bias: (N), x's dtype; var is the biased variance.
    """
    _check_layer_norm(x, weight, bias, eps)
    out: Tensor = _layer_norm(x, weight, bias, eps)
    return out
