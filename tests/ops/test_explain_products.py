"""What the heuristics of the GEMM kernels choose: invariants on drawn problems, measured times, and how it is said."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn
from fastattn import _runtime


def test_dense_layers() -> None:
    few = fastattn.explain("rms_norm_linear", (2, 8, 4096), (6144, 4096))
    assert (few.kernel, few.m, few.block_m, few.fuses_norm) == ("sm90, few rows", 16, 16, True)
    assert few.num_bytes == 2 * (16 * 4096 + 6144 * 4096 + 16 * 6144)
    assert "16 × 4096 → 6144, the norm inside" in str(few) and "bound by its memory" in str(few)
    many = fastattn.explain("linear", torch.empty(8192, 4096, device="meta"), (6144, 4096))
    assert (many.kernel, many.num_splits, many.num_ctas, many.fuses_norm) == ("sm90", 1, 132, False)
    shared = fastattn.explain("rms_norm_linear", (256, 14336), (4096, 14336))
    assert (shared.block_m, shared.block_n, shared.num_ctas, shared.stream_k) == (128, 256, 128, True)
    assert "shared out evenly (stream-K)" in str(shared) and not many.stream_k
    assert "tiles of 128 rows of x and" in str(many) and "bound by its matrix units" in str(many)
    for odd in (((3, 4096), (6143, 4096)), ((3, 4092), (6144, 4092)), ((0, 64), (64, 64))):
        portable = fastattn.explain("layer_norm_linear", *odd)
        assert (portable.kernel, portable.block_m, portable.fuses_norm) == ("sm80", None, False)
        assert "behind a kernel for the norm" in str(portable)
    gated = fastattn.explain("rms_norm_gated_linear", (16, 4096), (28672, 4096))
    assert (gated.kernel, gated.fuses_norm, gated.fuses_gates) == ("sm90, few rows", True, True)
    assert gated.num_bytes == 2 * (16 * 4096 + 28672 * 4096 + 16 * 14336)
    assert "→ 28672, the norm inside, the gates inside" in str(gated)
    assert fastattn.explain("linear", (100, 1032), (14336, 1032)).block_n == 224
    assert fastattn.explain("gated_linear", (100, 1032), (14336, 1032)).block_n % 64 == 0
    assert "before a kernel for the gates" in str(fastattn.explain("gated_linear", (16, 4096), (6136, 4096)))


@settings(max_examples=400, deadline=None)
@given(
    m=st.one_of(st.integers(1, 600), st.integers(1, 300_000)),
    n=st.integers(1, 40_000).map(lambda n: 8 * n),
    k=st.integers(1, 4_000).map(lambda k: 8 * k),
    num_sms=st.sampled_from((1, 16, 114, 132)),
)
def test_the_tiles_of_a_product_cover_it(m: int, n: int, k: int, num_sms: int) -> None:
    config = _runtime.gemm_sm90_config(m, n, k, num_sms)
    rows = config["block_m"] * (1 if config["few_rows"] else 2)
    assert (config["m_tiles"] - 1) * rows < m <= config["m_tiles"] * rows
    weight_rows = config["weight_rows"]
    assert weight_rows % 8 == 0
    assert 0 < weight_rows <= config["block_n"]
    assert (config["n_tiles"] - 1) * weight_rows < n <= config["n_tiles"] * weight_rows
    shared = config["m_tiles"] * rows // config["block_m"]
    assert config["rows"] == -(-m // shared) <= config["block_m"]
    assert 1 <= config["group_rows"] <= config["m_tiles"]
    tiles = config["m_tiles"] * config["n_tiles"]
    if config["few_rows"]:
        assert m <= 256
        # Fewer rows of weight than a tile has are for all CTAs to run at once.
        assert weight_rows == config["block_n"] or config["num_ctas"] <= num_sms * config["ctas_per_sm"]
        assert config["num_ctas"] == tiles * config["num_splits"]
        panels = 2 if config["block_n"] == 64 else 1
        assert 1 <= config["num_splits"] <= min(8, -(-k // (64 * panels)))  # no part of K is empty
        assert not config["stream_k"]
    else:
        assert m > 64
        assert weight_rows == config["block_n"]
        shares = tiles * -(-k // 64) if config["stream_k"] else tiles
        pairs = min(shares, max(1, num_sms // 2))
        if config["stream_k"] and pairs // tiles * tiles >= 0.95 * pairs:
            pairs = pairs // tiles * tiles  # each tile has as many
        assert config["num_ctas"] == 2 * pairs


@pytest.mark.parametrize("m", [1, 64, 128, 256, 512, 4096])
def test_products_in_8_bits_have_the_tiles_of_half_as_many_columns(m: int) -> None:
    for n, k in ((6144, 4096), (4096, 14336), (8192, 8192)):
        config = _runtime.gemm_sm90_config(m, n, k, 132, element_bytes=1)
        if (config["few_rows"], config["block_m"]) == (False, 64):  # in 16 bits another width is the fastest
            assert config["block_n"] == 96
        else:
            assert config == _runtime.gemm_sm90_config(m, n, k // 2, 132)
        # Two levels of sums take registers that larger tiles do not have.
        config = _runtime.gemm_sm90_config(m, n, k, 132, element_bytes=1, two_levels=True)
        assert config["block_n"] <= (256 if config["turns"] else 192)


def test_norms_and_gates_get_tiles_that_they_have() -> None:
    tiles = set()
    for m, n, k in itertools.product((256, 384, 768, 4096), (6144, 28672), (4096, 14336)):
        for norm, gated in ((True, False), (False, True), (True, True)):
            config = _runtime.gemm_sm90_config(m, n, k, 132, norm="rms" if norm else "", gated=gated)
            assert not config["turns"]
            assert not gated or config["block_n"] % 64 == 0
            tiles.add((config["block_m"], config["block_n"]))
    assert {(128, 256), (192, 192)} <= tiles


def test_given_squares_and_residuals_get_the_tiles_of_plain_products() -> None:
    """But for columns that end in half of a sum of squares, and turns that hide nothing of the last tile."""
    for m, n, k in itertools.product((256, 512, 1024), (6144, 8192, 28672), (4096, 14336)):
        given = _runtime.gemm_sm90_config(m, n, k, 132, norm="rms_given")
        plain = _runtime.gemm_sm90_config(m, n, k, 132)
        assert not given["turns"]
        if not plain["turns"]:
            assert given == plain
        added = _runtime.gemm_sm90_config(m, n, k, 132, added=True)
        assert added["few_rows"] or added["block_n"] % 64 == 0
    for call in ({"norm": "rms_given"}, {"added": True}):
        shared = _runtime.gemm_sm90_config(256, 4096, 14336, 132, **call)
        assert (shared["block_m"], shared["block_n"], shared["stream_k"], shared["turns"]) == (128, 128, True, False)
        whole = _runtime.gemm_sm90_config(512, 6144, 4096, 132, **call)
        assert (whole["block_m"], whole["block_n"], whole["turns"]) == (128, 192, False)
    assert _runtime.gemm_sm90_config(128, 28672, 4096, 132, norm="rms_given")["block_m"] == 64
    assert _runtime.gemm_sm90_config(8192, 6144, 4096, 132, added=True)["turns"]


def test_scales_of_blocks_and_zero_points_get_tiles_that_they_have() -> None:
    for m, n, k in itertools.product((1, 40, 64, 65, 128, 200, 768, 4096), (6144, 28672), (4096, 14336)):
        config = _runtime.gemm_sm90_config(m, n, k, 132, element_bytes=1, two_levels=True, block_scales=True)
        assert config["few_rows"] == (m <= 64)
        assert config["block_n"] == 64 if config["few_rows"] else config["block_n"] % 128 == 0
        assert _runtime.gemm_sm90_config(m, n, k, 132, element_bytes=1, zero_points=True)["block_n"] != 224


MOST_LOST = dict.fromkeys(("bf16", "int8", "fp8_fast", "fp8"), (39, 0.05, 0.005))  # problems, of any, in the mean
MOST_LOST |= {
    "gated": (44, 0.05, 0.005),
    "rms": (40, 0.05, 0.005),
    "layer": (40, 0.08, 0.01),
    "rms_gated": (28, 0.08, 0.01),
}


@pytest.mark.parametrize("kind", MOST_LOST)
def test_what_is_chosen_is_about_the_fastest_that_was_measured(kind: str) -> None:
    """fp8: sums in two levels."""
    logs = []
    norm = "rms" if "rms" in kind else "layer" if kind == "layer" else ""
    for line in (Path(__file__).parent / "gemm_sm90_times.txt").read_text().splitlines():
        of_kind, *problem = line.split()
        if of_kind != kind:
            continue
        m, n, k = (int(size) for size in problem[:3])
        times = {name: float(us) for name, us in (entry.split(":") for entry in problem[3:])}
        element_bytes = 1 if kind in ("int8", "fp8", "fp8_fast") else 2
        config = _runtime.gemm_sm90_config(
            m,
            n,
            k,
            132,
            element_bytes,
            two_levels=kind == "fp8",
            norm=norm,
            gated="gated" in kind,
            fast_accum=kind == "fp8_fast",
        )
        name = f"{config['block_m']}x{config['block_n']}" + "t" * config["turns"] + "s" * config["stream_k"]
        if config["few_rows"]:
            shared = f"w{config['weight_rows']}" * (config["weight_rows"] < config["block_n"])
            name = f"few-{name}{shared}x{config['ctas_per_sm']}/{config['num_splits']}"
        assert name in times, f"{line}: {name} takes more than 1.25 times the best"
        logs.append(math.log(times[name] / min(times.values())))
        assert logs[-1] < MOST_LOST[kind][1], f"{line}: {name}"
    assert len(logs) == MOST_LOST[kind][0]
    assert sum(logs) / len(logs) < MOST_LOST[kind][2]


def test_few_rows_fill_the_sms_in_one_wave() -> None:
    for n, k in ((6144, 4096), (4096, 14336), (8192, 8192), (1024, 8192)):
        for m in (1, 16, 64, 128):
            config = _runtime.gemm_sm90_config(m, n, k, 132)
            assert config["few_rows"] or m == 128  # pairs with 64 rows each are faster where columns are many
            assert 60 <= config["num_ctas"] <= 132 * config["ctas_per_sm"]


@settings(max_examples=400, deadline=None)
@given(
    m=st.one_of(st.integers(1, 600), st.integers(1, 300_000)),
    n=st.integers(1, 40_000).map(lambda n: 8 * n),
    k=st.integers(1, 500).map(lambda k: 64 * k),
    weight_bits=st.sampled_from((4.125, 4.25, 4.5)),
    num_sms=st.sampled_from((1, 16, 114, 132)),
    x_bytes=st.sampled_from((1, 2)),
    two_levels=st.booleans(),
    in_tiles=st.booleans(),
)
def test_the_tiles_of_a_product_with_weights_of_4_bits_cover_it(
    m: int, n: int, k: int, weight_bits: float, num_sms: int, x_bytes: int, two_levels: bool, in_tiles: bool
) -> None:
    config = _runtime.gemm_sm90_w4_config(m, n, k, weight_bits, num_sms, x_bytes, two_levels, in_tiles)
    if config["num_ctas"] == 0:  # rows that neither kernel takes
        assert two_levels and not in_tiles and n % 16
        return
    assert config["many_rows"] or not in_tiles
    assert (config["m_tiles"] - 1) * config["block_m"] < m <= config["m_tiles"] * config["block_m"]
    assert (config["n_tiles"] - 1) * config["block_n"] < n <= config["n_tiles"] * config["block_n"]
    tiles = config["m_tiles"] * config["n_tiles"]
    if config["many_rows"]:
        assert config["num_splits"] == 1
        shares = tiles * -(-k // 256) if config["stream_k"] else tiles
        assert config["num_ctas"] == 2 * min(shares, max(1, num_sms // 2))  # pairs
        assert not two_levels or config["block_m"] <= 128
        assert in_tiles or n % 16 == 0
    else:
        assert not config["stream_k"] and (x_bytes == 2 or not two_levels)
        assert config["num_ctas"] == tiles * config["num_splits"]
        assert 1 <= config["num_splits"] <= min(8, -(-k // 256))  # no part of K is empty


# Microseconds on an H100 of the four fastest, of weights in tiles: by whole tiles or stream-K, a tile's rows of x.
TIMES_OF_4_BITS: dict[tuple[int, int, int, float, int], dict[tuple[str, int], float]] = {
    # (m, n, k, bits of a weight, bytes of x)
    (64, 6144, 4096, 4.5, 2): {
        ("stream_k", 64): 19.3,
        ("stream_k", 128): 21.7,
        ("whole", 64): 23.6,
        ("whole", 128): 27.9,
    },
    (256, 6144, 4096, 4.5, 2): {
        ("stream_k", 128): 28.5,
        ("whole", 128): 29.2,
        ("stream_k", 256): 32.1,
        ("stream_k", 192): 34.4,
    },
    (1024, 6144, 4096, 4.125, 2): {
        ("stream_k", 256): 75.7,
        ("whole", 128): 84.8,
        ("stream_k", 192): 85.2,
        ("stream_k", 128): 87.6,
    },
    (512, 28672, 4096, 4.5, 2): {
        ("stream_k", 256): 161.8,
        ("whole", 256): 175.5,
        ("whole", 128): 175.7,
        ("stream_k", 192): 179.7,
    },
    (128, 28672, 4096, 4.5, 1): {
        ("whole", 128): 52.9,
        ("stream_k", 128): 53.3,
        ("whole", 192): 56.5,
        ("stream_k", 192): 57.8,
    },
    (128, 4096, 14336, 4.5, 2): {
        ("stream_k", 128): 37.5,
        ("stream_k", 192): 42.8,
        ("stream_k", 64): 44.0,
        ("stream_k", 256): 51.5,
    },
    (1024, 4096, 14336, 4.25, 2): {
        ("whole", 256): 147.7,
        ("stream_k", 256): 153.3,
        ("whole", 128): 168.1,
        ("stream_k", 192): 170.6,
    },
    (512, 4096, 14336, 4.5, 1): {
        ("stream_k", 256): 56.8,
        ("stream_k", 192): 63.3,
        ("whole", 128): 63.7,
        ("stream_k", 128): 66.4,
    },
    (64, 8192, 8192, 4.25, 1): {
        ("stream_k", 64): 32.3,
        ("stream_k", 128): 33.8,
        ("whole", 64): 38.3,
        ("whole", 128): 39.8,
    },
    (1024, 8192, 8192, 4.25, 1): {
        ("whole", 256): 96.7,
        ("stream_k", 256): 105.9,
        ("whole", 192): 121.0,
        ("stream_k", 192): 127.3,
    },
}


@pytest.mark.parametrize("call", TIMES_OF_4_BITS, ids=str)
def test_the_tile_of_a_product_with_weights_of_4_bits_is_the_fastest_measured(
    call: tuple[int, int, int, float, int],
) -> None:
    m, n, k, weight_bits, x_bytes = call
    config = _runtime.gemm_sm90_w4_config(m, n, k, weight_bits, 132, x_bytes, in_tiles=True)
    chosen = "stream_k" if config["stream_k"] else "whole", config["block_m"]
    times = TIMES_OF_4_BITS[call]
    assert times[chosen] <= 1.03 * min(times.values())


# Microseconds on an H200 of INT4 in tiles, 9 to 64 rows, with K in so many splits.
TIMES_OF_SPLITS: dict[tuple[int, int, int], dict[int, float]] = {
    # (m, n, k)
    (16, 4096, 4096): {1: 14.2, 2: 14.6, 3: 14.4, 4: 14.0},
    (32, 4096, 4096): {1: 15.1, 2: 15.4, 3: 14.7, 4: 14.8},
    (64, 4096, 4096): {1: 17.2, 2: 16.5, 3: 15.6, 4: 16.1},
    (16, 4096, 14336): {1: 31.5, 2: 30.2, 3: 24.7, 4: 25.4},
    (32, 4096, 14336): {1: 33.2, 2: 32.3, 3: 26.0, 4: 26.3},
    (64, 4096, 14336): {1: 38.2, 2: 36.9, 3: 29.0, 4: 30.1},
    (16, 6144, 4096): {1: 15.8, 2: 16.1, 3: 17.9, 4: 17.2},
    (32, 6144, 4096): {1: 16.4, 2: 16.6, 3: 18.2, 4: 18.2},
    (64, 6144, 4096): {1: 18.5, 2: 17.7, 3: 19.7, 4: 19.7},
    (16, 8192, 8192): {1: 23.8, 2: 27.2, 3: 28.0, 4: 38.7},
    (32, 8192, 8192): {1: 24.4, 2: 28.6, 3: 28.8, 4: 40.5},
    (64, 8192, 8192): {1: 28.1, 2: 32.6, 3: 32.7, 4: 46.4},
    (16, 28672, 4096): {1: 34.9, 2: 43.9, 3: 61.2, 4: 56.4},
    (32, 28672, 4096): {1: 36.4, 2: 44.6, 3: 62.5, 4: 61.2},
    (64, 28672, 4096): {1: 41.2, 2: 49.6, 3: 74.4, 4: 67.0},
}


@pytest.mark.parametrize("call", TIMES_OF_SPLITS, ids=str)
def test_the_splits_of_some_rows_with_weights_of_4_bits_are_the_fastest_measured(call: tuple[int, int, int]) -> None:
    times = TIMES_OF_SPLITS[call]
    assert times[_runtime.gemm_sm90_w4_some_rows_config(*call, 132)["num_splits"]] <= 1.02 * min(times.values())


def test_weights_of_4_bits_as_rows_have_the_kernel_for_few_until_tiles_pay() -> None:
    """Putting them in tiles in the call costs what reading and writing them does."""
    for m, many_rows in ((1, False), (64, False), (2048, True)):
        assert _runtime.gemm_sm90_w4_config(m, 28672, 4096, 4.5, 132)["many_rows"] is many_rows


@pytest.mark.parametrize("x_bytes", [1, 2])
def test_few_rows_with_weights_of_4_bits_fill_the_sms_in_one_wave(x_bytes: int) -> None:
    for n, k in ((6144, 4096), (4096, 14336), (8192, 8192), (1024, 8192)):
        for m in (1, 16, 64):
            config = _runtime.gemm_sm90_w4_config(m, n, k, 4.5, 132, x_bytes)
            assert config["m_tiles"] == 1
            assert 60 <= config["num_ctas"] <= 132 * config["ctas_per_sm"]
