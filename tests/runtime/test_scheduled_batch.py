"""What a step does with all of its sequences at once: against the same done one by one, and its refusals."""

from __future__ import annotations

import random

import pytest

from fastattn._runtime import BlockPool, ScheduledBatch, TokenSequence

BLOCK = 8


def decoding(num_prompt: int, num_outputs: int = 0, blocks: int = 4) -> TokenSequence:
    """A sequence at its last token."""
    seq = TokenSequence(list(range(num_prompt)))
    seq.extend([50] * num_outputs)
    seq.add_blocks(list(range(blocks)))
    seq.num_computed = len(seq) - 1
    seq.is_watched = False
    return seq


def test_what_it_says_of_them() -> None:
    plain, chunk, whole, drafted = decoding(3, 2), decoding(20), decoding(9), decoding(4, 1)
    chunk.num_computed = whole.num_computed = 0
    drafted.drafts = [7, 8]
    plain.needs, chunk.needs, whole.needs = 1, 2, 4
    batch = ScheduledBatch([plain, chunk, whole, drafted], [1, 5, 9, 3])
    assert (len(batch), batch.total_tokens, batch.needs, batch.draw_needs) == (4, 18, 7, 5)
    assert not batch.only_decodes
    assert batch.prefills == [1, 2]
    assert (batch.draws, batch.num_drafted) == ([0, 2, 3], [0, 0, 2])
    # At its last token, but that is the prompt's.
    last = ScheduledBatch([plain, decoding(5)], [1, 1])
    assert last.only_decodes and last.prefills == [1]


def test_decodes_are_told_from_the_others() -> None:
    waiting, chunk, drafted = decoding(4), decoding(20), decoding(4, 1)
    waiting.num_computed = len(waiting)
    chunk.num_computed = 8
    drafted.drafts = [7]
    first, second = decoding(3, 1), decoding(5)
    batch, others = ScheduledBatch.of_decodes([first, waiting, chunk, second, drafted])
    assert (len(batch), batch.total_tokens, others) == (2, 2, [1, 2, 4])
    assert batch.advance(BLOCK) == []
    assert (first.num_computed, second.num_computed, drafted.num_computed) == (4, 5, 4)


def test_steps_are_what_they_are_one_by_one() -> None:
    rng = random.Random(0)
    for _ in range(50):
        pairs = []
        for _ in range(rng.randrange(1, 12)):
            arguments = rng.randrange(1, 20), rng.randrange(4)
            ends = rng.randrange(arguments[1] + 1, 8), [99]
            both = decoding(*arguments), decoding(*arguments)
            is_watched, is_streamed, late = (rng.random() < p for p in (0.2, 0.5, 0.2))
            for seq in both:
                seq.set_ends(*ends)
                seq.is_watched, seq.is_streamed = is_watched, is_streamed
            pairs.append((*both, ends[0], late))
        batch = ScheduledBatch([ours for ours, *_ in pairs], [1] * len(pairs))
        for ours, plain, _, late in pairs:
            if late and rng.random() < 0.5:  # ended between the launch and the next step
                for seq in (ours, plain):
                    seq.take_blocks()
                    seq.end()
        filled = batch.advance(BLOCK)
        batch.append_unknown()
        drawn = [rng.choice([-1, 50, 51, 99]) for _ in pairs]
        for ours, _, _, late in pairs:
            if late and rng.random() < 0.5:  # while its token was drawn
                ours.end()
        watched, streamed, num_settled = batch.settle(drawn)
        for row, (ours, plain, most, _) in enumerate(pairs):
            has_ended = ours.has_ended
            if plain.num_blocks > 0:
                plain.num_computed += 1
            assert (row in filled) == (plain.num_blocks > 0 and plain.num_computed % BLOCK == 0)
            is_last = plain.num_outputs + 1 == most or drawn[row] == 99
            left = not has_ended and (ours.is_watched or drawn[row] < 0 or is_last)
            assert (row in watched) == left
            if not has_ended and not left:
                plain.append(drawn[row])
                num_settled -= 1
                assert (row in streamed) == ours.is_streamed
            elif left and plain.num_outputs + 1 < most:
                plain.append_unknown(row)  # for its owner to settle
            assert ours.tokens() == plain.tokens()
            assert (ours.num_outputs, ours.outputs()) == (plain.num_outputs, plain.outputs())
            assert ours.num_computed == plain.num_computed
        assert num_settled == 0


