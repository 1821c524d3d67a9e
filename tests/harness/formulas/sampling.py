"""What changes and reads logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def adjust_logits(
    c: torch.dtype,
    logits: Tensor,
    token_ids: Tensor,
    counts: Tensor,
    bias: Tensor,
    indptr: Tensor,
    repetition_penalty: Tensor,
    presence_penalty: Tensor,
    frequency_penalty: Tensor,
) -> list[Tensor]:
    out = logits.to(c).clone()
    for b in range(logits.shape[0]):
        for i in range(int(indptr[b]), int(indptr[b + 1])):
            old, count = out[b, token_ids[i]].clone(), int(counts[i])
            if count >= 0:
                rep = repetition_penalty[b].to(c)
                old = old / rep if old > 0 else old * rep
            if count > 0:
                old = old - presence_penalty[b].to(c) - frequency_penalty[b].to(c) * count
            out[b, token_ids[i]] = old + bias[i].to(c)
    return [out]


def apply_token_bitmask(c: torch.dtype, logits: Tensor, bitmask: Tensor, rows: Tensor) -> list[Tensor]:
    out = logits.to(c).clone()
    for r, row in enumerate(rows.tolist()):
        for token in range(logits.shape[1]):
            if not (int(bitmask[r, token // 32]) >> (token % 32)) & 1:
                out[row, token] = -math.inf
    return [out]


def token_logprobs(c: torch.dtype, logits: Tensor, token_ids: Tensor, num_top: int) -> list[Tensor]:
    logprobs = torch.log_softmax(logits.to(c), -1)
    rows = logits.float().tolist()
    best = [sorted(range(len(row)), key=lambda i: (-row[i], i))[:num_top] for row in rows]
    ids = torch.tensor(best, dtype=torch.int64).view(len(rows), num_top)
    chosen = token_ids.long().unsqueeze(1)
    rank = [1 + sum(v > row[i] for v in row) for row, i in zip(rows, token_ids.tolist(), strict=True)]
    return [
        logprobs.gather(1, chosen).squeeze(1),
        torch.tensor(rank, dtype=torch.int32),
        logprobs.gather(1, ids),
        ids.int(),
    ]
