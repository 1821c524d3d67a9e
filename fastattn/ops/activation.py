"""Gated activations."""

from __future__ import annotations

from torch import Tensor

from fastattn.ops._library import define
from fastattn.ops.checks import FLOAT, TensorArg, compile_check, fail_value
from fastattn.reference import activation as reference


def _fake(x: Tensor, activation: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


_gated_activation = define("gated_activation(Tensor x, str activation) -> Tensor", reference.gated_activation, _fake)

_check_swiglu = compile_check("swiglu", TensorArg("x", "... 2N", FLOAT), kernel="gated_activation")
_check_geglu = compile_check("geglu", TensorArg("x", "... 2N", FLOAT), kernel="gated_activation")
_GELU = {"tanh": "gelu_tanh", "none": "gelu"}


def swiglu(x: Tensor) -> Tensor:
    """`silu(gate) * up` with gate in the first half of x's last dimension (https://arxiv.org/abs/2002.05202).

    x: (…, 2N), 1 to 3 dimensions, bf16 or fp16, on the CPU also fp32; the last dimension contiguous.

    Returns (…, N) in x's dtype, contiguous; fp32 inside, rounded once.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    _check_swiglu(x)
    out: Tensor = _gated_activation(x, "silu")
    return out


def geglu(x: Tensor, approximate: str = "tanh") -> Tensor:
    """`gelu(gate) * up`, as `swiglu`. approximate: "tanh" (Gemma) or "none" (with erf), as in torch's gelu."""
    _check_geglu(x)
    if approximate not in _GELU:
        fail_value("geglu", f"approximate is {approximate!r}, expected 'tanh' or 'none'")
    out: Tensor = _gated_activation(x, _GELU[approximate])
    return out
