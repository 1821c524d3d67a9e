"""`paged_attention` with batch_invariant: what the heuristics may look at, and the CPU's operator."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

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


@settings(max_examples=300, deadline=None)
@given(
    m=st.integers(1, 5000),
    n=st.integers(1, 4000).map(lambda n: 16 * n),
    k=st.integers(1, 2000).map(lambda k: 16 * k),
    num_sms=st.sampled_from((78, 114, 132)),
    kind=st.sampled_from(({}, {"gated": True}, {"two_levels": True, "element_bytes": 1})),
)
def test_a_product_in_order_is_one_run_of_k_for_each_sum(m: int, n: int, k: int, num_sms: int, kind: Any) -> None:
    found = _runtime.gemm_sm90_config(m, n, k, num_sms, in_order=True, **kind)
    assert (found["num_splits"], found["stream_k"]) == (1, False)
    assert found["in_order"] or found["block_n"] > 64, "two groups share the panels of tiles of 64 rows"
    assert found["weight_rows"] % (16 if "gated" in kind else 8) == 0
    assert 0 < found["weight_rows"] <= found["block_n"]
    assert (found["n_tiles"] - 1) * found["weight_rows"] < n <= found["n_tiles"] * found["weight_rows"]


def test_rows_of_products_have_the_bits_that_they_have_alone() -> None:
    """On the CPU, where in fp32 and fp16 the usual ones have others for 1 to 7 rows."""
    gen = torch.Generator().manual_seed(6)
    x, weight, bias = (torch.randn(*shape, generator=gen) for shape in ((40, 999), (100, 999), (100,)))
    q, scale = ops.quantize_fp8(x)
    wq, weight_scale = ops.quantize_fp8(weight)
    like = {"out_dtype": torch.float32, "batch_invariant": True}
    products = [
        lambda i, j: ops.linear(x[i:j], weight, bias, batch_invariant=True),
        lambda i, j: ops.linear(x[i:j].half(), weight.half(), batch_invariant=True),
        lambda i, j: ops.gated_linear(x[i:j], weight, bias, batch_invariant=True),
        lambda i, j: ops.fp8_linear(q[i:j], scale[i:j], wq, weight_scale, bias, **like),
    ]
    for product in products:
        whole = product(0, 40)
        for i, j in ((0, 1), (3, 4), (1, 8), (5, 22)):
            assert torch.equal(product(i, j), whole[i:j])
    with pytest.raises(ValueError, match="batch_invariant is True with fast_accum"):
        ops.fp8_linear(q, scale, wq, weight_scale, fast_accum=True, **like)


@pytest.mark.parametrize("window", [(-1, -1), (9, 0)])
def test_queries_of_a_sequence_have_the_bits_that_they_have_alone(window: tuple[int, int]) -> None:
    """On the CPU, in one call or in several."""
    gen = torch.Generator().manual_seed(7)
    k, v = (torch.randn(5, 16, 2, 32, generator=gen) for _ in "kv")
    q, table = torch.randn(70, 6, 32, generator=gen), torch.tensor([[3, 0, 4, 1, 2]]).int()

    def attend(first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        starts, used = torch.tensor([0, end - first]).int(), torch.tensor([end]).int()
        options: Any = {"window_size": window, "batch_invariant": True}
        return ops.paged_attention(q[first:end], k, v, starts, used, table, end - first, **options)

    out, lse = attend(0, 70)
    for first, end in ((0, 1), (20, 37), (37, 38), (69, 70)):
        for found, expected in zip(attend(first, end), (out[first:end], lse[:, first:end]), strict=True):
            assert torch.equal(found, expected)
