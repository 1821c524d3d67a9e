"""Prompt lookup against a search through all positions."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn._runtime import NgramIndex
from tests.harness.growth import assert_grows_less


def brute_force(tokens: list[int], min_n: int, max_n: int, max_tokens: int) -> list[int]:
    """What followed the latest earlier occurrence of the longest suffix that has one, as if the text repeated itself."""
    for n in range(min(max_n, len(tokens)), min_n - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[-n:]:
                period = tokens[end:]
                return (period * max_tokens)[:max_tokens]
    return []


@given(
    parts=st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=8),
    min_n=st.integers(1, 4),
    more=st.integers(0, 4),
    max_tokens=st.integers(0, 6),
)
@settings(max_examples=500, deadline=None)
def test_equals_brute_force_after_every_part(parts: list[list[int]], min_n: int, more: int, max_tokens: int) -> None:
    index = NgramIndex(min_n, min_n + more)
    tokens: list[int] = []
    for part in parts:
        index.extend(part)
        tokens += part
        assert len(index) == len(tokens)
        assert index.propose(max_tokens) == brute_force(tokens, min_n, min_n + more, max_tokens)


def test_10_000_tokens_of_a_repetitive_text() -> None:
    rng = random.Random(0)
    phrases = [[rng.randrange(1000) for _ in range(rng.randrange(2, 30))] for _ in range(40)]
    index, tokens = NgramIndex(2, 5), []
    num_hits = 0
    while len(tokens) < 10_000:
        for token in rng.choice(phrases):
            index.extend([token])
            tokens.append(token)
            if rng.random() < 0.02:
                expected = brute_force(tokens, 2, 5, 8)
                assert index.propose(8) == expected
                num_hits += bool(expected)
    assert num_hits > 100


def test_extend_is_linear() -> None:
    """Ten times the tokens may take at most thirty times as long; a quadratic index would take a hundred."""

    def seconds(count: int) -> float:
        tokens = [i * 7919 % 4099 for i in range(count)]
        start = time.thread_time()
        NgramIndex(1, 4).extend(tokens)
        return time.thread_time() - start

    assert_grows_less(seconds, 20_000, 200_000, 30)


@pytest.mark.parametrize(
    ("min_n", "max_n", "message"),
    [
        (0, 3, "NgramIndex: min_n is 0, allowed is 1 or more"),
        (3, 2, "NgramIndex: max_n is 2, allowed is min_n = 3 to 64"),
        (1, 65, "NgramIndex: max_n is 65, allowed is min_n = 1 to 64"),
    ],
)
def test_bad_sizes(min_n: int, max_n: int, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        NgramIndex(min_n, max_n)
    assert str(caught.value) == message


def test_bad_calls_change_nothing() -> None:
    index = NgramIndex(1, 2)
    index.extend([1, 2, 1])
    with pytest.raises(ValueError, match=r"NgramIndex\.extend: token is -1, allowed is 0 to 2\*\*31 - 1"):
        index.extend([5, -1])
    with pytest.raises(ValueError, match=r"NgramIndex\.propose: max_tokens is -1, allowed is 0 or more"):
        index.propose(-1)
    assert len(index) == 3
    assert index.propose(5) == [2, 1, 2, 1, 2]
