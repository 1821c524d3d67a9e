"""A language model's head and a draw from what it gives, as one arg-max."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.reference.linear import linear
from fastattn.reference.philox import philox4x32

_LOW = 0xFFFFFFFF
_LARGEST_TEMPERATURE = 1e36  # noise times more would be infinite


def lm_head_sample(
    x: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor, seed: Tensor, position: Tensor, first_id: int
) -> tuple[Tensor, Tensor]:
    """The first id of the largest logit + temperature · noise, and that sum; no answer is -1."""
    logits = linear(x, weight, bias).float()
    scores = logits
    drawn = (temperature > 0).nonzero().squeeze(1)
    if drawn.numel() > 0:
        noise = gumbel_noise(seed[drawn], position[drawn], first_id, weight.shape[0])
        noise *= temperature[drawn].clamp(max=_LARGEST_TEMPERATURE).unsqueeze(1)
        scores = logits.index_add(0, drawn, noise)
    best, tokens = scores.max(dim=1)  # the first of the largest; NaN if there is one
    tokens = (tokens + first_id).int()
    return tokens.masked_fill_(best.isnan() | ~torch.isfinite(logits).any(1), -1), best


def gumbel_noise(seed: Tensor, position: Tensor, first_id: int, num_ids: int) -> Tensor:
    """-log(E), E of the exponential distribution, for num_ids ids from first_id on, a multiple of 4 → (B, num_ids) fp32."""
    fours = torch.arange(first_id // 4, -(-(first_id + num_ids) // 4))
    low, high, key_low, key_high = (
        t.unsqueeze(1) for word in (position, seed) for t in (word & _LOW, word >> 32 & _LOW)
    )
    words = philox4x32((low, high, fours, torch.ones_like(fours)), (key_low, key_high))
    u = torch.stack(words, 2).flatten(1)[:, :num_ids].float().mul_(2.0**-32).add_(2.0**-33)
    u.clamp_(max=1 - 2.0**-24)  # where fp32 rounds to 1
    return u.neg_().log1p_().neg_().log_().neg_()
