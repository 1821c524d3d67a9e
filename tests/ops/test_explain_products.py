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
    assert (shared.block_m, shared.block_n, shared.num_ctas, shared.stream_k) == (128, 128, 128, True)
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
        assert m > (32 if config["block_m"] == 64 else 64)
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
            assert not gated or (config["block_n"] % 64 == 0 and not config["turns"])
            tiles.add((config["block_m"], config["block_n"]))
    assert {(128, 256), (192, 192)} <= tiles


def test_given_squares_and_residuals_get_the_tiles_of_plain_products() -> None:
    """But for turns, which hide nothing of the last tile's residual, and where a norm's kernel has room beside another."""
    for m, n, k in itertools.product((256, 512, 1024), (6144, 8192, 28672), (4096, 14336)):
        given = _runtime.gemm_sm90_config(m, n, k, 132, norm="rms_given")
        plain = _runtime.gemm_sm90_config(m, n, k, 132)
        assert given | {"gives_norms": False} == plain, (m, n, k)
    for call in ({"norm": "rms_given"}, {"added": True}):
        shared = _runtime.gemm_sm90_config(256, 4096, 14336, 132, **call)
        assert (shared["block_m"], shared["block_n"], shared["stream_k"], shared["turns"]) == (128, 128, True, False)
        whole = _runtime.gemm_sm90_config(512, 6144, 4096, 132, **call)
        assert (whole["block_m"], whole["block_n"], whole["turns"]) == (128, 192, "norm" in call)
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
    "gated": (40, 0.05, 0.005),
    "bf16_h200": (85, 0.06, 0.01),
    "rms_h200": (23, 0.08, 0.011),
    "layer_h200": (23, 0.09, 0.012),
    "given_h200": (23, 0.11, 0.011),
    "int8_h200": (40, 0.1, 0.02),
    "gated_h200": (10, 0.02, 0.005),
}


