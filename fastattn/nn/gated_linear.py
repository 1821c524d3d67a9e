"""The first half of a gated MLP: gates and ups from one product, and their activation."""

from __future__ import annotations

import torch

from fastattn import ops
from fastattn.nn.linear import MergedLinear, NormInside
from fastattn.nn.quantized import Rows, in_turns
from fastattn.nn.shard import Shard

_ACTIVATIONS = {"silu": ops.swiglu, "gelu_tanh": ops.geglu}


class GatedLinear(MergedLinear):
    """act(gate(x)) * up(x), with gates and ups as one matrix of any weights; rows: of each that are on this rank.

    `pack` puts the rows of plain weights and of those in 8 bits on a GPU in turns, in their place, for the product that has the
    activation in it; matrices of fewer bits and the CPU's have the activation behind them.
    """

    interleaved = False

    def __init__(self, in_features: int, rows: Shard, activation: str, bias: bool = False) -> None:
        if activation not in _ACTIVATIONS:
            raise ValueError(f"GatedLinear: activation is {activation!r}, allowed are {sorted(_ACTIVATIONS)}")
        super().__init__(in_features, (("gate_proj", rows), ("up_proj", rows)), bias)
        self.activation = activation

    def forward(self, x: Rows, residual: torch.Tensor | None = None, norm: NormInside | None = None) -> torch.Tensor:
        """x (T, in_features) → (T, gates). norm: see `MergedLinear`; where rows are in turns."""
        if norm is not None:
            assert isinstance(x, torch.Tensor)
            return ops.rms_norm_gated_linear(
                x, self.weight, self.bias, self.activation, norm.eps, sums_of_squares=norm.sums
            )
        if self.interleaved and self.quantized is not None:
            return self.quantized.gated(x, self.bias, self.activation)
        if self.interleaved:
            assert isinstance(x, torch.Tensor)
            return ops.gated_linear(x, self.weight, self.bias, self.activation, batch_invariant=self.batch_invariant)
        return _ACTIVATIONS[self.activation](self.product(x))

    def product(self, x: Rows) -> torch.Tensor:
        """x (T, in_features) → (T, 2 gates): gates, then ups. Of rows that are not in turns."""
        return super().forward(x)

    def pack(self, name: str = "") -> None:
        super().pack(name)
        has_gates = self.weight.numel() > 0 or (self.quantized is not None and self.quantized.has_gates)
        if self.weight.is_cuda and has_gates:
            self.interleave()

    def interleave(self) -> None:
        """Puts gates and ups in turns, eight rows each (`ops.gated_linear`), in the memory where they are. Once, after loading."""
        in_turns(self.bias)
        if self.quantized is not None:
            self.quantized.interleave()
        else:
            in_turns(self.weight)
        self.interleaved = True
