"""The sizes that decode steps are rounded up to: few enough for a CUDA graph of each, near enough for padding to cost little."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class DecodeShape:
    """A step of num_seqs sequences, padding included, with num_tokens together and at most max_seqlen_q each. cascade: what all
    begin with is read once. greedy: it gives tokens and no logits."""

    num_seqs: int
    num_tokens: int
    max_seqlen_q: int
    cascade: bool = False
    greedy: bool = False


class DecodeShapes:
    """Numbers of sequences go up in powers of two and then in steps of 32, S. Without drafts a step has S sequences of one
    token. With drafts it has k * S tokens, k from a second short list, however they are spread: to the S sequences come as
    many as it takes to hold the missing tokens, at up to ``max_per_seq`` each.
    """

    def __init__(self, max_num_seqs: int, max_per_seq: int, max_num_tokens: int) -> None:
        """max_per_seq: most tokens of one sequence, its drafts among them. max_num_tokens: most of all in a step."""
        self.sizes = _up_to(max_num_seqs, [1, 2, 4, 8, 16, *range(32, max_num_seqs, 32)])
        self._per_seq = _up_to(max_per_seq, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32])
        self._longest_gap = max((b - a for a, b in pairwise(self._per_seq)), default=0)
        self._max_per_seq = max_per_seq
        self.max_num_seqs = self.sizes[-1] + self._num_extra(self.sizes[-1])  # of any shape
        self.max_num_tokens = min(self.sizes[-1] * max_per_seq, max_num_tokens)

    def fit(self, num_seqs: int, num_tokens: int) -> DecodeShape | None:
        """The smallest shape for ``num_seqs`` sequences with ``num_tokens`` together, at least one and at most
        ``max_per_seq`` each; None if it has too many tokens."""
        size = next(s for s in self.sizes if s >= num_seqs)
        if num_tokens == num_seqs:
            shape = DecodeShape(size, size, 1)
        else:
            per_seq = next(k for k in self._per_seq if k * size >= num_tokens)
            shape = DecodeShape(size + self._num_extra(size), per_seq * size, self._max_per_seq)
        return shape if shape.num_tokens <= self.max_num_tokens else None

    def _num_extra(self, size: int) -> int:
        # The k before was too small, so that fewer tokens are missing than lie between the two.
        most_missing = max(0, self._longest_gap * size - 1)
        return -(-most_missing // self._max_per_seq)


def _up_to(most: int, steps: list[int]) -> list[int]:
    return [step for step in steps if step < most] + [most]
