"""Normalization layers."""

from __future__ import annotations

import torch

from fastattn import ops
from fastattn.nn.linear import Linear
from fastattn.nn.module import Module, Weight, Weights, empty_parameter
from fastattn.nn.quantized import EightBitRows, Rows

_QUANTIZED = {torch.int8: ops.rms_norm_quantize_int8, torch.float8_e4m3fn: ops.rms_norm_quantize_fp8}


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

    def before(self, layer: Linear, x: torch.Tensor, residual: torch.Tensor | None = None) -> Rows:
        """The same for ``layer`` alone, x (T, size): in 8 bits where that takes them, by the kernel that normalizes."""
        dtype = layer.rounds_to(x.shape[0])
        if dtype is None:
            return self(x, residual)
        q, scale = _QUANTIZED[dtype](x, self.weight, self.eps, residual=residual)
        return EightBitRows(q, scale, x.dtype)

    def weights(self, prefix: str) -> Weights:
        yield Weight(f"{prefix}weight", self.weight)