@pytest.mark.parametrize("kind", MOST_LOST)
def test_what_is_chosen_is_about_the_fastest_that_was_measured(kind: str) -> None:
    """fp8: sums in two levels."""
    logs = []
    norm = {"rms_h200": "rms", "layer_h200": "layer", "given_h200": "rms_given"}.get(kind, "")
    for line in (Path(__file__).parent / "gemm_sm90_times.txt").read_text().splitlines():
        of_kind, *problem = line.split()
        if of_kind != kind:
            continue
        m, n, k = (int(size) for size in problem[:3])
        times = {name: float(us) for name, us in (entry.split(":") for entry in problem[3:])}
        element_bytes = 1 if kind.startswith(("int8", "fp8")) else 2
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
            name = f"few-{name}{shared}x{config['ctas_per_sm']}/{config['num_splits']}" + "g" * config["gives_norms"]
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
    (16, 576, 1536): {1: 8.6, 2: 8.2, 3: 8.1, 4: 8.3},
    (32, 576, 1536): {1: 9.0, 2: 8.5, 3: 8.6, 4: 9.0},
    (48, 576, 1536): {1: 9.8, 2: 8.9, 3: 9.3, 4: 9.6},
    (64, 576, 1536): {1: 10.3, 2: 9.2, 3: 10.0, 4: 10.3},
    (16, 2048, 2048): {1: 9.8, 2: 9.3, 3: 9.3, 4: 9.1},
    (32, 2048, 2048): {1: 10.7, 2: 9.9, 3: 10.6, 4: 9.4},
    (48, 2048, 2048): {1: 11.5, 2: 10.6, 3: 11.0, 4: 9.6},
    (64, 2048, 2048): {1: 11.9, 2: 11.1, 3: 11.9, 4: 10.1},
    (16, 1024, 8192): {1: 19.8, 2: 14.0, 3: 12.5, 4: 11.9},
    (32, 1024, 8192): {1: 20.6, 2: 15.0, 3: 13.7, 4: 13.5},
    (48, 1024, 8192): {1: 22.8, 2: 16.5, 3: 15.5, 4: 14.8},
    (64, 1024, 8192): {1: 23.9, 2: 17.6, 3: 17.0, 4: 15.6},
    (16, 3072, 3072): {1: 12.7, 2: 11.2, 3: 11.7, 4: 10.9},
    (32, 3072, 3072): {1: 13.1, 2: 12.3, 3: 12.4, 4: 11.5},
    (48, 3072, 3072): {1: 14.1, 2: 13.3, 3: 13.2, 4: 12.0},
    (64, 3072, 3072): {1: 15.0, 2: 13.9, 3: 13.3, 4: 12.6},
    (16, 4608, 3584): {1: 14.3, 2: 14.1, 3: 14.9, 4: 13.8},
    (32, 4608, 3584): {1: 14.8, 2: 14.8, 3: 15.5, 4: 14.4},
    (48, 4608, 3584): {1: 15.8, 2: 15.5, 3: 16.6, 4: 15.3},
    (64, 4608, 3584): {1: 16.9, 2: 16.0, 3: 17.0, 4: 16.4},
    (16, 2048, 8192): {1: 20.2, 2: 15.2, 3: 14.7, 4: 14.9},
    (32, 2048, 8192): {1: 21.4, 2: 16.3, 3: 16.0, 4: 15.6},
    (48, 2048, 8192): {1: 23.5, 2: 17.7, 3: 17.1, 4: 16.4},
    (64, 2048, 8192): {1: 24.8, 2: 18.7, 3: 18.5, 4: 16.6},
    (16, 4096, 4096): {1: 14.5, 2: 14.8, 3: 14.5, 4: 14.3},
    (32, 4096, 4096): {1: 15.3, 2: 15.5, 3: 15.0, 4: 14.8},
    (48, 4096, 4096): {1: 16.7, 2: 16.2, 3: 15.7, 4: 15.8},
    (64, 4096, 4096): {1: 17.3, 2: 16.7, 3: 15.9, 4: 16.4},
    (16, 6144, 4096): {1: 15.5, 2: 15.9, 3: 17.7, 4: 17.0},
    (32, 6144, 4096): {1: 16.0, 2: 16.3, 3: 17.8, 4: 17.9},
    (48, 6144, 4096): {1: 17.4, 2: 17.3, 3: 19.4, 4: 19.3},
    (64, 6144, 4096): {1: 17.9, 2: 17.5, 3: 19.4, 4: 19.4},
    (16, 5120, 5120): {1: 16.6, 2: 16.7, 3: 17.7, 4: 17.0},
    (32, 5120, 5120): {1: 17.6, 2: 17.4, 3: 18.2, 4: 16.9},
    (48, 5120, 5120): {1: 19.2, 2: 18.6, 3: 19.7, 4: 18.2},
    (64, 5120, 5120): {1: 20.4, 2: 19.2, 3: 20.4, 4: 18.4},
    (16, 7168, 5120): {1: 18.1, 2: 18.0, 3: 21.5, 4: 20.8},
    (32, 7168, 5120): {1: 18.5, 2: 18.5, 3: 22.1, 4: 20.7},
    (48, 7168, 5120): {1: 20.1, 2: 19.6, 3: 24.1, 4: 22.1},
    (64, 7168, 5120): {1: 20.8, 2: 19.9, 3: 24.7, 4: 22.2},
    (16, 10240, 5120): {1: 24.2, 2: 22.4, 3: 35.5, 4: 33.7},
    (32, 10240, 5120): {1: 25.7, 2: 22.9, 3: 37.4, 4: 34.0},
    (48, 10240, 5120): {1: 27.3, 2: 24.8, 3: 40.6, 4: 37.1},
    (64, 10240, 5120): {1: 29.1, 2: 25.3, 3: 42.9, 4: 38.1},
    (16, 4096, 14336): {1: 31.2, 2: 30.1, 3: 24.6, 4: 25.2},
    (32, 4096, 14336): {1: 33.0, 2: 31.8, 3: 25.9, 4: 26.0},
    (48, 4096, 14336): {1: 36.5, 2: 33.8, 3: 27.4, 4: 28.1},
    (64, 4096, 14336): {1: 38.0, 2: 36.4, 3: 28.7, 4: 30.0},
    (16, 8192, 8192): {1: 23.7, 2: 27.1, 3: 27.7, 4: 38.5},
    (32, 8192, 8192): {1: 24.5, 2: 28.5, 3: 28.9, 4: 40.4},
    (48, 8192, 8192): {1: 26.1, 2: 30.8, 3: 31.5, 4: 44.2},
    (64, 8192, 8192): {1: 28.3, 2: 32.4, 3: 32.7, 4: 46.3},
    (16, 10240, 8192): {1: 33.2, 2: 28.4, 3: 45.5, 4: 41.1},
    (32, 10240, 8192): {1: 35.9, 2: 29.8, 3: 48.6, 4: 43.0},
    (48, 10240, 8192): {1: 38.1, 2: 32.5, 3: 53.2, 4: 46.9},
    (64, 10240, 8192): {1: 40.9, 2: 33.7, 3: 56.8, 4: 48.8},
    (16, 28672, 4096): {1: 34.9, 2: 43.9, 3: 61.2, 4: 56.4},
    (32, 28672, 4096): {1: 36.4, 2: 44.6, 3: 62.5, 4: 61.2},
    (64, 28672, 4096): {1: 41.2, 2: 49.6, 3: 74.4, 4: 67.0},
    (16, 5120, 27648): {1: 54.0, 2: 52.3, 3: 47.4, 4: 40.0},
    (32, 5120, 27648): {1: 56.4, 2: 54.9, 3: 50.4, 4: 42.2},
    (48, 5120, 27648): {1: 62.6, 2: 58.1, 3: 55.5, 4: 46.1},
    (64, 5120, 27648): {1: 66.8, 2: 64.0, 3: 60.3, 4: 49.3},
    (16, 57344, 8192): {1: 106.5, 2: 119.9, 3: 154.5, 4: 148.8},
    (32, 57344, 8192): {1: 114.4, 2: 127.4, 3: 158.1, 4: 155.3},
    (48, 57344, 8192): {1: 127.3, 2: 140.4, 3: 176.0, 4: 172.5},
    (64, 57344, 8192): {1: 135.7, 2: 148.6, 3: 190.3, 4: 180.0},
}


def test_the_splits_of_some_rows_with_weights_of_4_bits_are_about_the_fastest_measured() -> None:
    logs = []
    for call, times in TIMES_OF_SPLITS.items():
        splits = _runtime.gemm_sm90_w4_some_rows_config(*call, 132)["num_splits"]
        logs.append(math.log(times[splits] / min(times.values())))
        assert logs[-1] < 0.1, f"{call}: {splits} splits"
    assert sum(logs) / len(logs) < 0.01


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
