"""What attention and its backward share: the scores of a chunk of queries, and which keys it sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

MAX_TREE_TOKENS = 64  # of a sequence: the bits of a word

# Queries are taken this many at a time: the scores stay small, and a causal chunk skips the keys that none of its
# rows see.
_CHUNK = 256


def wide(t: Tensor) -> Tensor:
    """In fp32, or fp64 if it is: what everything is computed in."""
    return t if t.dtype is torch.float64 else t.float()


@dataclass(frozen=True)
class Tree:
    """A sequence's query tokens as nodes of a tree. sees (n, n): whether a token sees another one, an ancestor or itself."""

    sees: Tensor

    @classmethod
    def make(cls, words: Tensor) -> Tree | None:
        """words (n) int64, of which bit j is whether a token sees the j-th; no tree if they are more than have bits."""
        if len(words) > MAX_TREE_TOKENS:
            return None
        index = torch.arange(len(words))
        sees = (words.unsqueeze(1) >> index & 1).bool().tril_()
        return cls(sees.fill_diagonal_(True))

    def behind(self, key: Tensor) -> Tensor:
        """How many steps behind a token each key is on its path, (n, keys); -1 where it is not on it.

        key (keys): 0 is the first query token's.
        """
        steps = self.sees.flip(1).cumsum(1).flip(1) - 1  # to itself and each of its ancestors
        own = torch.where(self.sees, steps, -1)[:, key.clamp(min=0)]
        return torch.where(key < 0, self.sees.sum(1, keepdim=True) - 1 - key, own)


@dataclass(frozen=True)
class Scoring:
    """score = softcap(scale * q·k) - slope * |i + Sk - Sq - j|, of the keys i + Sk - Sq - left … i + Sk - Sq + right.

    left, right: -1 is open. softcap: 0 is off. Rows and keys are aligned bottom-right: the last row stands at the last key.
    """

    scale: float
    left: int
    right: int
    softcap: float

    @classmethod
    def make(cls, scale: float, causal: bool, left: int, right: int, softcap: float) -> Scoring:
        """A causal row sees nothing to its right, whatever the window says."""
        return cls(scale, left, 0 if causal else right, softcap)

    def chunks(self, num_rows: int, num_keys: int) -> Iterator[tuple[range, range]]:
        """Rows, and the keys that at least one of them may see: perhaps none."""
        shift = num_keys - num_rows
        for start in range(0, num_rows, _CHUNK):
            end = min(start + _CHUNK, num_rows)
            first = max(0, start + shift - self.left) if self.left >= 0 else 0
            last = min(num_keys, end + shift + self.right) if self.right >= 0 else num_keys
            yield range(start, end), range(first, max(first, last))

    def cap(self, scores: Tensor) -> Tensor:
        return torch.tanh(scores / self.softcap) * self.softcap if self.softcap > 0 else scores

    def place(
        self, scores: Tensor, rows: range, keys: range, shift: int, slopes: Tensor | None, tree: Tree | None = None
    ) -> bool:
        """Adds the bias of distance to scores (Hk, group * rows, keys), -inf where a row does not see a key.

        slopes: (H). tree: of all rows. Whether any may be -inf: one row sees every key of its range.
        """
        masked = len(rows) > 1 and (self.left >= 0 or self.right >= 0)
        if not masked and slopes is None:
            return False
        each = scores.view(scores.shape[0], -1, len(rows), len(keys))
        first = rows.start + shift - keys.start
        if tree is None and slopes is None:
            each.masked_fill_(_hidden_in_a_row(first, len(rows), len(keys), self.left, self.right), -torch.inf)
            return True
        if tree is None:
            behind = _behind_in_a_row(first, len(rows), len(keys))
        else:
            behind = tree.behind(torch.arange(keys.start, keys.stop) - shift)
        if slopes is not None:
            each -= wide(slopes).view(scores.shape[0], -1, 1, 1) * behind.abs()
        if masked:
            each.masked_fill_(_hidden(behind, self.left, self.right), -torch.inf)
        return masked


def _behind_in_a_row(first: int, num_rows: int, num_keys: int) -> Tensor:
    """How many steps behind a row each key is, (rows, keys), where the first key is ``first`` behind the first row."""
    return torch.arange(first, first + num_rows).unsqueeze(1) - torch.arange(num_keys)


def _hidden(behind: Tensor, left: int, right: int) -> Tensor:
    hidden = torch.zeros(behind.shape, dtype=torch.bool)
    if left >= 0:
        hidden |= behind > left
    if right >= 0:
        hidden |= behind < -right
    return hidden


@lru_cache(maxsize=16)
def _hidden_in_a_row(first: int, num_rows: int, num_keys: int, left: int, right: int) -> Tensor:
    """Kept, since all layers of a step ask for the same, and sequences of one length too."""
    with torch.inference_mode(False):  # whoever asks first, others may be outside of it
        return _hidden(_behind_in_a_row(first, num_rows, num_keys), left, right)


def grouped(t: Tensor, num_kv_heads: int) -> Tensor:
    """(rows, H, D) → (Hk, group * rows, D): the query heads of one KV head are rows that see the same keys."""
    rows, _, dim = t.shape
    return wide(t).reshape(rows, num_kv_heads, -1, dim).permute(1, 2, 0, 3).reshape(num_kv_heads, -1, dim)


def ungrouped(t: Tensor, rows: int) -> Tensor:
    """(Hk, group * rows, D) → (rows, H, D)."""
    return t.reshape(-1, rows, t.shape[-1]).transpose(0, 1)


def slopes_of(alibi_slopes: Tensor | None, b: int) -> Tensor | None:
    """(H) of sequence b, from (H) or (B, H)."""
    return alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]


def spans(offsets: Tensor, used: Tensor | None) -> list[slice]:
    """The used tokens of each sequence."""
    starts = offsets.tolist()
    ends = starts[1:] if used is None else [s + n for s, n in zip(starts, used.tolist(), strict=False)]
    return [slice(s, e) for s, e in zip(starts, ends, strict=False)]
