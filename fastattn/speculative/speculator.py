"""Who is guessed for, how much, and what became of it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastattn.speculative.config import SpeculativeConfig
from fastattn.speculative.costs import DraftBudget
from fastattn.speculative.proposer import Drafts, Proposer

if TYPE_CHECKING:
    from fastattn.engine.request import Request

_PATIENCE = 4  # proposals in a row without one right token, after which a request is left alone
_FIRST_PAUSE, _LONGEST_PAUSE = 8, 128  # steps


@dataclass
class DraftLength:
    """How many tokens to guess for one request; follows from what became of its own earlier guesses alone.

    All right: twice as many next time, up to `most`. Else half way to what was right, rounded up. After four proposals in
    a row without one right token: none for 8 steps, then a probe of one token; each probe that fails doubles the pause, up
    to 128 steps, and a right token ends all that.
    """

    most: int

    def __post_init__(self) -> None:
        self.length = self.most
        self._num_failures = 0
        self._pause = 0
        self._next_pause = _FIRST_PAUSE

    def next(self) -> int:
        """For the step that comes now."""
        if self._pause > 0:
            self._pause -= 1
            return 0
        return self.length

    def record(self, num_drafted: int, num_accepted: int) -> None:
        if num_accepted > 0:
            self._num_failures, self._next_pause = 0, _FIRST_PAUSE
            if num_accepted == num_drafted:
                self.length = min(self.most, 2 * max(self.length, num_drafted))
            else:
                self.length = (num_drafted + num_accepted + 1) // 2
            return
        self.length = (num_drafted + 1) // 2
        self._num_failures += 1
        if self._num_failures >= _PATIENCE:
            self._pause, self.length = self._next_pause, 1
            self._next_pause = min(2 * self._next_pause, _LONGEST_PAUSE)


class Speculator:
    """Gives the running requests their drafts before a step, and learns from what the step accepted."""

    def __init__(self, config: SpeculativeConfig, proposer: Proposer) -> None:
        self.config, self.proposer = config, proposer
        self._lengths: dict[Request, DraftLength] = {}
        self._budget = DraftBudget(config.num_speculative_tokens) if config.adaptive_draft_length else None
        self.num_drafts = self.num_draft_tokens = 0
        self.num_accepted_per_position = [0] * config.num_speculative_tokens

    def propose(self, running: Iterable[Request]) -> Drafts:
        """Sets `seq.drafts` of all running requests: empty, or what may come after the one token that is pending."""
        wishes = {}
        for request in running:
            request.seq.drafts = []
            if request.num_pending_tokens == 1 and request.pooling is None:
                wishes[request] = self._num_wanted(request)
        drafts = self._ask(wishes)
        for request, token_ids in drafts.token_ids.items():
            # Nothing comes after an end token.
            end = next((i + 1 for i, token in enumerate(token_ids) if token in request.stop_token_ids), len(token_ids))
            if request.grammar is not None:
                end = min(end, request.grammar.num_valid(token_ids))
            request.seq.drafts = token_ids[:end]
        return drafts

    def _ask(self, wishes: dict[Request, int]) -> Drafts:
        """At most so many drafts for each request, and no more than pay."""
        cap, budget = self.config.num_speculative_tokens, self._budget
        asked = [request for request, length in wishes.items() if length > 0]
        if budget is not None and asked:
            cap = budget.choose(wishes.values())
            if cap == 0:
                asked, cap = (asked[:1], 1) if budget.must_probe() else ([], 0)
        if not asked:
            return Drafts()
        wanted = {request: min(wishes[request], cap) for request in asked}
        started = time.perf_counter()
        drafts = self.proposer.propose(wanted)
        if budget is not None:
            num_found = sum(map(len, drafts.token_ids.values()))
            seconds = time.perf_counter() - started
            budget.record_proposal(len(asked), cap, sum(wanted.values()), num_found, seconds)
        return drafts

    def _num_wanted(self, request: Request) -> int:
        # The last token of all is never a draft: it comes with the verification of the one before it.
        room = request.max_output_tokens - request.num_output_tokens - 1
        if not self.config.adaptive_draft_length:
            return min(room, self.config.num_speculative_tokens)
        if request not in self._lengths:
            self._lengths[request] = DraftLength(self.config.num_speculative_tokens)
        return min(room, self._lengths[request].next())

    def record_step(self, num_seqs: int, num_drafts: int, seconds: float) -> None:
        """What a step took that only decoded, the proposal before it not counted."""
        if self._budget is not None:
            self._budget.record_step(num_seqs, num_drafts, seconds)

    def record(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        """A step verified ``num_drafted`` of the request's drafts, and the first ``num_accepted`` were right."""
        self.num_drafts += 1
        self.num_draft_tokens += num_drafted
        for position in range(num_accepted):
            self.num_accepted_per_position[position] += 1
        metrics = request.metrics
        metrics.num_drafts += 1
        metrics.num_draft_tokens += num_drafted
        metrics.num_accepted_tokens += num_accepted
        if (length := self._lengths.get(request)) is not None:
            length.record(num_drafted, num_accepted)
        if self._budget is not None:
            self._budget.record_verdict(num_drafted, num_accepted)

    def release(self, request: Request) -> None:
        self._lengths.pop(request, None)
        self.proposer.release(request)

    def check(self) -> None:
        self.proposer.check()
