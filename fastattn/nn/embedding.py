"""Token embedding."""

from __future__ import annotations

import torch

from fastattn import ops
from fastattn.nn.module import Module, Weights, empty_parameter


class Embedding(Module):
    """Rows of a (vocab_size, hidden_size) table, times ``scale`` (Gemma multiplies by √hidden_size)."""

    def __init__(self, vocab_size: int, hidden_size: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = empty_parameter(vocab_size, hidden_size)
        self.scale = scale

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return ops.embedding(token_ids, self.weight, self.scale)

    def weights(self, prefix: str) -> Weights:
        yield f"{prefix}weight", self.weight
