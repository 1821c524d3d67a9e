"""Valid calls of the attention operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastattn import ops
from tests.harness import formulas
from tests.harness.compare import assert_within
from tests.harness.generators import LENGTHS, Gen, Pages, offsets, pages
from tests.harness.opspec import Call

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
    ("prompt among tokens", [70, *[1] * 39], [90, *range(39)], 4, 2, 64, 16, {}),
    ("71 heads to a key", [2, 1], [19, 33], 71, 1, 64, 16, {}),
    ("128 heads to a key", [1, 2], [40, 5], 128, 1, 64, 16, {"window_size": (20, 0)}),
)


# As above, with trees.
_TREES: tuple[tuple[str, list[int], list[int], int, int, int, int, dict[str, Any]], ...] = (
    ("trees", [7, 1, 5, 0], [20, 9, 5, 3], 4, 2, 16, 4, {}),
    ("trees, window", [12, 3], [40, 17], 4, 2, 32, 16, {"window_size": (3, 0)}),
    ("trees, softcap", [16, 16], [31, 64], 9, 3, 64, 16, {"softcap": 5.0, "softmax_scale": 0.3}),
    ("a tree of 64, and chains", [64, 65, 1], [150, 70, 33], 2, 1, 32, 16, {"window_size": (9, -1)}),
    ("trees of more queries than keys", [7, 3], [4, 0], 2, 2, 16, 2, {}),
)

# As above: what the kernels for few sequences take on a Hopper GPU (paged_decode_short.cuh and _cluster.cuh, and the
# forward with packed heads and split keys).
_FEW_SEQUENCES: tuple[tuple[str, list[int], list[int], int, int, int, int, dict[str, Any]], ...] = (
    ("few keys", [2, 0, 1], [200, 40, 7], 8, 2, 128, 48, {}),
    ("few keys, two tiles a warp", [4], [1500], 2, 1, 64, 16, {"causal": False}),
    ("few keys, window", [1, 2], [200, 31], 8, 2, 128, 16, {"window_size": (50, 0)}),
    ("few tokens, split keys", [8, 3], [1100, 70], 4, 1, 128, 16, {}),
)


# As above without the block size, and with V's head dim: what is drawn for the other options.
_SIZES: tuple[tuple[list[int], list[int], int, int, int, int], ...] = (
    ([33, 20], [33, 41], 4, 2, 64, 48),
    ([1, 63], [65, 63], 6, 2, 64, 64),
    ([65, 0, 7], [129, 5, 0], 3, 3, 32, 80),
    ([127], [131], 7, 1, 128, 128),
    ([129, 2], [64, 2], 4, 4, 40, 8),
    ([13, 1, 31], [13, 257, 61], 8, 1, 96, 96),
    ([37], [101], 2, 2, 192, 128),
    ([5, 17], [67, 1], 2, 1, 64, 256),
    ([66], [66], 5, 5, 80, 80),
    ([3, 1], [37, 9], 32, 2, 64, 64),
    ([2], [21], 71, 1, 128, 64),
    ([3], [19], 128, 1, 64, 128),
)


def _drawn(gen: Gen, batch: int, heads: int, dtype: torch.dtype, everything: bool = False) -> Call:
    """Options at random, for `batch` sequences; or all that a tensor is given for."""

    def chance(probability: float) -> bool:
        return everything or bool(torch.rand((), generator=gen.rng) < probability)

    def one_of(values: tuple[Any, ...]) -> Any:
        return values[int(torch.randint(len(values), (), generator=gen.rng))]

    call: Call = {"causal": one_of((True, False))}
    if chance(0.5):
        call["alibi_slopes"] = gen.rand(*one_of(((heads,), (batch, heads))) if not everything else (batch, heads))
    if chance(0.4):
        call["sinks"] = gen.randn(heads, dtype=one_of((torch.float32, dtype)), scale=2.0)
    if everything:
        return call
    if chance(0.5):
        call["window_size"] = (one_of((-1, 0, 5, 40)), one_of((-1, 0, 3, 64)))
    if chance(0.4):
        call |= {"softcap": one_of((3.0, 20.0)), "softmax_scale": 0.4}
    return call


def trees(gen: Gen, runs: list[int]) -> torch.Tensor:
    """A tree mask in which each query's parent is one before it, or none; of runs that are too long, anything."""
    words, rng = [], torch.Generator().manual_seed(sum(runs))  # apart from gen's: it draws the same whoever has a tree
    for n in runs:
        own: list[int] = []
        for i in range(n):
            parent = int(torch.randint(-1, i, (), generator=rng)) if i else -1
            own.append((own[parent] if parent >= 0 else 0) | 1 << i)
        words += own if n <= 64 else [12345] * n
    return gen.tensor([word - (word >> 63 << 64) for word in words], torch.int64)


