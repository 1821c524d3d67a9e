"""Two dense layers, a gate's and what it lets through, and the gated activation behind them as one operator."""

from __future__ import annotations

from torch import Tensor

from fastattn.ops._library import define
from fastattn.ops.checks import FLOAT, FP32, Flag, NonNegative, TensorArg, compile_check, fail_value
from fastattn.ops.norm_linear import check_sums
from fastattn.reference import gated_linear as reference

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def _fake(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


_gated_linear = define(
    "gated_linear(Tensor x, Tensor weight, Tensor? bias, str activation, bool batch_invariant=False) -> Tensor",
    reference.gated_linear,
    _fake,
)
_rms_norm_gated_linear = define(
    "rms_norm_gated_linear(Tensor x, Tensor weight, Tensor? bias, str activation, float eps, Tensor? sums_of_squares) -> Tensor",
    reference.rms_norm_gated_linear,
    _fake,
)

_X, _WEIGHT = TensorArg("x", "... K", FLOAT), TensorArg("weight", "2N K", "x")
_BIAS = TensorArg("bias", "2N", "x", optional=True)
_check_gated_linear = compile_check("gated_linear", _X, _WEIGHT, _BIAS, Flag("batch_invariant"))
_check_rms_norm_gated_linear = compile_check(
    "rms_norm_gated_linear",
    _X,
    _WEIGHT,
    _BIAS,
    TensorArg("sums_of_squares", "... P", FP32, optional=True),
    NonNegative("eps"),
)


def _check_activation(op: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        fail_value(op, f"activation is {activation!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """`act(x @ gateᵀ + gate_bias) * (x @ upᵀ + up_bias)`, the first half of a gated MLP (https://arxiv.org/abs/2002.05202).

    Rows of weight are gate and up in turns, eight each: gate 0 to 7, up 0 to 7, gate 8 to 15, and so on; the last block is
    shorter where N is no multiple of 8. `fastattn.nn.interleave_gate_up` puts weight and bias so.

    On Hopper one kernel for "silu" and "gelu_tanh", where K and N are multiples of 8 and rows 16-byte aligned: gate and up
    meet in registers, and only (…, N) is written. Other calls, "gelu", and other GPUs take two kernels, between which gate
    and up are rounded to x's dtype.

    x: (…, K), 1 to 3 dimensions, bf16 or fp16, on the CPU also fp32; the last dimension contiguous.
    weight: (2N, K), bias: (2N), x's dtype.
    activation: of the gate, "silu" (SwiGLU), "gelu_tanh" or "gelu", which is with erf (GeGLU).
    batch_invariant: as in `linear`.

    Returns (…, N) in x's dtype, contiguous; fp32 inside. For inference: no backward.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    _check_gated_linear(x, weight, bias, batch_invariant)
    _check_activation("gated_linear", activation)
    out: Tensor = _gated_linear(x, weight, bias, activation, batch_invariant)
    return out


def rms_norm_gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    eps: float = 1e-6,
    *,
    sums_of_squares: Tensor | None = None,
) -> Tensor:
    """`gated_linear(rms_norm(x), weight, bias, activation)`, with the norm's weight in `weight`: `fastattn.nn.fold_rms_norm`
    puts it there, before or after rows are interleaved.

    On Hopper as `rms_norm_linear`, where `gated_linear` is one kernel; elsewhere three. eps: finite, ≥ 0. sums_of_squares: as in
    `rms_norm_linear`. The rest is as in `gated_linear`.
    """
    _check_rms_norm_gated_linear(x, weight, bias, sums_of_squares, eps)
    check_sums("rms_norm_gated_linear", x, sums_of_squares)
    _check_activation("rms_norm_gated_linear", activation)
    out: Tensor = _rms_norm_gated_linear(x, weight, bias, activation, eps, sums_of_squares)
    return out
