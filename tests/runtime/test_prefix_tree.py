"""The prefix cache against a dictionary of prefixes: what is found, what is kept, what may be evicted, and in which order."""

from __future__ import annotations

import random
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastattn._runtime import BlockPool, PrefixTree, TokenSequence
from tests.harness.growth import assert_grows_less

BLOCK_SIZE = 2
SIZE = 3  # of the blocks of the model
NUM_BLOCKS = 24
Key = tuple[bytes, tuple[int, ...]]  # salt, and the tokens from the beginning up to a block's end


@dataclass(eq=False)
class Holder:
    """A running request: a sequence with blocks for all its tokens."""

    salt: bytes
    seq: TokenSequence

    def key(self, num_blocks: int) -> Key:
        return self.salt, tuple(self.seq.tokens(0, num_blocks * SIZE))


class Model:
    """The tree and a dictionary {prefix: block} beside it; each method does a thing to both and compares."""

    def __init__(self) -> None:
        self.pool = BlockPool(NUM_BLOCKS)
        self.tree = PrefixTree(self.pool, SIZE)
        self.cached: dict[Key, int] = {}
        self.holders: list[Holder] = []
        self.copied: list[int] = []  # blocks that are held until a copy of their beginning is made

    def start(self, salt: bytes, tokens: list[int], max_tokens: int) -> None:
        holder = Holder(salt, TokenSequence(tokens))
        limit = len(tokens) if max_tokens < 0 else min(max_tokens, len(tokens))
        expected = []
        for i in range(1, limit // SIZE + 1):
            if holder.key(i) not in self.cached:
                break
            expected.append(self.cached[holder.key(i)])
        found = self.tree.match(salt, holder.seq, max_tokens)
        assert found == expected
        self.copy_partial(holder, limit, len(found))
        holder.seq.add_blocks(found)
        self.holders.append(holder)
        self.grow(holder, [])

    def copy_partial(self, holder: Holder, limit: int, num_matched: int) -> None:
        """Of the blocks that may follow, the one that begins with the most of the next tokens."""
        salt, tokens = holder.key(num_matched)
        wanted = holder.seq.tokens(len(tokens), limit)
        shared = {}
        for (other, cached), block in self.cached.items():
            if other == salt and len(cached) == len(tokens) + SIZE and cached[: len(tokens)] == tokens:
                pairs = zip(wanted, cached[len(tokens) :], strict=False)
                shared[block] = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(wanted), SIZE))
        most = max(shared.values(), default=0)
        found = self.tree.match_partial(salt, holder.seq, limit, 2)
        if most < 2:
            assert found is None
        else:
            assert found is not None
            assert found[1] == most == shared[found[0]]
            self.copied.append(found[0])

    def end_copies(self) -> None:
        self.pool.release(self.copied)
        self.copied = []

    def grow(self, holder: Holder, tokens: list[int]) -> None:
        """A request that gets no block is ended, as a scheduler would preempt it."""
        holder.seq.extend(tokens)
        missing = -(-len(holder.seq) // SIZE) - holder.seq.num_blocks
        self.evict(max(0, missing - self.pool.num_free))
        blocks = self.pool.allocate(missing)
        if blocks is None:
            self.finish(holder)
        else:
            holder.seq.add_blocks(blocks)

    def insert(self, holder: Holder, num_tokens: int) -> None:
        blocks = holder.seq.blocks()
        new = {}
        for i in range(num_tokens // SIZE):  # a partial block is never cached
            if holder.key(i + 1) not in self.cached:
                new[holder.key(i + 1)] = blocks[i]
        assert self.tree.insert(holder.salt, holder.seq, num_tokens) == len(new)
        self.cached.update(new)

    def finish(self, holder: Holder) -> None:
        self.holders.remove(holder)
        self.pool.release(holder.seq.take_blocks())

    def evict(self, count: int) -> None:
        evictable = self.evictable()
        runs = self.tree.evict_runs(count)
        gone = {key for key, block in self.cached.items() if self.pool.ref_count(block) == 0}
        said = {}
        for salt, tokens, blocks in runs:
            prefix = tuple(memoryview(tokens).cast("i"))
            for left, block in enumerate(reversed(blocks)):
                said[salt, prefix[: len(prefix) - left * SIZE]] = block
        assert said == {key: self.cached[key] for key in gone}
        assert sum(len(blocks) for *_, blocks in runs) == len(gone)
        assert gone <= evictable
        assert len(gone) == min(count, len(evictable))
        for key in gone:
            del self.cached[key]
        for salt, tokens in self.cached:  # a block without the ones before it could never be found again
            assert len(tokens) == SIZE or (salt, tokens[:-SIZE]) in self.cached

    def clear(self) -> None:
        held = self.held()
        assert self.tree.clear() == len(set(self.cached.values()) - held)
        self.cached = {}

    def held(self) -> set[int]:
        return {*self.copied, *(block for holder in self.holders for block in holder.seq.blocks())}

    def evictable(self) -> set[Key]:
        """What no request holds, nor anything after it."""
        held = self.held()
        pinned: set[Key] = set()
        for (salt, tokens), block in self.cached.items():
            if block in held:
                pinned.update((salt, tokens[:end]) for end in range(SIZE, len(tokens) + 1, SIZE))
        return set(self.cached) - pinned

    def check(self) -> None:
        self.pool.check()
        self.tree.check()
        assert self.tree.num_cached == len(self.cached)
        assert self.tree.num_evictable == len(self.evictable())
        counts = Counter(self.cached.values())
        counts.update(self.copied)
        for holder in self.holders:
            counts.update(holder.seq.blocks())
        assert [self.pool.ref_count(block) for block in range(NUM_BLOCKS)] == [counts[b] for b in range(NUM_BLOCKS)]


SALTS = st.sampled_from([b"", b"a", b"\x00b"])
TOKENS = st.lists(st.integers(0, 1), max_size=18)  # few different tokens: many prefixes are shared
PICK = st.integers(0, 2**16)


class PrefixTreeMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def picked(self, pick: int) -> Holder:
        return self.model.holders[pick % len(self.model.holders)]

    @rule(salt=SALTS, tokens=TOKENS, max_tokens=st.integers(-1, 19))
    def start(self, salt: bytes, tokens: list[int], max_tokens: int) -> None:
        self.model.start(salt, tokens, max_tokens)

    @precondition(lambda self: self.model.holders)
    @rule(pick=PICK, tokens=TOKENS)
    def grow(self, pick: int, tokens: list[int]) -> None:
        self.model.grow(self.picked(pick), tokens)

    @precondition(lambda self: self.model.holders)
    @rule(pick=PICK, part=st.floats(0, 1))
    def insert(self, pick: int, part: float) -> None:
        self.model.insert(self.picked(pick), round(part * len(self.picked(pick).seq)))

    @precondition(lambda self: self.model.holders)
    @rule(pick=PICK)
    def finish(self, pick: int) -> None:
        self.model.finish(self.picked(pick))

    @rule()
    def end_copies(self) -> None:
        self.model.end_copies()

    @rule(count=st.integers(0, 8))
    def evict(self, count: int) -> None:
        self.model.evict(count)

    @rule()
    def clear(self) -> None:
        self.model.clear()

    @invariant()
    def agrees(self) -> None:
        self.model.check()


PrefixTreeMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestPrefixTreeMachine = PrefixTreeMachine.TestCase


def test_100_000_random_operations() -> None:
    rng = random.Random(0)
    model = Model()
    num_found = num_copied = 0
    for step in range(100_000):
        choice = rng.random()
        if choice < 0.25 or not model.holders:
            tokens = [rng.randrange(2) for _ in range(rng.randrange(19))]
            model.start(rng.choice([b"", b"a"]), tokens, rng.choice([-1, -1, rng.randrange(19)]))
            num_copied += len(model.copied)
            if rng.random() < 0.8:
                model.end_copies()
            num_found += bool(model.holders and model.holders[-1].seq.num_blocks)
        elif choice < 0.4:
            model.grow(rng.choice(model.holders), [rng.randrange(2) for _ in range(rng.randrange(5))])
        elif choice < 0.65:
            holder = rng.choice(model.holders)
            model.insert(holder, rng.randint(0, len(holder.seq)))
        elif choice < 0.9:
            model.finish(rng.choice(model.holders))
        elif choice < 0.999:
            model.evict(rng.randrange(6))
        else:
            model.clear()
        model.tree.check()
        if step % 100 == 0:
            model.check()
    assert num_found > 1000 and num_copied > 1000
    model.end_copies()
    while model.holders:
        model.finish(model.holders[0])
    model.clear()
    model.check()
    assert model.pool.num_free == NUM_BLOCKS


# ---- one thing at a time ----


def cache(tree: PrefixTree, pool: BlockPool, tokens: list[int], salt: bytes = b"") -> list[int]:
    """Caches a sequence whose blocks then belong to the tree alone; returns the blocks."""
    seq = TokenSequence(tokens)
    seq.add_blocks(tree.match(salt, seq))
    blocks = pool.allocate(len(tokens) // BLOCK_SIZE - seq.num_blocks)
    assert blocks is not None
    seq.add_blocks(blocks)
    tree.insert(salt, seq, len(tokens))
    pool.release(held := seq.take_blocks())
    return held


def num_found(tree: PrefixTree, pool: BlockPool, tokens: list[int], salt: bytes = b"") -> int:
    blocks = tree.match(salt, TokenSequence(tokens))
    pool.release(blocks)
    return len(blocks)


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(NUM_BLOCKS)


@pytest.fixture
def tree(pool: BlockPool) -> PrefixTree:
    return PrefixTree(pool, BLOCK_SIZE)


def test_a_partial_match_is_the_longest_of_many() -> None:
    """In the middle of an edge, at its end and at the root, and never of another tenant."""
    pool = BlockPool(400)
    tree = PrefixTree(pool, 8)
    rng = random.Random(0)
    stem = list(range(8))
    for _ in range(300):
        seq = TokenSequence(stem + [rng.randrange(3) for _ in range(8)])
        seq.add_blocks(tree.match(b"", seq))
        seq.add_blocks(pool.allocate(2 - seq.num_blocks) or [])
        tree.insert(b"", seq, 16)
        pool.release(seq.take_blocks())
    wanted = [1, 1, 2, 0, 0, 1, 2, 9]
    found = tree.match_partial(b"", TokenSequence(stem + wanted))
    assert found is not None and 4 <= found[1] < 8
    pool.release([found[0]])
    in_edge = tree.match_partial(b"", TokenSequence([*stem[:5], 99]))
    assert in_edge is not None and in_edge[1] == 5
    pool.release([in_edge[0]])
    assert tree.match_partial(b"", TokenSequence([*stem[:5], 99]), min_tokens=6) is None
    assert tree.match_partial(b"", TokenSequence([*stem[:5], 99]), max_tokens=4, min_tokens=5) is None
    assert tree.match_partial(b"you", TokenSequence(stem + wanted)) is None
    tree.clear()
    assert pool.num_free == 400


def test_tenants_never_share(tree: PrefixTree, pool: BlockPool) -> None:
    mine = cache(tree, pool, [1, 2, 3, 4], b"me")
    for salt in (b"", b"m", b"me\x00", b"you"):
        assert num_found(tree, pool, [1, 2, 3, 4], salt) == 0
    yours = cache(tree, pool, [1, 2, 3, 4], b"you")
    assert not set(mine) & set(yours)
    assert num_found(tree, pool, [1, 2, 3, 4], b"me") == 2


def test_a_partial_block_is_never_cached(tree: PrefixTree, pool: BlockPool) -> None:
    seq = TokenSequence([1, 2, 3])
    blocks = pool.allocate(2)
    assert blocks is not None
    seq.add_blocks(blocks)
    assert tree.insert(b"", seq, 1) == 0
    assert tree.insert(b"", seq, 3) == 1
    assert tree.num_cached == 1
    assert num_found(tree, pool, [1, 2, 3]) == 1
    assert num_found(tree, pool, [1]) == 0


def test_least_recently_used_goes_first(tree: PrefixTree, pool: BlockPool) -> None:
    """Prompts that share nothing leave in the order of their last use, each from its end."""
    rng = random.Random(0)
    order: OrderedDict[int, int] = OrderedDict()  # first token -> blocks still cached, least recently used first
    num_evicted = 0
    for step in range(3000):
        key = rng.randrange(40)
        count = rng.randint(1, 4)
        tokens = [key, *range(100, 100 + BLOCK_SIZE * count - 1)]
        missing = count - num_found(tree, pool, tokens)
        if key in order:
            order.move_to_end(key)
        while pool.num_free < max(missing, 0) or (rng.random() < 0.1 and order):
            victim = next(iter(order))
            assert tree.evict(1) == 1
            order[victim] -= 1
            if not order[victim]:
                del order[victim]
            num_evicted += 1
        cache(tree, pool, tokens)
        order[key] = max(count, order.get(key, 0))
        order.move_to_end(key)
        if step % 10 == 0:
            tree.check()
            assert tree.num_cached == sum(order.values())
    assert num_evicted > 300


def test_a_shared_beginning_goes_after_what_follows_it(tree: PrefixTree, pool: BlockPool) -> None:
    shared, old = cache(tree, pool, [1, 1, 2, 2])
    _, new = cache(tree, pool, [1, 1, 3, 3])
    (other,) = cache(tree, pool, [9, 9])
    freed = []
    for _ in range(4):
        before = {block for block in (shared, old, new, other) if pool.ref_count(block)}
        assert tree.evict(1) == 1
        freed += [block for block in before if pool.ref_count(block) == 0]
    assert freed == [old, new, shared, other]


def test_what_a_request_holds_stays(tree: PrefixTree, pool: BlockPool) -> None:
    cache(tree, pool, [1, 1, 2, 2])
    cache(tree, pool, [1, 1, 3, 3])
    held = tree.match(b"", TokenSequence([1, 1, 2, 2]))
    assert (tree.num_cached, tree.num_evictable) == (3, 1)
    assert tree.evict(100) == 1
    assert num_found(tree, pool, [1, 1, 2, 2]) == 2
    assert tree.clear() == 0
    assert pool.num_free == NUM_BLOCKS - 2
    assert pool.release(held) == 2


def test_a_tree_of_100_000_levels() -> None:
    """Lookup, eviction and the end of a tree must not recurse: so deep, that would be a crash."""
    depth = 100_000
    pool = BlockPool(2 * depth)
    tree = PrefixTree(pool, 1)
    chain, branch = TokenSequence([0] * depth), TokenSequence([0] * depth)
    for seq in (chain, branch):
        seq.add_blocks(pool.allocate(depth) or [])
    assert tree.insert(b"", chain, depth) == depth
    for level in range(depth - 1, 0, -1):  # from the end on, so that each cut is at the end of the first edge
        branch.truncate(level)
        branch.append(1)
        assert tree.insert(b"", branch, level + 1) == 1
    for seq in (chain, branch):
        pool.release(seq.take_blocks())
    assert tree.num_evictable == tree.num_cached == 2 * depth - 1
    tree.check()
    assert tree.evict(depth // 2) == depth // 2
    assert num_found(tree, pool, [0] * depth) > 0
    tree.check()
    del tree
    pool.check()
    assert pool.num_free == 2 * depth


def test_eviction_is_fast_with_many_different_prompts() -> None:
    """A prompt's eviction must not look at all others: twenty times as many may take at most a hundred times as long."""

    def seconds(count: int) -> float:
        pool = BlockPool(count)
        tree = PrefixTree(pool, BLOCK_SIZE)
        for i in range(count):
            cache(tree, pool, [i, i])
        start = time.thread_time()
        assert tree.evict(count) == count
        return time.thread_time() - start

    assert_grows_less(seconds, 2_000, 40_000, 100)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tree, pool, seq: PrefixTree(pool, 0), "PrefixTree: block_size is 0, allowed is 1 to 2**20"),
        (lambda tree, pool, seq: PrefixTree(None, 2), "PrefixTree: pool is None, expected a BlockPool"),
        (lambda tree, pool, seq: tree.match(b"", seq, -2), "PrefixTree.match: max_tokens is -2, allowed is -1 or more"),
        (
            lambda tree, pool, seq: tree.match_partial(b"", seq, -2),
            "PrefixTree.match_partial: max_tokens is -2, allowed is -1 or more",
        ),
        (
            lambda tree, pool, seq: tree.match_partial(b"", seq, 4, 0),
            "PrefixTree.match_partial: min_tokens is 0, allowed is 1 or more",
        ),
        (lambda tree, pool, seq: tree.insert(b"", seq, -1), "PrefixTree.insert: num_tokens is -1, allowed is 0 to 6"),
        (lambda tree, pool, seq: tree.insert(b"", seq, 7), "PrefixTree.insert: num_tokens is 7, allowed is 0 to 6"),
        (
            lambda tree, pool, seq: tree.insert(b"", seq, 6),
            "PrefixTree.insert: num_tokens is 6, but the sequence has only 2 blocks of 2 tokens",
        ),
        (lambda tree, pool, seq: tree.evict(-1), "PrefixTree.evict: num_blocks is -1, allowed is 0 or more"),
        (lambda tree, pool, seq: tree.insert(b"new", seq, 4), "BlockPool.retain: block 1 is free"),
    ],
)
def test_refusals_change_nothing(call: Callable[..., object], message: str, tree: PrefixTree, pool: BlockPool) -> None:
    assert cache(tree, pool, [1, 2]) == [0]
    seq = TokenSequence([1, 2, 3, 4, 5, 6])
    seq.add_blocks([0, 1])
    with pytest.raises(ValueError) as caught:
        call(tree, pool, seq)
    assert str(caught.value) == message
    tree.check()
    pool.check()
    assert (tree.num_cached, pool.num_free) == (1, NUM_BLOCKS - 1)