def paged_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    drawn = [
        (f"drawn {i}", runs, [max(n, 1) for n in lengths], heads, kv_heads, dim, 16, None)
        for i, (runs, lengths, heads, kv_heads, dim, _) in enumerate(_SIZES)
    ]
    all_calls = (*_PAGED, *drawn, *_TREES, *_FEW_SEQUENCES)
    for index, (name, runs, lengths, heads, kv_heads, dim, size, options) in enumerate(all_calls):
        cache = pages(gen, lengths, size, kv_heads, dim, dtype)
        if options is None or index == 0:
            options = _drawn(gen, len(runs), heads, dtype, everything=index == 0)
        if index == 0 or "tree" in name:
            options = options | {"tree_mask": trees(gen, runs), "causal": True}
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


def paged_8bit_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    """As above with caches of 8 bits where they can be: of both kinds and with both kinds of scales in turn."""
    kinds = ((torch.int8, True), (torch.float8_e4m3fn, False), (torch.int8, False), (torch.float8_e4m3fn, True))
    index = 0
    for name, call in paged_calls(gen, dtype):
        if call["q"].shape[2] % 16 != 0:
            continue
        kind, of_tokens = kinds[index % 4]
        pools = Pages(call["k_cache"], call["v_cache"], call["block_table"], [], [])
        # Without scales the numbers are the values: numbers that want one would make scores in which fp32 is not exact.
        call["k_cache"], call["v_cache"], scales = pools.in_8_bits(gen, kind, of_tokens, scaled=index % 8 != 1)
        call |= scales
        index += 1
        yield f"{name} in {kind}", call


def paged_e4m3_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    """Some of those with an output in 8 bits: nothing is cut, much is, and much is below its normal numbers."""
    scales = {"mixed": 0.02, "decode": 1e-3, "empty runs": 40.0, "trees": 0.02}
    for name, call in paged_calls(gen, dtype):
        if name in scales:
            yield f"{name}, out in 8 bits", call | {"out_scale": gen.tensor([scales[name]], torch.float32)}


def verify_e4m3(call: Call, results: list[torch.Tensor]) -> None:
    """out is the fp64 formula's over the scale, but for half a step of e4m3 and what the call's 16 bits cost."""
    out, lse = results
    scale = float(call.pop("out_scale"))
    exact, exact_lse = formulas.paged_attention(torch.float64, **call)
    assert out.dtype is torch.float8_e4m3fn
    wanted = (exact / scale).clamp(-448, 448)
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    noise = 2 * torch.finfo(call["q"].dtype).eps * min(largest, 448.0)
    allowed = torch.maximum(wanted.abs() * 2**-4, torch.tensor(2.0**-10)) + noise
    assert_within((out.double() - wanted) / allowed, torch.zeros_like(wanted), 1.0, "out, in what is allowed")
    assert_within(lse, exact_lse, 1e-3, "lse")


def _kernels(gen: Gen) -> tuple[str, ...]:
    """On a Hopper GPU each kernel in turn, since so few rows would all go to the portable one."""
    hopper = gen.device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    return ("sm80", "sm90") if hopper else ("auto",)


