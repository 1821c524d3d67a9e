"""Attention over two disjoint sets of keys, from the attention over each."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.reference.attention_scores import wide


def merge_attention_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """out (…, S, H, D) and lse (…, H, S) each, where an lse of -inf or +inf is of a row that saw no key."""
    logs = torch.stack([lse_a, lse_b])
    logs = logs.masked_fill(logs == torch.inf, -torch.inf)
    lse = torch.logsumexp(logs, 0)
    weights = torch.where(lse == -torch.inf, 0, (logs - lse).exp()).transpose(-1, -2).unsqueeze(-1)
    parts = wide(torch.stack([out_a, out_b]))
    parts = torch.where(weights == 0, 0, parts)  # an empty side may hold anything
    return (weights * parts).sum(0).to(out_a.dtype), lse
