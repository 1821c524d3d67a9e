"""What the attention kernels' heuristics choose: invariants on drawn problems, and how it is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn
from fastattn import _runtime


@settings(max_examples=400, deadline=None)
@given(
    num_seqs=st.integers(1, 300),
    kv_heads=st.integers(1, 16),
    group=st.integers(1, 16),
    head_dim=st.integers(1, 32).map(lambda n: 8 * n),
    max_seqlen_q=st.integers(1, 70_000),
    max_seqlen_k=st.integers(1, 1_000_000),
    causal=st.booleans(),
    num_sms=st.sampled_from((1, 78, 114, 132)),
)
def test_the_order_of_tiles_covers_all(
    num_seqs: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    num_sms: int,
) -> None:
    heads = kv_heads * group
    config = _runtime.flash_fwd_sm90_config(
        num_seqs, heads, kv_heads, head_dim, head_dim, max_seqlen_q, max_seqlen_k, causal, num_sms
    )
    pairs = num_seqs * (kv_heads if config["packs"] else heads)
    assert config["head_dim"] in (64, 80, 96, 128, 192, 256)
    assert 0 <= config["head_dim"] - head_dim < (128 if config["packs"] else 64)
    tokens = config["tile_tokens"]
    assert (config["num_m_tiles"] - 1) * tokens < max_seqlen_q <= config["num_m_tiles"] * tokens
    assert tokens == config["block_m"] // (group if config["packs"] else 1)
    assert 1 <= config["pairs_per_section"] <= pairs
    assert 1 <= config["pairs_in_last"] <= pairs
    assert (config["num_sections"] - 1) * config["pairs_per_section"] + config["pairs_in_last"] == pairs
    assert config["num_tiles"] == pairs * config["num_m_tiles"] * config["num_splits"]
    assert config["num_ctas"] == min(config["num_tiles"], num_sms)
    if causal:  # the end is even: two tiles for each SM, or all there are
        assert config["pairs_in_last"] * config["num_m_tiles"] >= min(2 * num_sms, pairs * config["num_m_tiles"])
    if config["num_splits"] > 1:
        assert pairs * config["num_m_tiles"] < num_sms
        assert config["num_splits"] * 4 <= -(-max_seqlen_k // config["block_n"])


@given(
    lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=40),
    kv_heads=st.integers(1, 9),
    group=st.integers(1, 9),
    max_seqlen_k=st.integers(1, 100_000),
    num_sms=st.sampled_from((1, 132)),
)
def test_packed_sequences_have_no_more_tiles_than_their_lengths_allow(
    lengths: list[int], kv_heads: int, group: int, max_seqlen_k: int, num_sms: int
) -> None:
    heads = kv_heads * group
    config = _runtime.flash_fwd_sm90_config(
        len(lengths), heads, kv_heads, 128, 128, max(lengths), max_seqlen_k, True, num_sms, sum(lengths)
    )
    if config["packs"]:
        heads, group = kv_heads, 1
    tiles = sum(-(-length // config["tile_tokens"]) for length in lengths) * heads
    if tiles == 0:
        return
    at_most = (sum(lengths) // config["tile_tokens"] + len(lengths)) * heads
    assert tiles <= config["num_tiles"] // config["num_splits"] <= at_most
    assert heads % config["heads_of_section"] == 0  # sections are of whole groups, and all alike
    assert config["heads_of_section"] % group == 0
    assert config["num_ctas"] == min(config["num_tiles"], num_sms)


@settings(max_examples=400, deadline=None)
@given(
    num_seqs=st.integers(1, 300),
    kv_heads=st.integers(1, 300),
    group=st.integers(1, 40),
    head_dim=st.integers(1, 32).map(lambda n: 8 * n),
    max_seqlen_q=st.integers(0, 40),
    max_seqlen_k=st.integers(0, 1_000_000),
    num_sms=st.sampled_from((1, 78, 114, 132)),
    large_smem=st.booleans(),
)
def test_decode_has_one_wave_of_ctas(
    num_seqs: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_sms: int,
    large_smem: bool,
) -> None:
    config = _runtime.paged_decode_config(
        num_seqs, kv_heads * group, kv_heads, head_dim, max_seqlen_q, max_seqlen_k, num_sms, large_smem
    )
    rows = group * max_seqlen_q
    if not config["fits"]:
        assert not 0 < rows <= 32 or num_seqs * max_seqlen_k > 1 << 26
        return
    assert config["num_columns"] == kv_heads * -(-rows // config["block_m"])
    assert config["num_ctas"] == config["num_parts"] * config["num_columns"]
    if config["cluster_size"] > 1:  # each column of a sequence is a cluster's
        assert large_smem and rows <= 16 and config["cluster_size"] <= 8
        assert config["num_parts"] == num_seqs * config["cluster_size"]
        assert config["num_ctas"] <= num_sms and config["slots_of_area"] == 0
    else:
        assert 1 <= config["num_parts"] <= config["max_tiles"]
    assert config["max_tiles"] == num_seqs * max(1, -(-max_seqlen_k // config["block_n"]))
    assert config["block_n"] == (32 if head_dim <= 64 else 16) * config["num_warps"]
    assert config["num_ctas"] <= 2 * num_sms or config["num_parts"] == 1
    assert large_smem or config["num_warps"] <= 4


@given(
    num_seqs=st.integers(1, 300),
    kv_heads=st.integers(1, 300),
    group=st.integers(1, 32),
    head_dim=st.integers(1, 32).map(lambda n: 8 * n),
    max_seqlen_k=st.integers(0, 100_000),
)
def test_decode_beside_prompts_leaves_them_sms(
    num_seqs: int, kv_heads: int, group: int, head_dim: int, max_seqlen_k: int
) -> None:
    """One CTA of two teams an SM, and a team for each part of a column, with one row tile or as many as there may be."""
    most = 32 // group
    config = _runtime.paged_decode_config(
        num_seqs, kv_heads * group, kv_heads, head_dim, most, max_seqlen_k, 132, True, beside_prompts=True
    )
    assert config["fits"]
    assert config["num_warps"] == (4 if head_dim <= 128 else 2)
    assert config["num_ctas"] == -(-config["num_teams"] // 2)
    assert 1 <= config["parts_of_head"] <= config["max_tiles"]
    assert config["num_parts"] >= 1
    assert config["num_teams"] >= config["num_parts"] * config["num_columns"]
    assert config["num_teams"] >= config["parts_of_head"] * kv_heads
    if kv_heads <= 32:
        assert config["num_ctas"] <= 132 * 9 // 10


@pytest.mark.parametrize(
    ("dims", "compiled"),
    [
        ((192, 128), (192, 128)),
        ((64, 256), (64, 256)),
        ((64, 128), (128, 128)),
        ((160, 72), (192, 128)),
        ((96, 200), (256, 256)),
    ],
)
def test_head_dims_of_v_have_pairs_of_their_own(dims: tuple[int, int], compiled: tuple[int, int]) -> None:
    config = _runtime.flash_fwd_sm90_config(2, 8, 8, *dims, 1000, 1000, False, 132)
    assert (config["head_dim"], config["v_head_dim"]) == compiled


@pytest.mark.parametrize(
    ("head_dim", "compiled", "tiles"),  # of 128 rows, 2,048, more, with extras
    [
        (64, (64, 64), [(192, 128), (192, 128), (192, 128), (192, 128)]),
        (80, (96, 80), [(128, 192), (192, 128), (192, 128), (128, 192)]),
        (96, (96, 96), [(128, 192), (192, 128), (192, 128), (128, 192)]),
        (112, (128, 128), [(128, 192), (128, 192), (128, 192), (128, 192)]),
        (176, (192, 192), [(128, 128), (128, 128), (128, 160), (128, 128)]),
        (192, (192, 192), [(128, 128), (128, 128), (128, 160), (128, 128)]),
        (256, (256, 256), [(128, 96), (128, 96), (128, 96), (128, 96)]),
    ],
)
def test_fp8_has_head_dims_of_its_own(head_dim: int, compiled: tuple[int, int], tiles: list[tuple[int, int]]) -> None:
    for rows, extras, tile in zip((128, 2048, 2049, 2049), (False, False, False, True), tiles, strict=True):
        config = _runtime.flash_fwd_sm90_config(
            2, 8, 8, head_dim, head_dim, rows, rows, False, 132, fp8=True, extras=extras
        )
        assert (config["head_dim"], config["v_head_dim"]) == compiled
        assert (config["block_m"], config["block_n"]) == tile
    q = torch.empty(2, 1000, 8, head_dim, dtype=torch.float8_e4m3fn, device="meta")
    told = fastattn.explain("flash_fwd", q, q)
    assert (told.kernel, told.padded_head_dim, (told.block_m, told.block_n)) == ("sm90", compiled[0], tiles[1])
    assert told.num_bytes == 5 * q.numel(), "three tensors of 8 bits, and one of 16"
    assert "in fp8" in str(told)
    wide = fastattn.explain("flash_fwd", q.shape, q.shape)
    assert told.num_ops == wide.num_ops and told.floor_us() < wide.floor_us()


def test_batch_invariant_attention_of_a_sequence_is_told() -> None:
    def explain(
        tokens: int, keys: int = 9000, page: int = 16, tree: bool = False, heads: int = 32, bits: int = 16
    ) -> Any:
        dtype = torch.int8 if bits == 8 else torch.bfloat16
        cache = torch.empty(100, page, 8, 128, dtype=dtype, device="meta")
        return fastattn.explain(
            "paged_attention", (tokens, heads, 128), cache, seqlen_k=keys, batch_invariant=True, tree=tree
        )

    splits = {keys: explain(1, keys) for keys in (0, 256, 257, 8192, 8193, 20_000)}
    assert [(e.num_splits, e.split_keys) for e in splits.values()] == [
        (1, 256), (1, 256), (2, 256), (32, 256), (17, 512), (20, 1024),
    ]  # fmt: skip
    assert "keys in 2 splits of 256" in str(splits[257]) and "not split" in str(splits[256])
    assert (explain(1, 1000, bits=8).split_keys, explain(1, 1000, bits=8).num_splits) == (512, 2)
    kernels = {
        "paged_decode": [(8,), (8, 9000, 5, True), (9, 9000, 5, False, 32, 8), (40, 9000, 16, True, 32, 8)],
        "sm90": [(9,), (65, 9000, 16, True), (1, 9000, 16, False, 33 * 8), (9, 9000, 8, False, 32, 8)],
        "sm80": [(9, 9000, 5), (9, 9000, 16, True), (64, 9000, 16, True)],
    }
    for kernel, calls in kernels.items():
        for call in calls:
            assert explain(*call).kernel == kernel, call
    assert "32 rows a KV head (8 tokens × 4 heads of a group): up to 32" in explain(8).why
    assert "pages of 5 tokens are no multiple of 8" in explain(9, page=5).why
    assert explain(9).num_ops == 4 * 32 * 128 * sum(range(8992, 9001))
    cache = (100, 16, 8, 128)
    for (q, k, options), message in {
        ((1, 32, 128), cache, ()): "batch_invariant is False, expected True",
        ((1, 32), cache, (("batch_invariant", True),)): r"q has shape \(1, 32\), expected 3",
        ((1, 12, 128), cache, (("batch_invariant", True),)): "Hk to divide H",
        ((1, 32, 128), cache, (("batch_invariant", True), ("seqlen_k", -1))): "seqlen_k is -1, expected",
    }.items():
        with pytest.raises(ValueError, match=message):
            fastattn.explain("paged_attention", q, k, **dict(options))  # type: ignore[call-overload]


def test_few_rows_of_a_group_are_packed() -> None:
    def packs(seqlen_q: int, heads: int, kv_heads: int = 8, head_dim: int = 128) -> bool:
        return bool(
            _runtime.flash_fwd_sm90_config(4, heads, kv_heads, head_dim, head_dim, seqlen_q, 8192, True, 132)["packs"]
        )

    assert packs(16, 64), "one tile of 128 rows, not eight of 16"
    assert packs(129, 32), "five tiles, not eight"
    assert not packs(16, 8), "nothing to pack"
    assert not packs(128, 32), "as many tiles, all full"
    assert not packs(4096, 64)
    assert not packs(40, 16, 8, 80), "two tiles of head dim 80 cost less than one of 128 that is hardly fuller"


def test_keys_that_are_read_once_and_few_leave_the_cache_as_it_is() -> None:
    def few_keys(num_seqs: int, seqlen_q: int = 8, heads: int = 32) -> int:
        shape = (num_seqs, heads, 8, 128, 128, seqlen_q, 8192, True, 132, num_seqs * seqlen_q)
        return _runtime.flash_fwd_sm90_config(*shape)["few_keys"]

    assert few_keys(8) == (240 << 20) // (8 * 8 * 512)
    assert few_keys(8, seqlen_q=33) == 0, "two tiles of 32 tokens read them"
    assert few_keys(8, heads=8) == 0, "nothing is packed"
    assert few_keys(2**21) == 0, "one key of each is 2^32 elements"


def test_a_few_rows_are_split_and_many_are_not() -> None:
    few = fastattn.explain("flash_fwd", (1, 128, 32, 128), (1, 65536, 8, 128))
    assert (few.kernel, few.num_splits) == ("sm90", 4)
    assert "the keys of each among 4 CTAs" in str(few)
    many = fastattn.explain("flash_fwd", (4, 4096, 32, 128), (4, 4096, 8, 128), causal=True)
    assert (many.num_splits, many.num_tiles, many.num_ctas) == (1, 4096, 132)
    decode = fastattn.explain("flash_fwd", (8, 1, 32, 128), (8, 4096, 8, 128))
    assert (decode.kernel, decode.num_tiles, decode.num_ctas) == ("paged_decode", 8 * 8 * 4096 // 128, 128)
    assert "2048 tiles of 16 rows and 128 keys, 16 to each of 128 CTAs" in str(decode)
    forced = fastattn.explain("flash_fwd", (4, 4096, 32, 80), (4, 4096, 8, 80), kernel="sm80")
    assert (forced.kernel, forced.padded_head_dim) == ("sm80", 96)


def test_work_and_floor() -> None:
    q = torch.empty(2, 1000, 16, 128, device="meta", dtype=torch.bfloat16)
    full, causal = (fastattn.explain("flash_fwd", q, q, causal=c) for c in (False, True))
    assert full.num_ops == 4 * 2 * 16 * 1000 * 1000 * 128
    assert causal.num_ops == 4 * 2 * 16 * (1000 * 1001 // 2) * 128
    assert full.num_bytes == 4 * q.numel() * 2
    assert full.floor_us(tflops=1.0) == pytest.approx(full.num_ops / 1e6)
    assert "bound by its memory" in str(fastattn.explain("flash_fwd", (2, 64, 8, 64), (2, 64, 8, 64)))
    # Bottom-right: one query sees all keys, and of more queries than keys the first see none.
    assert fastattn.explain("flash_fwd", (1, 1, 1, 64), (1, 9, 1, 64), causal=True).num_ops == 4 * 9 * 64
    assert fastattn.explain("flash_fwd", (1, 9, 1, 64), (1, 2, 1, 64), causal=True).num_ops == 4 * 3 * 64


@settings(max_examples=200, deadline=None)
@given(
    batch=st.integers(0, 40),
    kv_heads=st.integers(1, 16),
    group=st.integers(1, 16),
    head_dim=st.integers(1, 32).map(lambda n: 8 * n),
    seqlen_q=st.integers(0, 9000),
    seqlen_k=st.integers(0, 9000),
    causal=st.booleans(),
    deterministic=st.booleans(),
    kernel=st.sampled_from(("auto", "sm80", "sm90")),
)
def test_gradients_have_a_tile_for_each_key(
    batch: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    seqlen_q: int,
    seqlen_k: int,
    causal: bool,
    deterministic: bool,
    kernel: str,
) -> None:
    q, k = (batch, seqlen_q, kv_heads * group, head_dim), (batch, seqlen_k, kv_heads, head_dim)
    found = fastattn.explain("flash_bwd", q, k, causal=causal, deterministic=deterministic, kernel=kernel)
    tiles = batch * kv_heads * -(-seqlen_k // found.block_n)
    assert found.num_tiles == tiles * found.num_splits
    assert 0 <= found.padded_head_dim - head_dim < 64 and found.padded_head_dim in (64, 96, 128, 192, 256)
    assert found.smem_bytes <= 227 * 1024
    assert 2 * found.smem_bytes > 227 * 1024, "one CTA an SM, as num_waves counts them"
    assert (found.num_waves - 1) * 132 < found.num_tiles <= found.num_waves * 132
    if batch * seqlen_q * seqlen_k == 0:
        assert found.kernel == "sm80"
    elif kernel != "auto":
        assert found.kernel == kernel
    else:
        hopper_tiles = batch * kv_heads * -(-seqlen_k // (128 if head_dim <= 128 else 64))
        assert (found.kernel == "sm80") == (group > 1 and 3 * hopper_tiles < 132)
    if found.kernel == "sm90":
        assert found.num_splits == 1 and found.num_ctas == min(found.num_tiles, 132)
    else:
        assert 1 <= found.num_splits <= group and found.num_ctas == found.num_tiles


def test_gradients_are_explained() -> None:
    q, k = (4, 4096, 32, 128), (4, 4096, 8, 128)
    many = fastattn.explain("flash_bwd", q, k, causal=True)
    assert (many.kernel, many.block_m, many.block_n, many.num_tiles, many.num_ctas) == ("sm90", 64, 128, 1024, 132)
    assert many.num_waves == 8
    forward = fastattn.explain("flash_fwd", q, k, causal=True)
    assert many.num_ops * 2 == forward.num_ops * 5
    tensor = torch.empty(q, device="meta", dtype=torch.bfloat16)
    assert many.num_bytes == 8 * tensor.numel() + 2 * tensor.numel() + 4 * 4 * 32 * 4096
    assert many.floor_us(tflops=1.0) == pytest.approx(many.num_ops / 1e6)
    said = str(many)
    assert (
        "1024 tiles of 128 keys, 64 query rows a step; 132 CTAs of 211 KiB of shared memory, 8 waves on 132 SMs" in said
    )
    assert "added up in any order" in said and "bound by its matrix units" in said
    assert "deterministic, in the order of the keys" in str(fastattn.explain("flash_bwd", q, k, deterministic=True))
    # Few keys and grouped heads: the portable kernel shares out the heads.
    few = fastattn.explain("flash_bwd", (1, 512, 32, 128), (1, 512, 8, 128), deterministic=True)
    assert (few.kernel, few.num_splits, few.num_ctas) == ("sm80", 4, 128)
    assert "Hopper's kernel would have 32 tiles, less than a third of 132 SMs" in few.why
    assert "by a kernel of its own" in str(few) and "among 4 CTAs" in str(few)
    assert fastattn.explain("flash_bwd", (1, 512, 8, 128), (1, 512, 8, 128)).kernel == "sm90"
    padded = fastattn.explain("flash_bwd", (1, 512, 8, 80), (1, 512, 8, 80), kernel="sm80")
    assert "(padded to 96)" in str(padded) and padded.why == "as it was asked for"
    assert fastattn.explain("flash_bwd", (1, 9, 8, 256), (1, 0, 8, 256)).why == "there are no queries or no keys"


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        (
            ("flash_bwd_fp8", (1, 1, 1, 64), (1, 1, 1, 64)),
            {},
            "what is 'flash_bwd_fp8', expected 'flash_fwd', 'flash_bwd', 'paged_attention', 'linear'",
        ),
        (("linear", (1, 2, 3, 64), (64, 64)), {}, r"x has shape \(1, 2, 3, 64\), expected 1 to 3 dimensions"),
        (("gated_linear", (2, 64), (63, 64)), {}, r"weight has shape \(63, 64\), expected \(2N, 64\), as many rows"),
        (("linear", (2, 64), (64, 72)), {}, r"weight has shape \(64, 72\), expected \(N, 64\) as x is \(2, 64\)"),
        (("flash_fwd", (1, 1, 64), (1, 1, 1, 64)), {}, r"q has shape \(1, 1, 64\)"),
        (("flash_fwd", (1, 1, 1, 64), (2, 1, 1, 64)), {}, r"k has shape \(2, 1, 1, 64\), expected \(1, Sk, Hk, 64\)"),
        (("flash_fwd", (1, 1, 3, 64), (1, 1, 2, 64)), {}, "Hk to divide H"),
        (("flash_fwd", (1, 1, 1, 60), (1, 1, 1, 60)), {}, "multiple of 8"),
        (("flash_fwd", (1, 1, 1, 64), (1, 1, 1, 64)), {"kernel": "sm70"}, "kernel is 'sm70'"),
        (("flash_fwd", *[torch.empty(1, 1, 1, 64, dtype=torch.float8_e4m3fn)] * 2), {"kernel": "sm80"}, "has fp8"),
        (("flash_fwd", *[torch.empty(1, 1, 1, 72, dtype=torch.float8_e4m3fn)] * 2), {}, "D = 72, expected a multiple"),
        (("flash_bwd", *[torch.empty(1, 1, 1, 64, dtype=torch.float8_e4m3fn)] * 2), {}, "fp8 attention has no back"),
        (("flash_bwd", (1, 1, 1, 64), (1, 1, 1, 64)), {"kernel": "sm70"}, "kernel is 'sm70'"),
        (("flash_bwd", (1, 1, 64), (1, 1, 1, 64)), {}, r"q has shape \(1, 1, 64\)"),
        (("flash_bwd", (1, 1, 3, 64), (1, 1, 2, 64)), {}, "Hk to divide H"),
    ],
)
def test_what_does_not_fit_is_named(arguments: tuple, options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fastattn.explain(*arguments, **options)
