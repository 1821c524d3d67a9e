"""Normalization layers."""

from __future__ import annotations

import torch

from fastattn import ops
from fastattn.nn.module import Module, Weight, Weights, empty_parameter


class RMSNorm(Module):
    """x / rms(x) * weight (Zhang and Sennrich, 2019); with ``residual`` it first adds x into it, in place."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = empty_parameter(size)
        self.eps = eps

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps)
        return ops.add_rms_norm(x, residual, self.weight, self.eps)

    def weights(self, prefix: str) -> Weights:
        yield Weight(f"{prefix}weight", self.weight)
