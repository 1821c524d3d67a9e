"""Token embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def embedding(token_ids: Tensor, weight: Tensor, scale: float, drawn: Tensor | None = None) -> Tensor:
    """round(weight[id] * scale) for every id; an id t below 0 stands for drawn[-1 - t], zeros where that is no id."""
    unknown = None
    if drawn is not None and drawn.numel():
        token_ids = torch.where(token_ids < 0, drawn[(-1 - token_ids).clamp(0, drawn.shape[0] - 1)], token_ids)
        unknown = (token_ids < 0) | (token_ids >= weight.shape[0])
        token_ids = token_ids.masked_fill(unknown, 0)
    rows = weight.index_select(0, token_ids)
    if unknown is not None:
        rows.masked_fill_(unknown[:, None], 0)
    return rows if scale == 1.0 else rows.float().mul_(scale).to(weight.dtype)
