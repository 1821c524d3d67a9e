"""Token embedding."""

from __future__ import annotations

import torch

from fastattn import ops
from fastattn.nn.module import Module, Weight, Weights, empty_parameter
from fastattn.nn.parallel import ALONE, TensorParallel


class Embedding(Module):
    """Rows of a (vocab_size, hidden_size) table, times ``scale`` (Gemma multiplies by √hidden_size).

    Each rank holds a run of the rows. Those of other ranks count as zeros there, so the sum over ranks is exact.
    """

    def __init__(self, vocab_size: int, hidden_size: int, scale: float = 1.0, tp: TensorParallel = ALONE) -> None:
        super().__init__()
        self.tp, self.shard = tp, tp.shard(vocab_size)
        self.weight = empty_parameter(self.shard.length, hidden_size)
        self.scale = scale

    def forward(self, token_ids: torch.Tensor, drawn: torch.Tensor | None = None) -> torch.Tensor:
        """token_ids (T,) int32 → (T, hidden_size). drawn (R,) int32: what ids below 0 stand for (`ops.embedding`); not with
        several ranks, of which only one draws."""
        if self.tp.size == 1:
            return ops.embedding(token_ids, self.weight, self.scale, drawn)
        rows = token_ids - self.shard.start
        elsewhere = (rows < 0) | (rows >= self.shard.length)
        found = ops.embedding(rows.masked_fill(elsewhere, 0), self.weight, self.scale)
        return self.tp.all_reduce(found.masked_fill_(elsewhere[:, None], 0))

    def weights(self, prefix: str) -> Weights:
        yield Weight(f"{prefix}weight", self.weight, self.shard)
