"""Queries and keys of the sequences of one attention call, as the families of attention have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch


@dataclass(frozen=True)
class Sequences:
    """How many queries and keys each has; where all are alike, the call is one batch, else they are packed."""

    lengths: Sequence[int]
    key_lengths: Sequence[int]

    @property
    def alike(self) -> bool:
        return len({*self.lengths}) == len({*self.key_lengths}) == 1

    def shape(self, runs: Sequence[int]) -> tuple[int, ...]:
        """(B, S) of a batch, (T) of packed sequences; runs: `lengths` or `key_lengths`."""
        return (len(runs), runs[0]) if self.alike else (sum(runs),)

    def packed(self, device: torch.device) -> dict[str, Any]:
        """What varlen_attention takes beside q, k and v; nothing of a batch."""
        if self.alike:
            return {}
        cu_q, cu_k = (
            torch.tensor([0, *accumulate(runs)], dtype=torch.int32, device=device)
            for runs in (self.lengths, self.key_lengths)
        )
        longest = {"max_seqlen_q": max(self.lengths), "max_seqlen_k": max(self.key_lengths)}
        return {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, **longest}

    def pairs(self, causal: bool) -> int:
        """Of a query and a key that it sees; causal wants as many keys as queries, at least."""
        of_all = zip(self.lengths, self.key_lengths, strict=True)
        return sum(n * m - n * (n - 1) // 2 if causal else n * m for n, m in of_all)

    def describe(self, heads: int, kv_heads: int, dim: int, dtype: str, causal: bool) -> str:
        batch, longest, most_keys = len(self.lengths), max(self.lengths), max(self.key_lengths)
        if self.alike:
            what = f"{batch} × {longest} tokens" + (f" to {most_keys} keys" if most_keys != longest else "")
        else:
            what = f"{batch} sequences of {min(self.lengths)} to {longest} tokens"
        grouped = f" to {kv_heads}" if kv_heads != heads else ""
        return f"{what}, {heads} heads{grouped} of {dim}, {dtype}, {'causal' if causal else 'full'}"
