"""Linear layers: one matrix, or several of a checkpoint stacked into one so that they cost a single launch."""

from __future__ import annotations

import torch

from fastattn import ops
from fastattn.nn.module import Module, Weights, empty_parameter
from fastattn.reference import linear as reference


class Linear(Module):
    """y = x Wᵀ + b, with W (out_features, in_features) as in ``torch.nn.Linear``."""

    packed: torch.Tensor | None = None

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = empty_parameter(out_features, in_features)
        self.bias = empty_parameter(out_features) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is not None:
            return reference.packed_linear(x, self.packed, self.bias)
        return ops.linear(x, self.weight, self.bias)

    def pack(self) -> None:
        """Lays a loaded weight out for the CPU's matrix kernels, in its place. A weight that this is not for stays as it is."""
        if reference.can_pack(self.weight):
            self.packed = reference.pack(self.weight)
            self.weight = torch.nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def weights(self, prefix: str) -> Weights:
        yield f"{prefix}weight", self.weight
        if self.bias is not None:
            yield f"{prefix}bias", self.bias


class MergedLinear(Linear):
    """Several linear layers with the same input as one GEMM; ``parts`` are (name in the checkpoint, rows)."""

    def __init__(self, in_features: int, parts: tuple[tuple[str, int], ...], bias: bool = False) -> None:
        super().__init__(in_features, sum(rows for _, rows in parts), bias)
        self.parts = parts

    def weights(self, prefix: str) -> Weights:
        # The parts stand in the checkpoint beside this layer, not below it: replace our own name by theirs.
        parent = prefix[: prefix[:-1].rfind(".") + 1]
        start = 0
        for name, rows in self.parts:
            yield f"{parent}{name}.weight", self.weight[start : start + rows]
            if self.bias is not None:
                yield f"{parent}{name}.bias", self.bias[start : start + rows]
            start += rows