def _can_run(gen: Gen, kernel: str, call: Call) -> bool:
    """Of a GPU's kernels only Hopper's has fp8."""
    return gen.device == "cpu" or kernel == "sm90" or call["q"].dtype is not torch.float8_e4m3fn


def _fp8(gen: Gen, call: Call, batch: int, kv_heads: int) -> Call:
    """The same in e4m3, with scales: for q and v, of any strides."""
    halved = {name: (call[name] / 2).to(torch.float8_e4m3fn) for name in ("q", "k", "v")}
    scales = {f"{name}_descale": gen.rand(batch, kv_heads) + 0.5 for name in ("q", "v")}
    scales["q_descale"] = scales["q_descale"][:, :1].expand(batch, kv_heads)
    return call | halved | scales


# name, B, Sq, Sk, heads, kv heads, head dim, options
_BATCH: tuple[tuple[str, int, int, int, int, int, int, dict[str, Any]], ...] = (
    ("square", 2, 33, 33, 4, 2, 64, {"causal": True}),
    ("full", 3, 17, 40, 6, 2, 32, {}),
    ("one", 1, 1, 1, 1, 1, 8, {}),
    ("decode", 2, 1, 129, 8, 2, 128, {"causal": True}),
    ("more queries than keys", 2, 65, 31, 2, 1, 40, {"causal": True}),
    ("no keys", 2, 5, 0, 2, 2, 16, {}),
    ("no queries", 2, 0, 5, 2, 2, 16, {}),
    ("no batch", 0, 5, 7, 2, 2, 16, {}),
    ("window", 1, 130, 193, 3, 3, 80, {"window_size": (40, 3)}),
    ("softcap", 2, 63, 64, 4, 4, 96, {"softcap": 9.0, "softmax_scale": 0.4}),
    ("head dim 256", 1, 31, 127, 2, 1, 256, {"causal": True}),
)


def batch_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for kernel in _kernels(gen):
        for name, call in _batch_calls(gen, dtype):
            if _can_run(gen, kernel, call):
                yield f"{name}, {kernel}", call | {"kernel": kernel}


def _batch_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    def tensors(batch: int, queries: int, keys: int, heads: int, kv_heads: int, dim: int, v_dim: int) -> Call:
        return {
            "q": gen.randn(batch, queries, heads, dim, dtype=dtype),
            "k": gen.randn(batch, keys, kv_heads, dim, dtype=dtype),
            "v": gen.randn(batch, keys, kv_heads, v_dim, dtype=dtype),
        }

    yield "everything", tensors(2, 33, 33, 4, 2, 64, 48) | _drawn(gen, 2, 4, dtype, everything=True)
    for name, *sizes, options in _BATCH:
        yield name, tensors(*sizes, sizes[-1]) | options
    for index, (runs, lengths, heads, kv_heads, dim, v_dim) in enumerate(_SIZES):
        call = tensors(2, runs[0], lengths[0], heads, kv_heads, dim, v_dim) | _drawn(gen, 2, heads, dtype)
        yield f"drawn {index}", call
        if dtype is torch.bfloat16 and dim % 16 == v_dim % 16 == 0:
            yield f"drawn {index} in fp8", _fp8(gen, call, 2, kv_heads)


def varlen_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for kernel in _kernels(gen):
        for name, call in _varlen_calls(gen, dtype):
            if _can_run(gen, kernel, call):
                yield f"{name}, {kernel}", call | {"kernel": kernel}


def _packed(
    gen: Gen, dtype: torch.dtype, runs: list[int], lengths: list[int], heads: int, kv_heads: int, dim: int, v_dim: int
) -> Call:
    extra = 3  # rows past the end of cu_seqlens_k, which have no effect
    k, v = (gen.randn(sum(lengths) + extra, kv_heads, d, dtype=dtype) for d in (dim, v_dim))
    k[sum(lengths) :] = math.nan
    v[sum(lengths) :] = math.nan
    return {
        "q": gen.randn(sum(runs), heads, dim, dtype=dtype),
        "k": k,
        "v": v,
        "cu_seqlens_q": gen.tensor(offsets(runs)),
        "cu_seqlens_k": gen.tensor(offsets(lengths)),
        "max_seqlen_q": max(runs, default=0),
        "max_seqlen_k": max(lengths, default=0),
        "causal": True,
    }


