"""FlashInfer's merges of attention over parts of the keys; every LSE is to base 2."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.integrations.flashinfer._common import LOG2_E, base2
from fastattn.ops import merge_attention_states


def _natural(s: Tensor) -> Tensor:
    """(T, H), base 2 → (H, T), natural logarithm."""
    return (s.float() / LOG2_E).t().contiguous()


def merge_state(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of the same queries to two disjoint sets of keys, merged.

    v_a, v_b: (T, H, D). s_a, s_b: (T, H), their LSE, base 2; −∞ where a row saw no key.

    Returns (V, S) of the same shapes, as attention over all the keys gives them; S is fp32.
    """
    v, s = merge_attention_states(v_a, _natural(s_a), v_b, _natural(s_b))
    return v, base2(s)


def merge_state_in_place(v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None = None) -> None:
    """`merge_state` of (v, s) and (v_other, s_other), written to v and s.

    s: fp32. mask: (T) bool, the rows to merge; the others stay as they are. All rows if None.
    """
    if s.dtype != torch.float32:
        raise TypeError(f"flashinfer.merge_state_in_place: s is {s.dtype}, expected torch.float32, as it is written to")
    merged_v, merged_s = merge_state(v, s, v_other, s_other)
    if mask is not None:
        rows = mask.bool().unsqueeze(-1)
        merged_v, merged_s = torch.where(rows.unsqueeze(-1), merged_v, v), torch.where(rows, merged_s, s)
    v.copy_(merged_v)
    s.copy_(merged_s)


def merge_states(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_state` of any number of parts.

    v: (T, parts, H, D). s: (T, parts, H), base 2.

    Returns V (T, H, D) in v's dtype and S (T, H) fp32.
    """
    if v.dim() != 4 or s.shape != v.shape[:-1]:
        raise ValueError(
            f"flashinfer.merge_states: v has shape {tuple(v.shape)} and s {tuple(s.shape)}, expected (T, parts, H, D) and "
            "(T, parts, H)"
        )
    logs = s.float() / LOG2_E
    lse = logs.logsumexp(1)
    weights = (logs - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(1)).exp().unsqueeze(-1)
    # A part without keys has no weight, and its rows may hold anything.
    merged = torch.where(weights > 0, weights * v.float(), 0.0).sum(1)
    return merged.to(v.dtype), lse * LOG2_E
