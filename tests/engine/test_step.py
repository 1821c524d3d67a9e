"""A step as a message: what comes out of the bytes is what went in, and computing it twice gives the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from fastattn._runtime import TokenSequence
from fastattn.engine.batch import Step
from fastattn.engine.engine import Engine
from fastattn.engine.kv_cache import Route

SIZES = st.integers(0, 2**40)
BLOCKS = st.integers(0, 2**31 - 1)


@given(
    st.lists(SIZES, min_size=5, max_size=5),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.lists(st.tuples(SIZES, SIZES), max_size=5),
    st.lists(st.tuples(BLOCKS, BLOCKS, BLOCKS, st.sampled_from(Route)), max_size=5),
)
def test_bytes_and_back(
    sizes: list[int], flags: list[bool], rows: list[tuple[int, int]], copies: list[tuple[int, int, int, int]]
) -> None:
    step = Step(*sizes, *flags, tuple(rows), tuple(copies))
    assert Step.from_bytes(step.to_bytes()) == step


def test_a_rank_needs_the_message_and_the_buffer_alone(make_engine: Callable[..., Engine]) -> None:
    """A second runner that gets nothing but bytes computes the same logits, those of further rows too."""
    leader, follower = make_engine().runner, make_engine().runner
    sequences: list[Any] = [TokenSequence([5, 6, 7, 8, 9]), TokenSequence([10, 11])]
    for index, sequence in enumerate(sequences):
        sequence.add_blocks([index])
    step = leader.buffers.fill(sequences, [5, 2])
    step = Step(step.num_tokens, step.num_seqs, step.num_logits, step.max_seqlen_q, step.nbytes, extra_rows=((1, 3),))
    follower.buffers.host[: step.nbytes].copy_(leader.buffers.host[: step.nbytes])
    ours, theirs = leader.compute(step), follower.compute(Step.from_bytes(step.to_bytes()))
    assert ours.logits is not None and theirs.logits is not None
    assert ours.logits.shape == (2, leader.model.config.vocab_size)
    assert torch.equal(ours.logits, theirs.logits)
    assert ours.extra_logits[0].shape[0] == 3
    assert torch.equal(ours.extra_logits[0], theirs.extra_logits[0])
    assert ours.hidden is not None
    assert torch.equal(ours.extra_logits[0], leader.model.logits(ours.hidden[1:4]))