def _use_fewer(gen: Gen, call: Call, side: str) -> None:
    """Of some sequences' queries or keys not all are used, and the rest are NaN."""
    at = call[f"cu_seqlens_{side}"].tolist()
    used = [int(gen.ints(0, n + 1)) if n % 2 else n for n in (at[b + 1] - at[b] for b in range(len(at) - 1))]
    call[f"seqused_{side}"] = gen.tensor(used)
    for name in ("q",) if side == "q" else ("k", "v"):
        for b, count in enumerate(used):
            call[name][at[b] + count : at[b + 1]] = math.nan


def _varlen_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    call = _packed(gen, dtype, [1, 5, 3], [9, 5, 8], 4, 2, 16, 32) | _drawn(gen, 3, 4, dtype, everything=True)
    for side in "qk":
        _use_fewer(gen, call, side)
    yield "everything", call
    for name, runs, lengths, heads, kv_heads, dim, _, options in _PAGED:
        yield name, _packed(gen, dtype, runs, lengths, heads, kv_heads, dim, dim) | options
    for index, sizes in enumerate(_SIZES):
        call = _packed(gen, dtype, *sizes) | _drawn(gen, len(sizes[0]), sizes[2], dtype)
        for side in "qk":
            if float(gen.rand()) < 0.5:
                _use_fewer(gen, call, side)
        yield f"drawn {index}", call
        if dtype is torch.bfloat16 and sizes[4] % 16 == sizes[5] % 16 == 0:
            yield f"drawn {index} in fp8", _fp8(gen, call, len(sizes[0]), sizes[3])


def _backward_calls(
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]], calls: Iterator[tuple[str, Call]], gen: Gen
) -> Iterator[tuple[str, Call]]:
    """Of each call of the forward, but for fp8 and sinks, which are in lse: its results and gradients for them."""
    for index, (name, call) in enumerate(calls):
        if call["q"].dtype is torch.float8_e4m3fn:
            continue
        call.pop("sinks", None)
        out, lse = forward(**call)
        dout = gen.randn(*out.shape, dtype=out.dtype)
        if "seqused_q" in call:  # what is NaN in q is so here
            dout[call["q"][..., 0].isnan()] = math.nan
        call |= {"dout": dout, "out": out, "lse": lse, "deterministic": index % 2 == 0}
        if index == 0 or float(gen.rand()) < 0.5:
            call["dlse"] = gen.randn(*lse.shape)
        yield name, call


def batch_backward_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    yield from _backward_calls(ops.batch_attention, batch_calls(gen, dtype), gen)


def varlen_backward_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    yield from _backward_calls(ops.varlen_attention, varlen_calls(gen, dtype), gen)


def merge_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    """Batched and packed, of odd sizes; rows that are empty on one side or both hold NaN there."""
    for *batch, rows, heads, dim in (
        (2, 5, 3, 16),
        (7, 4, 64),
        (0, 2, 8),
        (1, 1, 1),
        (3, 0, 2, 8),
        (65, 3, 13),
        (129, 2, 256),
    ):
        call: Call = {}
        for side in "ab":
            out, lse = gen.randn(*batch, rows, heads, dim, dtype=dtype), gen.randn(*batch, heads, rows, scale=5.0)
            for value in (-math.inf, math.inf):
                empty = gen.rand(*lse.shape) < 0.15
                lse.masked_fill_(empty, value)
                out.masked_fill_(empty.transpose(-1, -2).unsqueeze(-1), math.nan)
            call |= {f"out_{side}": out, f"lse_{side}": lse}
        yield f"{(*batch, rows, heads, dim)}", call
