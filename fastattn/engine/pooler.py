"""From hidden states to embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch

from fastattn.engine.request import Request


class Pooler:
    """Sets `Request.embedding` when the last part of a prompt was computed, and keeps the sums of the parts until then."""

    def __init__(self) -> None:
        # Weak: a request that ends half way is not told here.
        self._sums: WeakKeyDictionary[Request, torch.Tensor] = WeakKeyDictionary()

    def pool(self, hidden: torch.Tensor, scheduled: Mapping[Request, int]) -> None:
        """hidden (T, hidden_size) of this step's tokens, of one request after the other, before the step is counted as
        computed."""
        row = 0
        for request, num_tokens in scheduled.items():
            if request.pooling is not None:
                self._pool(request, hidden[row : row + num_tokens])
            row += num_tokens

    def _pool(self, request: Request, hidden: torch.Tensor) -> None:
        pooling, is_last = request.pooling, hidden.shape[0] >= request.num_pending_tokens
        assert pooling is not None
        vector = hidden[-1].float()
        if pooling.pooling == "mean":
            vector = hidden.sum(0, dtype=torch.float32)
            if request.seq.num_computed > 0:  # else it is new, or begins anew after a preemption
                vector += self._sums.pop(request)
            if not is_last:
                self._sums[request] = vector
            vector = vector / len(request.seq)
        if is_last:
            if pooling.normalize:
                vector = torch.nn.functional.normalize(vector, dim=0)
            values: list[float] = vector.tolist()
            request.embedding = values
