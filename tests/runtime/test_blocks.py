"""The block pool and the prefix tree against simple models of them, over many random operations."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest

from fastattn._runtime import BlockPool, NgramIndex, PrefixTree, TokenSequence


def test_block_pool_keeps_its_invariants() -> None:
    """10⁵ random operations beside a counter of references."""
    rng = random.Random(0)
    pool, refs = BlockPool(200), Counter[int]()
    for step in range(100_000):
        action = rng.randrange(3)
        if action == 0:
            wanted = rng.randrange(8)
            free = 200 - sum(1 for n in refs.values() if n)
            got = pool.allocate(wanted)
            assert (got is None) == (wanted > free)
            for block in got or []:
                assert refs[block] == 0
                refs[block] = 1
        else:
            live = [b for b in rng.sample(range(200), 5) if refs[b]]
            if action == 1:
                pool.retain(live)
                refs.update(live)
            else:
                freed = pool.release(live)
                refs.subtract(live)
                assert freed == sum(1 for b in live if refs[b] == 0)
        if step % 1000 == 0:
            pool.check()
            assert all(pool.ref_count(b) == refs[b] for b in range(200))


def test_a_block_without_a_reference_is_not_released() -> None:
    pool = BlockPool(4)
    (block,) = pool.allocate(1) or []
    with pytest.raises(ValueError, match=str(block)):
        pool.release([block, block])
    assert pool.ref_count(block) == 1


def test_prefix_tree_finds_what_was_cached_and_only_that() -> None:
    rng = random.Random(1)
    size = 4
    pool = BlockPool(300)
    tree = PrefixTree(pool, size)
    for step in range(3000):
        salt = rng.choice([b"", b"tenant"])
        tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 40))]
        seq = TokenSequence(tokens)
        matched = tree.match(salt, seq)
        assert len(matched) <= len(tokens) // size
        seq.add_blocks(matched)
        needed = len(tokens) // size - len(matched)
        blocks = pool.allocate(needed)
        if blocks is None:
            tree.evict(needed - pool.num_free)
            blocks = pool.allocate(needed)
        assert blocks is not None
        seq.add_blocks(blocks)
        tree.insert(salt, seq, len(tokens))
        again = tree.match(salt, TokenSequence(tokens))
        assert len(again) == len(tokens) // size
        pool.release(again)
        pool.release(seq.take_blocks())
        if step % 100 == 0:
            tree.check()
            pool.check()
    tree.clear()
    assert pool.num_free == 300


def test_tenants_do_not_share() -> None:
    pool = BlockPool(8)
    tree = PrefixTree(pool, 2)
    seq = TokenSequence([1, 2, 3, 4])
    seq.add_blocks(pool.allocate(2) or [])
    tree.insert(b"a", seq, 4)
    assert tree.match(b"b", TokenSequence([1, 2, 3, 4])) == []
    assert len(tree.match(b"a", TokenSequence([1, 2, 3, 4]))) == 2


def test_a_million_block_operations_a_second() -> None:
    pool = BlockPool(4096)
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(50):
            blocks = pool.allocate(1000)
            assert blocks is not None
            pool.release(blocks)
        best = max(best, 100_000 / (time.perf_counter() - begin))
    assert best > 1e6


def test_ngram_index_proposes_what_followed_the_latest_match() -> None:
    rng = random.Random(2)
    for _ in range(300):
        tokens = [rng.randrange(4) for _ in range(rng.randrange(1, 60))]
        index = NgramIndex(1, 3)
        index.extend(tokens)
        expected: list[int] = []
        for n in (3, 2, 1):
            ends = [e for e in range(n, len(tokens)) if n <= len(tokens) and tokens[e - n : e] == tokens[-n:]]
            if ends:
                expected = tokens[ends[-1] : ends[-1] + 5]
                break
        assert index.propose(5) == expected
