"""What guessing costs and brings, measured while serving: whether to guess in the next step, and how much.

The accepted tokens per second that a draft length promises: SmartSpec's goodput (https://arxiv.org/abs/2406.14066).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable

_KEPT = 5  # samples of a cost
_ENOUGH = 2  # before it is believed
_DOUBT, _FORGET = 25, 2000  # steps for which a cost is believed: twice as long with each sample, and at most
_FIRST_PROBE, _LAST_PROBE = 64, 1024  # steps without a guess, because it would not pay, before one is made all the same
_MEMORY = 0.98  # how much of an average one more observation leaves

_Known = tuple[list[int], list[float]]  # amounts, in order, and the seconds of each


class Costs:
    """Seconds that something takes, by the number of sequences and an amount on top of it.

    Both are rounded up to quarters of an octave. A cost is the least of its last few samples, since what disturbs a clock
    only ever adds to it; the first run of anything on a GPU (loading, recording a graph) is told apart in the same way. What
    was seen seldom is soon doubted, so that two bad samples do not decide for long.
    """

    def __init__(self) -> None:
        self._samples: dict[int, dict[int, deque[float]]] = {}
        self._doubted_at: dict[tuple[int, int], int] = {}
        self._num_seen: Counter[tuple[int, int]] = Counter()

    def record(self, now: int, num_seqs: int, amount: int, seconds: float) -> None:
        """now: counts steps."""
        n, a = _rounded(num_seqs), _rounded(amount)
        self._samples.setdefault(n, {}).setdefault(a, deque(maxlen=_KEPT)).append(seconds)
        self._num_seen[n, a] += 1
        self._doubted_at[n, a] = now + min(_FORGET, _DOUBT * 2 ** min(self._num_seen[n, a], 8))

    def known(self, now: int, num_seqs: int) -> _Known:
        """What is believed for so many sequences."""
        n = _rounded(num_seqs)
        samples = self._samples.get(n, {})
        amounts = sorted(a for a in samples if len(samples[a]) >= _ENOUGH and now < self._doubted_at[n, a])
        return amounts, [min(samples[a]) for a in amounts]


class DraftBudget:
    """How many tokens to guess for each request in the next step, at most: what makes tokens per second the most.

    A step's seconds with so many sequences and drafts, and those of guessing, are measured. What is not known yet is taken
    to cost what the nearest smaller amount does, so that it is tried and then known. What drafts bring follows from how
    often one is right if those before it were, over all requests.
    """

    def __init__(self, most: int) -> None:
        self._caps = [cap for cap in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if cap < most] + [most]
        self._steps, self._proposals = Costs(), Costs()
        self._now = 0
        self._since_guess, self._probe_after, self._may_probe = 0, _FIRST_PROBE, False
        self.acceptance = 0.7  # of a draft whose predecessors are right
        self.found = 1.0  # drafts per token that was asked for: a lookup may find nothing

    def choose(self, lengths: Iterable[int]) -> int:
        """The cap for a step of sequences for which so many tokens are wanted; 0 guesses nothing."""
        counts = Counter(lengths)
        steps = self._steps.known(self._now, counts.total())
        if not steps[0] or steps[0][0] > 0:
            self._may_probe = False
            return 0  # what a step without drafts costs comes first
        proposals = self._proposals.known(self._now, counts.total() - counts[0])
        best = self._best(counts, steps, proposals, self.acceptance, self.found)
        if best > 0:
            self._since_guess, self._probe_after = 0, _FIRST_PROBE
        else:
            most = Counter({self._caps[-1]: counts.total()})
            self._may_probe = self._best(most, steps, proposals, 1.0, 1.0) > 0
        return best

    def _best(self, counts: Counter[int], steps: _Known, proposals: _Known, acceptance: float, found: float) -> int:
        num_seqs = counts.total()
        best, best_speed = 0, num_seqs / steps[1][0]
        # What guessing costs is found out with one token each.
        for cap in self._caps if proposals[0] else self._caps[:1]:
            drafted, gained = 0, 0.0
            for length, count in counts.items():
                guesses = min(cap, length)
                drafted += count * guesses
                gained += count * _gain(acceptance, guesses)
            speed = (num_seqs + found * gained) / (_at(steps, found * drafted) + _proposal_seconds(proposals, cap))
            if speed > best_speed:
                best, best_speed = cap, speed
        return best

    def must_probe(self) -> bool:
        """After `choose` said 0: whether to guess one token of one request all the same, to see if that is still right.

        Each such probe doubles the wait for the next, but one that is right is followed by another at once. There are none
        where guesses would not pay even if all were right.
        """
        self._since_guess += 1
        if not self._may_probe or self._since_guess < self._probe_after:
            return False
        self._since_guess, self._probe_after = 0, min(2 * self._probe_after, _LAST_PROBE)
        return True

    def record_proposal(self, num_seqs: int, cap: int, num_asked: int, num_found: int, seconds: float) -> None:
        """num_seqs: how many were guessed for; num_asked: tokens, up to ``cap`` for each of them."""
        self._proposals.record(self._now, num_seqs, cap, seconds)
        self.found = _MEMORY * self.found + (1 - _MEMORY) * num_found / num_asked

    def record_step(self, num_seqs: int, num_drafts: int, seconds: float) -> None:
        """seconds: of a step that had so many drafts and did nothing but decode."""
        self._now += 1
        self._steps.record(self._now, num_seqs, num_drafts, seconds)

    def record_verdict(self, num_drafted: int, num_accepted: int) -> None:
        if num_accepted == num_drafted:
            self._since_guess = self._probe_after
        num_trials = num_accepted + (num_accepted < num_drafted)
        weight = _MEMORY**num_trials
        self.acceptance = weight * self.acceptance + (1 - weight) * num_accepted / num_trials


def _rounded(count: int) -> int:
    """Up to a quarter of an octave, in whole numbers: 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, …"""
    if count <= 4:
        return count
    step = 1 << ((count - 1).bit_length() - 3)
    return -(-count // step) * step


def _gain(acceptance: float, length: int) -> float:
    """Tokens that so many guesses bring."""
    return float(length) if acceptance >= 1 else acceptance * (1 - acceptance**length) / (1 - acceptance)


def _at(known: _Known, amount: float) -> float:
    """Between two known amounts on the line through them, above all what the highest costs."""
    amounts, seconds = known
    i = bisect_left(amounts, amount)
    if i == len(amounts):
        return seconds[-1]
    if i == 0:
        return seconds[0]
    a, b, low, high = amounts[i - 1], amounts[i], seconds[i - 1], seconds[i]
    return low + (high - low) * (amount - a) / (b - a)


def _proposal_seconds(known: _Known, cap: int) -> float:
    """In proportion to the cap from the nearest one that is known, of two the smaller; nothing as long as none is."""
    amounts, seconds = known
    if not amounts:
        return 0.0
    i = bisect_left(amounts, cap)
    if i == len(amounts) or (i > 0 and cap - amounts[i - 1] <= amounts[i] - cap):
        i -= 1
    return seconds[i] * cap / amounts[i]
