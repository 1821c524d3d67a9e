"""What guesses tokens: the protocol, and the one that needs no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from fastattn._runtime import NgramIndex

if TYPE_CHECKING:
    import torch

    from fastattn.engine.request import Request


@dataclass(frozen=True)
class Drafts:
    """Guesses at the tokens that come next.

    token_ids: of each request, in order; a request without any has no entry. logits (D, vocab_size): what those tokens were
    drawn from, and rows: which of its rows belongs to each token. Without logits the guesses are not random.
    """

    token_ids: dict[Request, list[int]] = field(default_factory=dict)
    logits: torch.Tensor | None = None
    rows: dict[Request, list[int]] = field(default_factory=dict)


class Proposer(Protocol):
    """Guesses what the model will say. It may be wrong, at no cost but time; the model has the last word.

    A request's tokens only ever grow between two calls (preemption takes its blocks, not its tokens), so that what is kept
    of it can grow too. It is asked about again, or released, never both.
    """

    def propose(self, wanted: Mapping[Request, int]) -> Drafts:
        """At most so many tokens for each request, which is at its last token."""
        ...

    def release(self, request: Request) -> None:
        """The request ended, or may never be asked about; nothing of it is kept."""
        ...

    def check(self) -> None:
        """Raises RuntimeError if the bookkeeping is broken."""
        ...


class NgramProposer:
    """Prompt lookup (https://github.com/apoorvumang/prompt-lookup-decoding): what followed these tokens the last time."""

    def __init__(self, min_n: int, max_n: int) -> None:
        self._min_n, self._max_n = min_n, max_n
        self._indexes: dict[Request, NgramIndex] = {}

    def propose(self, wanted: Mapping[Request, int]) -> Drafts:
        token_ids = {}
        for request, count in wanted.items():
            if request not in self._indexes:
                self._indexes[request] = NgramIndex(self._min_n, self._max_n)
            index = self._indexes[request]
            index.extend(request.seq.tokens(len(index)))
            if found := index.propose(count):
                token_ids[request] = found
        return Drafts(token_ids)

    def release(self, request: Request) -> None:
        self._indexes.pop(request, None)

    def check(self) -> None:
        for request, index in self._indexes.items():
            if len(index) > len(request.seq):
                raise RuntimeError(f"invariant broken: the index of {request.request_id!r} is ahead of its tokens")
