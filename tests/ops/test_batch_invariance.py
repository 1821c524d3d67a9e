"""`paged_attention` with batch_invariant: what the heuristics may look at, and the CPU's operator."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn import _runtime, ops

HEADS = {
    "kv_heads": st.integers(1, 12),
    "group": st.integers(1, 40),
    "head_dim": st.integers(1, 32).map(lambda n: 8 * n),
}
BATCH = st.tuples(st.integers(1, 300), st.integers(1, 32), st.integers(1, 300_000))  # sequences, queries, keys of each


@settings(max_examples=300, deadline=None)
@given(batches=st.lists(BATCH, min_size=2, max_size=4), is_8bit=st.booleans(), data=st.data(), **HEADS)
def test_decode_tiles_and_splits_are_the_same_for_all_batches(
    batches: list[tuple[int, int, int]], is_8bit: bool, data: st.DataObject, kv_heads: int, group: int, head_dim: int
) -> None:
    found = set()
    for num_seqs, queries, keys in batches:
        config = _runtime.paged_decode_config(
            num_seqs, kv_heads * group, kv_heads, head_dim, min(queries, max(1, 32 // group)), keys,
            data.draw(st.sampled_from((1, 78, 132))), data.draw(st.booleans()), data.draw(st.booleans()), is_8bit, True,
        )  # fmt: skip
        if not config["fits"]:
            assert group > 32
            continue
        found.add(tuple(config[name] for name in ("head_dim", "block_n", "num_warps", "split_tiles")))
        assert config["split_tiles"] * config["block_n"] == (512 if is_8bit else 256)
        splits = -(-config["max_tiles"] // num_seqs // config["split_tiles"])
        assert config["slots_of_area"] == (min(splits, 32) + 1 if splits > 1 else 0), "a slot for each split"
        assert config["rows_of_slot"] == min(16, min(queries, max(1, 32 // group)) * group)
    assert len(found) <= 1


@settings(max_examples=300, deadline=None)
@given(batches=st.lists(BATCH, min_size=2, max_size=4), data=st.data(), **HEADS)
def test_prompt_tiles_are_the_same_for_all_batches(
    batches: list[tuple[int, int, int]], data: st.DataObject, kv_heads: int, group: int, head_dim: int
) -> None:
    found = set()
    for num_seqs, queries, keys in batches:
        tokens = data.draw(st.integers(num_seqs, num_seqs * queries))
        shape = (num_seqs, kv_heads * group, kv_heads, head_dim)
        hopper = _runtime.flash_fwd_sm90_config(*shape, head_dim, queries, keys, True, 132, tokens, True)
        portable = _runtime.flash_sm80_config(*shape, queries, keys, 132, True)
        assert hopper["num_splits"] == portable["num_splits"] == 1
        names = ("head_dim", "block_m", "block_n", "packs", "tile_tokens")
        found.add((*(hopper[name] for name in names), portable["block_m"], portable["block_n"]))
    assert len(found) == 1


@pytest.mark.parametrize("eight_bits", [False, True])
def test_a_sequence_alone_has_the_bits_that_it_has_in_a_batch(eight_bits: bool) -> None:
    """Several single tokens of unlike lengths, which the CPU else pads to the longest, among prompts."""
    gen = torch.Generator().manual_seed(5)
    runs, lengths = [1, 1, 7, 1, 1, 3], [40, 33, 20, 0, 64, 17]
    k, v = (torch.randn(30, 16, 2, 32, generator=gen) for _ in "kv")
    scales = {}
    if eight_bits:
        k, v = ((cache * 30).to(torch.int8) for cache in (k, v))
        scales = {name: torch.rand(30, 16, 2, generator=gen) / 30 for name in ("k_scale", "v_scale")}
    table = torch.randperm(30, generator=gen).int()[:24].view(6, 4)
    starts = torch.tensor([0, *runs]).cumsum(0).int()
    q = torch.randn(sum(runs), 6, 32, generator=gen)
    used = torch.tensor(lengths).int()

    def attend(members: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        rows = torch.cat([q[starts[b] : starts[b + 1]] for b in members])
        own = torch.tensor([0, *(runs[b] for b in members)]).cumsum(0).int()
        out, lse = ops.paged_attention(
            rows, k, v, own, used[members], table[members], 7, batch_invariant=True, **scales
        )
        return [(out[i:j], lse[:, i:j]) for i, j in pairwise(own.tolist())]

    alone = [attend([b])[0] for b in range(6)]
    for members in ([0, 1, 2, 3, 4, 5], [4, 1, 0], [5, 3, 1, 4, 0, 2]):
        for b, (out, lse) in zip(members, attend(members), strict=True):
            assert torch.equal(out, alone[b][0])
            assert torch.equal(lse, alone[b][1])
