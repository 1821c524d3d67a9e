"""How a model is cut: each part belongs to one rank (KV heads may to several), and the parts put together are the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastattn.models.config import ModelConfig, RopeConfig
from fastattn.models.registry import build_meta
from fastattn.nn import Shard, TensorParallel
from fastattn.nn.shard import split, split_heads, split_unit


@given(st.integers(1, 5000), st.integers(1, 16), st.sampled_from([1, 2, 8, 128]))
def test_split_covers_everything_once_larger_parts_first(total: int, parts: int, unit: int) -> None:
    pieces = [split(total, parts, index, unit) for index in range(parts)]
    assert [start for start, _ in pieces] == [sum(n for _, n in pieces[:i]) for i in range(parts)]
    lengths = [length for _, length in pieces]
    assert sum(lengths) == total
    assert lengths == sorted(lengths, reverse=True)
    assert all(start % unit == 0 for start, length in pieces if length)
    assert max(lengths) - min(lengths) <= 2 * unit - 1  # a unit, and what the last one lacks


@given(st.integers(1, 5000), st.integers(1, 16))
def test_the_unit_leaves_no_part_empty(total: int, parts: int) -> None:
    unit = split_unit(total, parts)
    lengths = [split(total, parts, index, unit)[1] for index in range(parts)]
    assert all(lengths) or total < parts
    assert total < 128 * parts or unit == 128


@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_heads(num_kv_heads: int, group: int, data: st.DataObject) -> None:
    """Every query head is on one rank, with its KV head, and a rank's groups have one size: what the kernels ask for."""
    num_heads = num_kv_heads * group
    parts = data.draw(st.integers(1, num_heads))
    queries: list[int] = []
    sizes = []
    for index in range(parts):
        q, kv = split_heads(num_heads, num_kv_heads, parts, index)
        assert q.length >= 1
        assert q.length % kv.length == 0
        for place in range(q.length):
            assert (q.start + place) // group == kv.start + place // (q.length // kv.length)
        queries += range(q.start, q.start + q.length)
        sizes.append((kv.length, q.length))
    assert queries == list(range(num_heads))
    assert max(sizes) == sizes[0]
    assert sum(kv for kv, _ in sizes) == max(
        parts, num_kv_heads
    )  # replicated only where there are more ranks than heads


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (2, [((0, 6), (0, 2)), ((6, 3), (2, 1))]),
        (3, [((0, 3), (0, 1)), ((3, 3), (1, 1)), ((6, 3), (2, 1))]),
        (4, [((0, 3), (0, 1)), ((3, 3), (1, 1)), ((6, 2), (2, 1)), ((8, 1), (2, 1))]),
    ],
)
def test_nine_query_heads_and_three_kv_heads(
    parts: int, expected: list[tuple[tuple[int, int], tuple[int, int]]]
) -> None:
    found = [split_heads(9, 3, parts, index) for index in range(parts)]
    assert [((q.start, q.length), (kv.start, kv.length)) for q, kv in found] == expected


def test_a_shard_in_other_units() -> None:
    shard = Shard(1, 6, 3, 9)
    assert shard.times(64) == Shard(1, 384, 192, 576)
    assert shard.times(64).over(64) == shard
    assert shard.full_shape((5, 3)) == (5, 9)
    assert torch.equal(torch.arange(18).view(2, 9)[shard.slices], torch.tensor([[6, 7, 8], [15, 16, 17]]))
    with pytest.raises(ValueError, match=r"Shard\(dim=1, start=384.*multiples of 256"):
        Shard(1, 384, 192, 576).over(256)


def config(**changes: object) -> ModelConfig:
    sizes: dict[str, object] = {
        "architecture": "llama", "vocab_size": 101, "hidden_size": 72, "intermediate_size": 100, "num_layers": 1,
        "num_heads": 9, "num_kv_heads": 3, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope": RopeConfig(), "attention_bias": True, "attention_out_bias": True, "mlp_bias": True,
    }  # fmt: skip
    return ModelConfig(**(sizes | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_the_shards_of_all_ranks_are_the_model(size: int, tied: bool) -> None:
    """Every entry of every tensor is on one rank, but for norms (on all) and KV heads that are replicated."""
    whole = {w.name: tuple(w.out.shape) for w in build_meta(config(tie_word_embeddings=tied), 8).weights()}
    ranks = [
        list(build_meta(config(tie_word_embeddings=tied), 8, TensorParallel(r, size)).weights()) for r in range(size)
    ]
    for name, shape in whole.items():
        covered = torch.zeros(shape, dtype=torch.int)
        for weights in ranks:
            (weight,) = [w for w in weights if w.name == name]
            assert weight.full_shape == shape
            part = covered if weight.shard is None else covered[weight.shard.slices]
            assert part.shape == weight.out.shape
            part += 1
        replicated = size > 3 and any(part in name for part in ("k_proj", "v_proj"))
        expected = size if name.endswith("norm.weight") else 1
        assert bool((covered >= 1).all() if replicated else (covered == expected).all()), name