def test_an_end_takes_the_unknown_token_along() -> None:
    seq = decoding(3, 1)
    seq.num_computed = len(seq)
    seq.append_unknown(0)
    assert (len(seq), seq.num_outputs, seq.outputs()) == (5, 1, [50])
    seq.end()
    assert (len(seq), seq.outputs(), seq.has_unknown, seq.has_ended) == (4, [50], False, True)
    assert seq.outputs(1) == []


def test_grow_gives_a_block_to_whose_blocks_are_full_or_nothing() -> None:
    pool = BlockPool(4)
    full, roomy, other = (TokenSequence([1] * n) for n in (9, 5, 17))
    for seq, count in ((full, 1), (roomy, 1), (other, 1)):
        seq.add_blocks(pool.allocate(count) or [])
    full.num_computed, roomy.num_computed, other.num_computed = 8, 4, 8
    assert pool.grow(ScheduledBatch([full, roomy, other], [1, 1, 1]), BLOCK) == 1
    assert (full.num_blocks, other.num_blocks, pool.num_free) == (1, 1, 1)
    assert pool.grow(ScheduledBatch([full, roomy], [1, 1]), BLOCK) == 0
    assert (full.blocks(), roomy.num_blocks, pool.num_free) == ([0, 3], 1, 0)
    pool.check()


def test_shared_blocks_are_those_that_all_begin_with() -> None:
    def of(blocks: list[int], num_computed: int) -> TokenSequence:
        seq = TokenSequence([0] * (num_computed + 1))
        seq.add_blocks(blocks)
        seq.num_computed = num_computed
        return seq

    first, longer, other = of([5, 6, 7, 8], 30), of([5, 6, 7, 9, 10], 39), of([4, 6, 7, 8], 31)

    def shared(at_least: int, *sequences: TokenSequence, least_seqs: int = 2, less: int = 0) -> int:
        keys = at_least * BLOCK * (len(sequences) - 1) - less
        return ScheduledBatch(sequences, [1] * len(sequences)).num_shared_blocks(BLOCK, keys, least_seqs)

    assert shared(1, first, longer) == shared(3, longer, first) == 3
    assert shared(4, first, longer) == 0
    assert shared(3, first, of([5, 6, 7, 8], 31)) == 3  # the fourth is not full
    assert shared(4, first, longer, less=BLOCK) == 3 and shared(4, first, longer, less=BLOCK - 1) == 0
    assert shared(3, first, longer, longer) == 3
    assert shared(3, first, longer, longer, least_seqs=3) == 3 and shared(3, first, longer, least_seqs=3) == 0
    assert shared(1, first, longer, other) == shared(2, other, first) == 0
    assert shared(2, first, of([5, 6, 7], 20)) == 2  # of the shorter one
    assert shared(3, first, of([5, 6, 7], 20)) == 0
    assert ScheduledBatch([], []).num_shared_blocks(BLOCK, 1, 2) == 0


def test_mistakes_are_named() -> None:
    seq, pool = decoding(3), BlockPool(2)
    batch = ScheduledBatch([seq], [1])
    for call, says in (
        (lambda: ScheduledBatch([seq], []), "num_tokens has 0 entries, expected 1"),
        (lambda: ScheduledBatch([None], [1]), r"sequences\[0\] is None"),  # type: ignore[list-item]
        (lambda: ScheduledBatch([seq], [0]), r"num_tokens\[0\] is 0, allowed is 1 or more"),
        (lambda: batch.advance(0), "block_size is 0, allowed is 1 or more"),
        (
            lambda: batch.num_shared_blocks(0, 1, 2),
            "block_size is 0, least_keys 1, least_seqs 2, allowed are 1, 1 and 2",
        ),
        (
            lambda: batch.num_shared_blocks(8, 0, 2),
            "block_size is 8, least_keys 0, least_seqs 2, allowed are 1, 1 and 2",
        ),
        (
            lambda: batch.num_shared_blocks(8, 1, 1),
            "block_size is 8, least_keys 1, least_seqs 1, allowed are 1, 1 and 2",
        ),
        (lambda: pool.grow(batch, 0), "block_size is 0, allowed is 1 or more"),
        (lambda: batch.settle([1, 2]), "drawn has 2 tokens, expected 1"),
        (lambda: seq.outputs(1), "start is 1, allowed is 0 to 0"),
        (lambda: seq.set_ends(0, []), "max_outputs is 0, allowed is 1 or more"),
        (lambda: seq.set_ends(1, [-2]), "set_ends: token is -2, allowed is 0 to"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
