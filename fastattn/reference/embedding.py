"""Token embedding."""

from __future__ import annotations

from torch import Tensor


def embedding(token_ids: Tensor, weight: Tensor, scale: float) -> Tensor:
    """round(weight[id] * scale) for every id."""
    rows = weight.index_select(0, token_ids)
    return rows if scale == 1.0 else rows.float().mul_(scale).to(weight.dtype)
