"""Attention in levels: what attention to all keys at once gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import ops
from tests.harness.compare import bits
from tests.harness.opspec import to_device

HEADS, DIM = (8, 2), 64


def make_batch(block_size: int, shared: int, own: list[int], counts: list[int], dtype: torch.dtype) -> dict[str, Any]:
    """Sequences of `shared` pages that all have and some keys of their own; NaN in all that none has."""
    rng = torch.Generator().manual_seed(len(own) + shared)
    lengths = [shared * block_size + n for n in own]
    pages = [-(-n // block_size) for n in lengths]
    order = torch.randperm(shared + sum(n - shared for n in pages) + 2, generator=rng).int()
    table = torch.full((len(own), max(pages)), 2**30, dtype=torch.int32)
    used = torch.zeros(len(order), block_size, dtype=torch.bool)
    free = shared
    for b, n in enumerate(pages):
        table[b, :shared] = order[:shared]
        table[b, shared:n] = order[free : free + n - shared]
        free += n - shared
        for t in range(lengths[b]):
            used[table[b, t // block_size], t % block_size] = True
    k, v = (torch.randn(len(order), block_size, HEADS[1], DIM, generator=rng).to(dtype) for _ in range(2))
    if dtype.itemsize > 1:
        k[~used] = v[~used] = torch.nan
    return {
        "q": torch.randn(sum(counts), HEADS[0], DIM, generator=rng).to(
            torch.bfloat16 if dtype.itemsize == 1 else dtype
        ),
        "k_cache": k,
        "v_cache": v,
        "cu_seqlens_q": torch.tensor([0, *counts]).cumsum(0).int(),
        "seqused_k": torch.tensor(lengths, dtype=torch.int32),
        "block_table": table,
        "max_seqlen_q": max(counts),
    }


def cascade(call: dict[str, Any], num_shared_blocks: int, **options: Any) -> tuple[Tensor, Tensor]:
    batch = [call[name] for name in ("cu_seqlens_q", "seqused_k", "block_table", "max_seqlen_q")]
    levels = ops.shared_prefix_levels(*batch, num_shared_blocks=num_shared_blocks, block_size=call["k_cache"].shape[1])
    return ops.cascade_attention(call["q"], call["k_cache"], call["v_cache"], levels, **options)


def check(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """Rounded twice where one call rounds once."""
    eps = torch.finfo(dtype).eps * (1 if dtype.itemsize == 2 else 8)  # in fp32 the order of sums is more
    torch.testing.assert_close(found[0].float(), expected[0].float(), rtol=2 * eps, atol=4 * eps)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=2e-3 if dtype.itemsize == 2 else 1e-5)


@pytest.mark.parametrize("counts", [[1] * 5, [1, 7, 1, 40, 2], [0, 1, 3, 0, 70]], ids=["decode", "mixed", "prompts"])
@pytest.mark.parametrize(("block_size", "shared"), [(16, 9), (8, 1), (5, 3)])
def test_shared_prefix(block_size: int, shared: int, counts: list[int], device: str) -> None:
    own = [1, 70, 9, 41, 129]
    own = [max(n, count) for n, count in zip(own, counts, strict=True)]
    for dtype in (torch.bfloat16, torch.float16) if device == "cuda" else (torch.bfloat16, torch.float32):
        call = to_device(make_batch(block_size, shared, own, counts, dtype), device)
        sinks = torch.linspace(-1, 2, HEADS[0], device=device)
        for options in ({}, {"softcap": 3.0, "softmax_scale": 0.2}, {"sinks": sinks}, {"causal": False}):
            check(cascade(call, shared, **options), ops.paged_attention(**call, **options), dtype)
        alone, whole = cascade(call, 0), ops.paged_attention(**call)
        assert torch.equal(bits(alone[0]), bits(whole[0])) and torch.equal(bits(alone[1]), bits(whole[1]))


def test_caches_of_8_bits_and_trees(device: str) -> None:
    call = to_device(make_batch(16, 4, [20, 33, 9], [3, 5, 1], torch.float8_e4m3fn), device)
    scales = {name: torch.tensor([0.5, 1.5], device=device) for name in ("k_scale", "v_scale")}
    words = torch.tensor([1, 3, 5, 1, 3, 5, 11, 19, 1], device=device)
    for options in (scales, scales | {"tree_mask": words}):
        check(cascade(call, 4, **options), ops.paged_attention(**call, **options), torch.bfloat16)


def test_levels_of_groups(device: str) -> None:
    """Three levels: all share two pages, two pairs of sequences share one more each, and one sequence has no third."""
    call = make_batch(8, 2, [20, 21, 30, 9], [1, 2, 1, 1], torch.bfloat16)
    table, lengths = call["block_table"], call["seqused_k"]
    table[1, 2], table[3, 2] = table[0, 2], table[2, 2]
    call["k_cache"].nan_to_num_(0.25), call["v_cache"].nan_to_num_(0.5)
    call = to_device(call, device)
    table, lengths = call["block_table"], call["seqused_k"]

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    levels = [
        ops.CascadeLevel(ints(0, 5), ints(16), table[:1, :2], 5),
        ops.CascadeLevel(ints(0, 3, 5), ints(8, 8), table[::2, 2:3], 3),
        ops.CascadeLevel(call["cu_seqlens_q"], lengths - 24, table[:, 3:], 2),
    ]
    found = ops.cascade_attention(call["q"], call["k_cache"], call["v_cache"], levels)
    check(found, ops.paged_attention(**call), torch.bfloat16)
    no_keys = ops.CascadeLevel(ints(0, 5), ints(0), table[:1], 5)
    again = ops.cascade_attention(call["q"], call["k_cache"], call["v_cache"], [levels[0], no_keys, *levels[1:]])
    assert torch.equal(bits(again[0]), bits(found[0]))


@pytest.mark.gpu
def test_one_graph_serves_later_lengths() -> None:
    call = to_device(make_batch(16, 6, [100, 70, 120], [1, 1, 1], torch.bfloat16), "cuda")
    cascade(call, 6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = cascade(call, 6)
    call["seqused_k"] -= 30
    call["q"].normal_()
    graph.replay()
    check(found, ops.paged_attention(**call), torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_shared_blocks": -1}, ValueError, "num_shared_blocks is -1, expected 0 ≤ num_shared_blocks"),
        ({"num_shared_blocks": 8}, ValueError, "num_shared_blocks is 8, expected 0 ≤ num_shared_blocks ≤ 7, the width of"),
        ({"num_shared_blocks": 1.0}, TypeError, "num_shared_blocks is 1.0, a float, expected an int"),
        ({"num_shared_blocks": 5}, ValueError, r"block_table\[1\] begins with \[.*\], expected \[.*\], as \[0\]"),
        ({"seqused_k": torch.tensor([70, 64], dtype=torch.int32)}, ValueError, r"seqused_k\[1\] is 64, expected more than the 64"),
        (
            {"cu_seqlens_q": torch.tensor([0, 1, 5], dtype=torch.int32), "seqused_k": torch.tensor([65, 67], dtype=torch.int32)},
            ValueError,
            r"seqused_k\[1\] is 67, expected more than the 64 keys that are shared, those of its 4 queries at least",
        ),
        ({"block_size": 2**31 - 1}, ValueError, r"seqused_k\[0\] is 104, expected more than the 8589934588"),
        ({"block_size": 0}, ValueError, "block_size is 0, expected 1 ≤ block_size"),
        ({"block_size": 16.0}, TypeError, "block_size is 16.0, a float, expected an int"),
        ({"seqused_k": [104, 97]}, TypeError, "seqused_k is a list, expected a torch.Tensor"),
        ({"block_table": [[0], [0]]}, TypeError, "block_table is a list, expected a torch.Tensor"),
        ({"seqused_k": torch.tensor([104, 97])}, TypeError, "seqused_k is torch.int64, expected torch.int32"),
        ({"block_table": torch.zeros(0, 4, dtype=torch.int32)}, ValueError, r"block_table has shape \(0, 4\)"),
    ],
)  # fmt: skip
def test_bad_prefixes(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call = make_batch(16, 4, [40, 33], [1, 1], torch.float32)
    batch = {name: call[name] for name in ("cu_seqlens_q", "seqused_k", "block_table", "max_seqlen_q")}
    with pytest.raises(error, match=f"shared_prefix_levels: {message}"):
        ops.shared_prefix_levels(**{**batch, "num_shared_blocks": 4, "block_size": 16, **change})


def test_bad_levels() -> None:
    call = make_batch(16, 4, [40, 33], [1, 1], torch.float32)
    own = ops.CascadeLevel(*(call[name] for name in ("cu_seqlens_q", "seqused_k", "block_table", "max_seqlen_q")))
    tensors = (call["q"], call["k_cache"], call["v_cache"])
    for levels, error, message in (
        ([], ValueError, "levels is empty"),
        (own.block_table, TypeError, "levels is a Tensor, expected a list of CascadeLevel"),
        ([own, tuple(own)], TypeError, r"levels\[1\] is a tuple, expected a CascadeLevel"),
        ([own, own._replace(seqused_k=own.seqused_k.long())], TypeError, r"levels\[1\]: paged_attention: seqused_k is torch.int64"),
        ([own._replace(max_seqlen_q=0)], ValueError, r"levels\[0\]: paged_attention: max_seqlen_q is 0"),
    ):  # fmt: skip
        with pytest.raises(error, match=f"cascade_attention: {message}"):
            ops.cascade_attention(*tensors, levels)  # type: ignore[arg-type]
