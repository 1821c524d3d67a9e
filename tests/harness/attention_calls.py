"""Valid and bad calls of the attention operators."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from tests.harness.generators import LENGTHS, Gen, offsets, pages
from tests.harness.opspec import Call

Bad = Iterator[tuple[str, Call, type[Exception], tuple[str, ...]]]

# name, query lengths, key lengths, heads, kv heads, head dim, block size, options
_PAGED: tuple[tuple[str, list[int], list[int], int, int, int, int, dict[str, Any]], ...] = (
    ("mixed", [1, 5, 3], [9, 5, 8], 4, 2, 16, 4, {}),
    ("decode", [1, 1, 1, 1], [1, 17, 64, 129], 9, 3, 64, 16, {}),
    ("padding row", [1, 1], [33, 0], 4, 4, 32, 16, {}),
    ("nothing", [], [], 4, 2, 16, 4, {}),
    ("empty runs", [0, 2, 0, 1], [5, 2, 0, 4], 4, 1, 24, 3, {}),
    ("prefill", [65, 31], [65, 127], 4, 2, 64, 16, {}),
    ("long prefill", [300], [331], 2, 1, 16, 16, {}),
    ("more queries than keys", [7, 3], [4, 0], 2, 2, 8, 2, {}),
    ("not causal", [3, 7], [64, 65], 4, 2, 40, 16, {"causal": False}),
    ("window", [1, 40, 1], [63, 70, 129], 4, 2, 32, 16, {"window_size": (15, 0)}),
    ("window 0", [1, 5], [12, 5], 2, 1, 16, 4, {"window_size": (0, 0)}),
    ("two-sided window", [9, 3], [20, 31], 2, 1, 16, 4, {"causal": False, "window_size": (4, 2)}),
    ("right window", [9, 1], [20, 31], 2, 1, 16, 4, {"causal": False, "window_size": (-1, 1)}),
    ("softcap", [1, 6], [50, 20], 4, 2, 64, 16, {"softcap": 5.0, "softmax_scale": 0.3}),
    ("head dim 256", [1, 4], [33, 65], 4, 1, 256, 16, {}),
    ("head dim 128, blocks of 1", [2], [13], 8, 2, 128, 1, {}),
    ("lengths", [1] * len(LENGTHS), list(LENGTHS), 2, 1, 64, 16, {}),
)


def paged_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for name, runs, lengths, heads, kv_heads, dim, size, options in _PAGED:
        cache = pages(gen, lengths, size, kv_heads, dim, dtype)
        yield (
            name,
            {
                "q": gen.randn(sum(runs), heads, dim, dtype=dtype),
                "k_cache": cache.k_cache,
                "v_cache": cache.v_cache,
                "cu_seqlens_q": gen.tensor(offsets(runs)),
                "seqused_k": gen.tensor(lengths),
                "block_table": cache.block_table,
                "max_seqlen_q": max(runs, default=0),
                "causal": True,
                "softmax_scale": dim**-0.5,
            }
            | options,
        )


def varlen_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    """On a Hopper GPU once for each kernel, since so few rows would all go to the portable one."""
    hopper = gen.device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    for kernel in ("sm80", "sm90") if hopper else ("auto",):
        for name, call in _varlen_calls(gen, dtype):
            yield (f"{name}, {kernel}", call | {"kernel": kernel}) if hopper else (name, call)


# name, B, Sq, Sk, heads, kv heads, head dim, options
_BATCH: tuple[tuple[str, int, int, int, int, int, int, dict[str, Any]], ...] = (
    ("square", 2, 33, 33, 4, 2, 64, {"causal": True}),
    ("full", 3, 17, 40, 6, 2, 32, {}),
    ("one", 1, 1, 1, 1, 1, 8, {}),
    ("decode", 2, 1, 129, 8, 2, 128, {"causal": True}),
    ("more queries than keys", 2, 65, 31, 2, 1, 40, {"causal": True}),
    ("no keys", 2, 5, 0, 2, 2, 16, {}),
    ("no batch", 0, 5, 7, 2, 2, 16, {}),
    ("window", 1, 130, 193, 3, 3, 80, {"window_size": (40, 3)}),
    ("softcap", 2, 63, 64, 4, 4, 96, {"softcap": 9.0, "softmax_scale": 0.4}),
    ("head dim 256", 1, 31, 127, 2, 1, 256, {"causal": True}),
)


def batch_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    hopper = gen.device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    for kernel in ("sm80", "sm90") if hopper else ("auto",):
        for name, batch, queries, keys, heads, kv_heads, dim, options in _BATCH:
            call = {
                "q": gen.randn(batch, queries, heads, dim, dtype=dtype),
                "k": gen.randn(batch, keys, kv_heads, dim, dtype=dtype),
                "v": gen.randn(batch, keys, kv_heads, dim, dtype=dtype),
                "kernel": kernel,
            }
            yield f"{name}, {kernel}", call | options


def _varlen_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for name, runs, lengths, heads, kv_heads, dim, _, options in _PAGED:
        extra = 3  # rows past the end of cu_seqlens_k, which have no effect
        k, v = (gen.randn(sum(lengths) + extra, kv_heads, dim, dtype=dtype) for _ in range(2))
        k[sum(lengths) :] = math.nan
        v[sum(lengths) :] = math.nan
        yield (
            name,
            {
                "q": gen.randn(sum(runs), heads, dim, dtype=dtype),
                "k": k,
                "v": v,
                "cu_seqlens_q": gen.tensor(offsets(runs)),
                "cu_seqlens_k": gen.tensor(offsets(lengths)),
                "max_seqlen_q": max(runs, default=0),
                "max_seqlen_k": max(lengths, default=0),
                "causal": True,
            }
            | options,
        )


def _bad_windows() -> Bad:
    for window in ((-2, 0), (0, -2), (2**31, 0)):
        yield (
            f"window {window}",
            {"window_size": window},
            ValueError,
            ("window", str(min(window) if min(window) < -1 else 2**31)),
        )
    for odd in ((1.5, 0), (1,), 5, None, ("a", 1)):
        yield f"window {odd}", {"window_size": odd}, TypeError, ("window", "expected")


def _bad_shared(gen: Gen, base: Call) -> Bad:
    yield from _bad_windows()
    q = base["q"]
    yield "three heads", {"q": q[:, :3].contiguous()}, ValueError, ("Hk = 2", "H = 3")


def bad_paged(gen: Gen, base: Call) -> Bad:
    yield from _bad_shared(gen, base)
    q, k, v = base["q"], base["k_cache"], base["v_cache"]
    for dim in (12, 0):
        small = {"q": q[..., :dim], "k_cache": k[..., :dim], "v_cache": v[..., :dim]}
        yield f"head dim {dim}", {n: t.contiguous() for n, t in small.items()}, ValueError, ("multiple of 8",)
    wide = {n: t.repeat(*([1] * (t.dim() - 1)), 17)[..., :264] for n, t in (("q", q), ("k_cache", k), ("v_cache", v))}
    yield "head dim 264", {n: t.contiguous() for n, t in wide.items()}, ValueError, ("multiple of 8 from 8 to 256",)
    yield "no kv heads", {"k_cache": k[:, :, :0], "v_cache": v[:, :, :0]}, ValueError, ("Hk = 0",)
    yield "empty blocks", {"k_cache": k[:, :0], "v_cache": v[:, :0]}, ValueError, ("block_size ≥ 1",)
    yield "no offsets", {"cu_seqlens_q": gen.tensor([])}, ValueError, ("cu_seqlens_q has shape (0,)",)
    if q.is_cuda:
        return
    for wrong, says in (([1, 1, 6, 9], "cu_seqlens_q[0] is 1"), ([0, 6, 1, 9], "cu_seqlens_q[2] is 1")):
        yield f"cu_seqlens_q {wrong}", {"cu_seqlens_q": gen.tensor(wrong)}, ValueError, (says, "expected")
    yield "runs end early", {"cu_seqlens_q": gen.tensor([0, 1, 6, 8])}, ValueError, ("cu_seqlens_q[-1] is 8", "T = 9")
    yield "runs end late", {"cu_seqlens_q": gen.tensor([0, 1, 6, 10])}, ValueError, ("cu_seqlens_q[-1] is 10", "T = 9")
    yield "max_seqlen_q small", {"max_seqlen_q": 4}, ValueError, ("max_seqlen_q is 4", "at least 5", "sequence 1")
    yield "negative length", {"seqused_k": gen.tensor([9, -1, 8])}, ValueError, ("seqused_k[1] is -1",)
    yield "long length", {"seqused_k": gen.tensor([9, 5, 17])}, ValueError, ("seqused_k[2] is 17", "16")
    for block in (-1, k.shape[0], 2**31 - 1):
        table = base["block_table"].clone()
        table[1, 1] = block
        yield f"block {block}", {"block_table": table}, ValueError, (f"block_table[1, 1] is {block}", "num_blocks")


def bad_varlen(gen: Gen, base: Call) -> Bad:
    yield from _bad_shared(gen, base)
    q, k, v = base["q"], base["k"], base["v"]
    small = {"q": q[..., :12], "k": k[..., :12], "v": v[..., :12]}
    yield "head dim 12", {n: t.contiguous() for n, t in small.items()}, ValueError, ("multiple of 8",)
    if q.is_cuda:
        return
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        yield f"{name} from 2", {name: gen.tensor([2, 3, 6, 9])}, ValueError, (f"{name}[0] is 2", "expected 0")
        yield f"{name} descends", {name: gen.tensor([0, 5, 4, 9])}, ValueError, (f"{name}[2] is 4",)
    yield (
        "keys end late",
        {"cu_seqlens_k": gen.tensor([0, 9, 14, 99])},
        ValueError,
        ("cu_seqlens_k[-1] is 99", "Tk = 25"),
    )
    yield "max_seqlen_q small", {"max_seqlen_q": 0}, ValueError, ("max_seqlen_q is 0", "sequence 0")
    yield "max_seqlen_k small", {"max_seqlen_k": 8}, ValueError, ("max_seqlen_k is 8", "at least 9")


def bad_batch(gen: Gen, base: Call) -> Bad:
    yield from _bad_windows()
    q, k, v = base["q"], base["k"], base["v"]
    yield "three heads", {"q": q[:, :, :3].contiguous()}, ValueError, ("Hk = 2", "H = 3")
    small = {"q": q[..., :12], "k": k[..., :12], "v": v[..., :12]}
    yield "head dim 12", {n: t.contiguous() for n, t in small.items()}, ValueError, ("multiple of 8",)
    yield "another kernel", {"kernel": "sm70"}, ValueError, ("kernel is 'sm70'", "'auto', 'sm80', 'sm90'")
