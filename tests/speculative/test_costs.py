"""Guessing as much as pays: against worlds whose costs and chances are known, and a clock that is theirs."""

from __future__ import annotations

import itertools
import random

import pytest

from fastattn.speculative.costs import DraftBudget

MOST = 8
FLAT = "as many tokens at once as you like"  # a small model on a GPU: a step is launches and weights
LINEAR = "every token costs"  # a CPU


def step_seconds(shape: str, num_seqs: int, num_drafts: int) -> float:
    tokens = num_seqs + num_drafts
    return 1.0 + 0.002 * tokens if shape == FLAT else 0.3 + 0.1 * tokens


def chances(acceptance: float) -> list[float]:
    """Of 0, 1, … right drafts in a row."""
    return [acceptance**i * (1 - acceptance) for i in range(MOST)] + [acceptance**MOST]


def expected_speed(shape: str, num_seqs: int, acceptance: float, found: float, per_guess: float, cap: int) -> float:
    """Tokens per second if always so many tokens are guessed. A lookup finds something for all or for none."""
    gain = sum(acceptance**i for i in range(1, cap + 1))
    with_drafts = step_seconds(shape, num_seqs, num_seqs * cap)
    seconds = found * with_drafts + (1 - found) * step_seconds(shape, num_seqs, 0)
    return num_seqs * (1 + found * gain) / (seconds + per_guess * cap)


def simulated_speed(
    shape: str, num_seqs: int, acceptance: float, found: float, per_guess: float, noise: float, num_steps: int = 1500
) -> float:
    budget, draw = DraftBudget(MOST), random.Random(1)
    tokens = seconds = 0.0
    for _ in range(num_steps):
        cap = budget.choose([MOST] * num_seqs)
        guessed_for = num_seqs
        if cap == 0 and budget.must_probe():
            cap, guessed_for = 1, 1
        num_drafts = 0
        if cap > 0:
            num_drafts = cap * guessed_for if draw.random() < found else 0
            spent = per_guess * cap * (1 + noise * draw.random() ** 4)
            budget.record_proposal(guessed_for, cap, cap * guessed_for, num_drafts, spent)
            seconds += spent
        spent = step_seconds(shape, num_seqs, num_drafts) * (1 + noise * draw.random() ** 4)
        budget.record_step(num_seqs, num_drafts, spent)
        seconds += spent
        tokens += num_seqs
        for _ in range(guessed_for if num_drafts else 0):
            right = next((i for i in range(cap) if draw.random() >= acceptance), cap)
            budget.record_verdict(cap, right)
            tokens += right
    return tokens / seconds


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_as_fast_as_the_best_fixed_length_and_never_slower_than_none(noise: float) -> None:
    worlds = itertools.product([FLAT, LINEAR], [1, 3, 40], [0.05, 0.4, 0.8, 0.95, 1.0], [0.2, 1.0], [0.0, 0.05, 0.4, 2])
    mean = 1 + noise / 5  # of what the noise adds
    for world in worlds:
        speed = simulated_speed(*world, noise) * mean
        speeds = [expected_speed(*world, cap) for cap in range(MOST + 1)]
        assert speed > 0.88 * max(speeds), (world, speed, speeds)
        assert speed > 0.88 * speeds[0], (world, speed, speeds)


def test_it_goes_on_when_the_text_becomes_predictable_and_stops_when_it_is_no_more() -> None:
    budget = DraftBudget(MOST)

    def caps(right: int) -> list[int]:
        chosen = []
        for _ in range(3000):
            cap = budget.choose([MOST] * 4)
            guessed_for = 4 if cap else int(budget.must_probe())
            drafted = guessed_for * (cap or 1)
            if drafted:
                budget.record_proposal(guessed_for, cap or 1, drafted, drafted, 0.01)
            budget.record_step(4, drafted, step_seconds(LINEAR, 4, drafted))
            for _ in range(guessed_for):
                budget.record_verdict(cap or 1, min(right, cap or 1))
            chosen.append(cap)
        return chosen

    assert max(caps(0)[-500:]) == 0
    assert sum(cap < 3 for cap in caps(MOST)[-500:]) <= 8  # when it looks again what things cost
    assert max(caps(0)[-500:]) == 0


def test_a_slow_first_run_is_not_believed() -> None:
    budget = DraftBudget(4)
    for drafts, seconds in ((0, 60.0), (0, 1.0), (0, 1.0), (8, 60.0), (8, 1.1), (8, 1.1)):
        budget.record_step(2, drafts, seconds)
    budget.record_proposal(2, 4, 8, 8, 0.01)
    budget.record_proposal(2, 4, 8, 8, 0.01)
    assert budget.choose([4, 4]) == 4


def test_two_bad_samples_do_not_decide_for_long() -> None:
    budget = DraftBudget(4)
    budget.record_proposal(8, 4, 32, 32, 0.01)
    budget.record_proposal(8, 4, 32, 32, 0.01)
    for drafts, seconds in ((0, 1.0), (0, 1.0), (32, 20.0), (32, 20.0)):
        budget.record_step(8, drafts, seconds)
    caps = []
    for _ in range(300):
        cap = budget.choose([4] * 8)
        drafts = 8 * cap
        if cap:
            budget.record_proposal(8, cap, drafts, drafts, 0.01)
            budget.record_verdict(8 * cap, 8 * cap)
        budget.record_step(8, drafts, 1.0 + 0.05 * drafts)
        caps.append(cap)
    assert 4 not in caps[:20] and min(caps[-50:-10]) == 4
