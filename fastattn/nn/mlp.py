"""The gated feed-forward layer of Llama-style decoders."""

from __future__ import annotations

import torch

from fastattn import ops
from fastattn.nn.linear import Linear, MergedLinear
from fastattn.nn.module import Module

_ACTIVATIONS = {"silu": ops.swiglu, "gelu_tanh": ops.geglu}


class GatedMLP(Module):
    """down(act(gate(x)) * up(x)) (Shazeer, 2020), with gate and up as one GEMM."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str, bias: bool = False) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f"GatedMLP: activation is {activation!r}, allowed are {sorted(_ACTIVATIONS)}")
        parts = (("gate_proj", intermediate_size), ("up_proj", intermediate_size))
        self.gate_up_proj = MergedLinear(hidden_size, parts, bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias)
        self.activation = _ACTIVATIONS[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_up_proj(x)))
