"""The gated feed-forward layer of the engine's decoders."""

from __future__ import annotations

import torch

from fastattn.nn.gated_linear import GatedLinear
from fastattn.nn.linear import Linear, NormInside
from fastattn.nn.module import Module
from fastattn.nn.parallel import ALONE, TensorParallel
from fastattn.nn.quantized import Rows


class ParallelMLP(Module):
    """down(act(gate(x)) * up(x)) (Shazeer, 2020), gate and up one GEMM of any weights. Each rank has a part of the intermediate."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str,
        bias: bool = False,
        tp: TensorParallel = ALONE,
    ) -> None:
        super().__init__()
        self.tp = tp
        rows, columns = tp.shard(intermediate_size), tp.shard(intermediate_size, dim=1)
        self.gate_up_proj = GatedLinear(hidden_size, rows, activation, bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias, columns)

    def forward(self, x: Rows, residual: torch.Tensor | None = None, norm: NormInside | None = None) -> torch.Tensor:
        """residual, norm: added to the result, and of x and then of the result, in the products' kernels, on a single rank."""
        gate_up, down = self.gate_up_proj, self.down_proj.quantized
        inside = residual is not None or norm is not None
        if down is not None and down.takes_activation and not gate_up.interleaved and not inside:
            # One kernel activates and rounds.
            return self.tp.all_reduce(down(gate_up.product(x), self.down_proj.bias, gate_up.activation))
        return self.tp.all_reduce(self.down_proj(gate_up(x, norm=norm), residual, norm))
