"""Reference-counted blocks: against a dictionary of counts, on bad calls, and for speed."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fastattn._runtime import BlockPool

NUM_BLOCKS = 13


class BlockPoolMachine(RuleBasedStateMachine):
    """The model is {block: count} of the blocks in use."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.counts: dict[int, int] = {}

    @rule(n=st.integers(0, NUM_BLOCKS + 2))
    def allocate(self, n: int) -> None:
        blocks = self.pool.allocate(n)
        if n > NUM_BLOCKS - len(self.counts):
            assert blocks is None
            return
        assert blocks is not None
        assert len(set(blocks)) == n
        assert not set(blocks) & set(self.counts)
        self.counts.update(dict.fromkeys(blocks, 1))

    @rule(blocks=st.lists(st.integers(-1, NUM_BLOCKS), max_size=6))
    def retain(self, blocks: list[int]) -> None:
        if all(block in self.counts for block in blocks):
            self.pool.retain(blocks)
            for block in blocks:
                self.counts[block] += 1
        else:
            with pytest.raises(ValueError, match=r"BlockPool\.retain: block"):
                self.pool.retain(blocks)

    @rule(blocks=st.lists(st.integers(-1, NUM_BLOCKS), max_size=6))
    def release(self, blocks: list[int]) -> None:
        """Blocks may stand in the list more often than they have references: then nothing at all is released."""
        if all(self.counts.get(block, 0) >= blocks.count(block) for block in blocks):
            after = {block: count - blocks.count(block) for block, count in self.counts.items()}
            assert self.pool.release(blocks) == sum(count == 0 for count in after.values())
            self.counts = {block: count for block, count in after.items() if count}
        else:
            with pytest.raises(ValueError, match=r"BlockPool\.release: block"):
                self.pool.release(blocks)

    @invariant()
    def agrees(self) -> None:
        self.pool.check()
        assert self.pool.num_free == NUM_BLOCKS - len(self.counts)
        assert [self.pool.ref_count(block) for block in range(NUM_BLOCKS)] == [
            self.counts.get(block, 0) for block in range(NUM_BLOCKS)
        ]


BlockPoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestBlockPoolMachine = BlockPoolMachine.TestCase


def test_100_000_random_operations() -> None:
    rng = random.Random(0)
    pool = BlockPool(500)
    held: list[list[int]] = []
    for step in range(100_000):
        if rng.random() < 0.4:
            blocks = pool.allocate(rng.randrange(20))
            if blocks is not None:
                held.append(blocks)
        elif held and rng.random() < 0.3:
            held.append(list(rng.choice(held)))
            pool.retain(held[-1])
        elif held:
            pool.release(held.pop(rng.randrange(len(held))))
        if step % 1000 == 0:
            pool.check()
            assert pool.num_free == 500 - len({block for blocks in held for block in blocks})
    for blocks in held:
        pool.release(blocks)
    pool.check()
    assert pool.num_free == 500


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pool: BlockPool(0), "BlockPool: num_blocks is 0, allowed is 1 to 2**31 - 1"),
        (lambda pool: BlockPool(2**31), "BlockPool: num_blocks is 2147483648, allowed is 1 to 2**31 - 1"),
        (lambda pool: pool.allocate(-1), "BlockPool.allocate: n is -1, allowed is 0 or more"),
        (lambda pool: pool.retain([0, 4]), "BlockPool.retain: block is 4, allowed is 0 to 3"),
        (lambda pool: pool.retain([0, 3]), "BlockPool.retain: block 3 is free"),
        (lambda pool: pool.release([0, -1]), "BlockPool.release: block is -1, allowed is 0 to 3"),
        (lambda pool: pool.release([0, 0]), "BlockPool.release: block 0 has fewer references than are released"),
        (lambda pool: pool.ref_count(4), "BlockPool.ref_count: block is 4, allowed is 0 to 3"),
    ],
)
def test_refusals_change_nothing(call, message: str) -> None:  # type: ignore[no-untyped-def]
    pool = BlockPool(4)
    assert pool.allocate(2) == [0, 1]
    with pytest.raises(ValueError) as caught:
        call(pool)
    assert str(caught.value) == message
    pool.check()
    assert (pool.num_blocks, pool.num_free) == (4, 2)
    assert [pool.ref_count(block) for block in range(4)] == [1, 1, 0, 0]
    assert pool.allocate(2) == [2, 3]


@pytest.mark.parametrize("bad", [None, "ab", [0.5], [2**40], 3])
def test_what_is_no_list_of_ids_is_a_type_error(bad: object) -> None:
    with pytest.raises(TypeError):
        BlockPool(4).release(bad)  # type: ignore[arg-type]


def test_a_million_block_operations_a_second() -> None:
    """An operation is one block allocated, retained or released. The best of five tries is far above the bound (about 10^8
    on a desktop), so that a busy machine passes too."""
    pool = BlockPool(4096)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(100):
            blocks = pool.allocate(512)
            assert blocks is not None
            pool.retain(blocks)
            pool.release(blocks)
            pool.release(blocks)
        best = max(best, 100 * 4 * 512 / (time.perf_counter() - start))
    assert best > 1e6
    assert pool.num_free == 4096
