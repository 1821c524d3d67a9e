"""What the host does in a step of decoding does not grow with the number of requests: counted in calls, not in time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import count
from types import FrameType
from typing import Any

import pytest
import torch

from bench.families.host import Decoding, decoding
from bench.harness.case import Context


def calls_in_a_step(load: Decoding) -> int:
    """The fewest of some steps: in the others blocks are filled. Every turn of a generator is one too."""
    counter: Iterator[int] = count()

    def see(frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            next(counter)

    numbers = []
    for _ in range(16):
        start = next(counter)
        sys.setprofile(see)
        try:
            load.step()
        finally:
            sys.setprofile(None)
        numbers.append(next(counter) - start - 1)
    return min(numbers)


def started(num_seqs: int, kind: Any) -> Decoding:
    load = Decoding(num_seqs, kind)
    load.start()
    return load


def test_a_decode_step_calls_nothing_for_a_request() -> None:
    few, many = (calls_in_a_step(started(n, "final")) for n in (2, 14))
    assert many == few > 0


def test_a_stream_costs_few_calls() -> None:
    few, many = (calls_in_a_step(started(n, "delta")) for n in (2, 14))
    assert 12 < many - few <= 12 * 25  # an output is made for each


@pytest.mark.parametrize("kind", ["final", "delta"])
def test_the_benchmark_s_own_check(kind: Any) -> None:
    assert decoding(Context(torch.device("cpu")), 3, kind).check().share == 0.0
