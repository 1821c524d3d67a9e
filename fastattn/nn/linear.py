"""Linear layers: one matrix, or several of a checkpoint stacked into one so that they cost a single launch."""

from __future__ import annotations

import torch

from fastattn import ops
from fastattn.nn.module import Module, Weight, Weights, empty_parameter
from fastattn.nn.shard import Shard
from fastattn.reference import linear as reference


class Linear(Module):
    """y = x Wᵀ + b, with W (out_features, in_features) as in ``torch.nn.Linear``.

    shard: the rows of W (dim 0) or its columns (dim 1) that this rank holds. With rows it computes those features of y; with
    columns it takes those of x, and the sum of y over ranks, which is the caller's to make, is the layer's.
    """

    packed: torch.Tensor | None = None

    def __init__(self, in_features: int, out_features: int, bias: bool = False, shard: Shard | None = None) -> None:
        super().__init__()
        self.shard = shard or Shard.whole(out_features)
        rows = self.shard.length if self.shard.dim == 0 else out_features
        self.weight = empty_parameter(rows, self.shard.length if self.shard.dim == 1 else in_features)
        # One rank brings the bias into a sum.
        self.bias_shard = self.shard
        if self.shard.dim == 1:
            self.bias_shard = Shard(0, 0, out_features if self.shard.start == 0 else 0, out_features)
        self.has_bias = bias
        self.bias = empty_parameter(rows) if bias and self.bias_shard.length else None

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
        yield Weight(f"{prefix}weight", self.weight, self.shard)
        if self.has_bias:
            yield Weight(f"{prefix}bias", self.weight.new_empty(0) if self.bias is None else self.bias, self.bias_shard)


class MergedLinear(Linear):
    """Several linear layers with the same input as one GEMM; ``parts`` are (name in the checkpoint, its rows on this rank)."""

    def __init__(self, in_features: int, parts: tuple[tuple[str, Shard], ...], bias: bool = False) -> None:
        super().__init__(in_features, sum(rows.length for _, rows in parts), bias)
        self.parts = parts

    def weights(self, prefix: str) -> Weights:
        # The parts stand in the checkpoint beside this layer, not below it: replace our own name by theirs.
        parent = prefix[: prefix[:-1].rfind(".") + 1]
        start = 0
        for name, rows in self.parts:
            end = start + rows.length
            yield Weight(f"{parent}{name}.weight", self.weight[start:end], rows)
            if self.bias is not None:
                yield Weight(f"{parent}{name}.bias", self.bias[start:end], rows)
            start = end
