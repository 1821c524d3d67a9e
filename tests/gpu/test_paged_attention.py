"""Attention over pages on drawn calls, decode and prompts: the 2× rule with NaN in all that no sequence owns, the same bits
each time, and one captured graph for every length."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import ops
from tests.gpu.test_flash_attention import attend

pytestmark = pytest.mark.gpu
HEAD_DIMS = (40, 64, 80, 96, 128, 192, 256)
PAGES = (1, 5, 8, 16, 64, 128)
CHUNKS, PER_CHUNK = 6, 75  # of each of seven families: 3,150 calls, each of them also with an output in e4m3
Shape = tuple[int, int, int]  # heads, KV heads, head dim


class Cache:
    """Sequences of these lengths in pages of random order; NaN elsewhere, and any number in unused slots of the table."""

    def __init__(self, rng: random.Random, lengths: list[int], page: int, shape: Shape, dtype: torch.dtype) -> None:
        _, kv_heads, dim = shape
        gen = torch.Generator("cuda").manual_seed(rng.randrange(1 << 30))
        counts = [-(-n // page) for n in lengths]
        order = rng.sample(range(sum(counts) + 3), sum(counts))
        pools = (sum(counts) + 3, page, kv_heads, dim)
        self.k_cache, self.v_cache = (torch.full(pools, math.nan, dtype=dtype, device="cuda") for _ in range(2))
        table = [[rng.randrange(-(1 << 31), 1 << 31) for _ in range(max(counts) + 2)] for _ in lengths]
        self.k, self.v = [], []
        for b, length in enumerate(lengths):
            own = [order.pop() for _ in range(counts[b])]
            table[b][: counts[b]] = own
            at = torch.arange(length)
            slots = (torch.tensor(own, dtype=torch.int64)[at // page] * page + at % page).cuda()
            for pool, kept in ((self.k_cache, self.k), (self.v_cache, self.v)):
                rows = torch.randn(length, kv_heads, dim, generator=gen, dtype=dtype, device="cuda")
                kept.append(rows)
                pool.view(-1, kv_heads, dim)[slots] = rows
        self.table = torch.tensor(table, dtype=torch.int64).int().cuda()
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        self.scales: dict[str, Tensor] = {}

    def to_8_bits(self, rng: random.Random, kind: torch.dtype, of_tokens: bool) -> None:
        """With scales of KV heads or of their tokens, NaN where no sequence is; k and v become what the numbers are."""
        largest = 448.0 if kind.is_floating_point else 127.0
        pools, dense = [self.k_cache, self.v_cache], [self.k, self.v]
        gen = torch.Generator("cuda").manual_seed(rng.randrange(1 << 30))
        for i, name in enumerate(("k_scale", "v_scale")):
            blocks, page, kv_heads, _ = pools[i].shape
            scale = (
                torch.rand(blocks, kv_heads, page, generator=gen, device="cuda").transpose(1, 2) * 4 / largest + 0.002
            )
            if not of_tokens:
                scale = scale[0, 0].expand(blocks, page, kv_heads)
            numbers = (pools[i].float() / scale.unsqueeze(-1)).clamp(-largest, largest)
            pools[i] = numbers.to(kind) if kind.is_floating_point else numbers.round().nan_to_num(-128.0).to(kind)
            values = pools[i].float() * scale.unsqueeze(-1)
            owned = ~numbers[..., 0].isnan()
            for b, rows in enumerate(dense[i]):
                own = self.table[b, : -(-len(rows) // page)].long()
                dense[i][b] = values[own].flatten(0, 1)[: len(rows)]
            self.scales[name] = scale.masked_fill(~owned, math.nan) if of_tokens else scale[0, 0].contiguous()
        self.k_cache, self.v_cache = pools


def starts_of(runs: list[int]) -> Tensor:
    return torch.tensor([0, *runs], device="cuda").cumsum(0).int()


def check(
    q: Tensor, cache: Cache, runs: list[int], lengths: list[int], out: Tensor, lse: Tensor, options: dict[str, Any],
    rounds_keys: bool = False,
) -> None:  # fmt: skip
    """rounds_keys: the kernel may have rounded keys to q's dtype, as plain torch does."""
    starts = starts_of(runs).tolist()
    worst = plain_worst = scale = 0.0
    for b, length in enumerate(lengths):
        own = slice(starts[b], starts[b + 1])
        if own.start == own.stop:
            continue
        words = options["tree_mask"][own] if "tree_mask" in options and runs[b] <= 64 else None
        of_sequence = options | {"tree_mask": words}
        exact, exact_lse = attend(q[own], cache.k[b][:length], cache.v[b][:length], torch.float32, of_sequence)
        plain, _ = attend(q[own], cache.k[b][:length], cache.v[b][:length], q.dtype, of_sequence)
        assert torch.equal(lse[:, own] == -math.inf, exact_lse == -math.inf)
        if rounds_keys:
            rounded = cache.k[b][:length].to(q.dtype).float()
            _, rounded_lse = attend(q[own], rounded, cache.v[b][:length], torch.float32, of_sequence)
            near = (lse[:, own] - exact_lse).abs() < (lse[:, own] - rounded_lse).abs()
            exact_lse = torch.where(near, exact_lse, rounded_lse)
        seen = exact_lse.isfinite()
        assert torch.allclose(lse[:, own][seen], exact_lse[seen], rtol=1e-5, atol=2e-4)
        worst = max(worst, float((out[own].float() - exact).abs().max()))
        plain_worst = max(plain_worst, float((plain.float() - exact).abs().max()))
        scale = max(scale, float(exact.abs().max()))
    assert worst <= 2 * plain_worst + 0.5 * torch.finfo(q.dtype).eps * scale, f"{worst:.3e}, plain {plain_worst:.3e}"


def draw_heads(rng: random.Random, kv_heads: tuple[int, ...], groups: tuple[int, ...]) -> tuple[int, int]:
    """KV heads, and heads to each: of these, and rarely more than a tile's rows can be shared among."""
    if rng.random() < 0.1:
        return rng.choice((1, 2)), rng.choice((31, 32, 64, 71, 128))
    return rng.choice(kv_heads), rng.choice(groups)


def draw_options(rng: random.Random, heads: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "causal": rng.random() < 0.6,
        "window_size": rng.choice(((-1, -1), (-1, -1), (17, 0), (200, 5))),
        "softcap": rng.choice((0.0, 0.0, 15.0)),
    }
    if rng.random() < 0.3:
        options["alibi_slopes"] = torch.rand(heads, device="cuda") * 0.1
    if rng.random() < 0.3:
        options["sinks"] = torch.randn(heads, device="cuda")
    return options


def draw_trees(rng: random.Random, runs: list[int]) -> Tensor:
    """A tree mask: each query's parent is one before it, or none; of runs that are too long, garbage."""
    words: list[int] = []
    for run in runs:
        own: list[int] = []
        for i in range(run):
            parent = rng.randint(-1, i - 1)
            own.append(1 << i | (own[parent] if parent >= 0 else 0) if run <= 64 else rng.randrange(1 << 64))
        words += own
    return torch.tensor([word - (word >> 63 << 64) for word in words], device="cuda")


def attend_twice(
    rng: random.Random,
    shape: Shape,
    page: int,
    runs: list[int],
    lengths: list[int],
    dtype: torch.dtype,
    kind: torch.dtype | None = None,
    trees: bool = False,
) -> None:
    cache = Cache(rng, lengths, page, shape, dtype if kind is None else torch.float32)
    if kind is not None:
        cache.to_8_bits(rng, kind, of_tokens=rng.random() < 0.5)
    q = torch.randn(sum(runs), shape[0], shape[2], dtype=dtype, device="cuda")
    options = draw_options(rng, shape[0])
    if trees:
        options |= {"causal": True, "tree_mask": draw_trees(rng, runs)}
    call = (q, cache.k_cache, cache.v_cache, starts_of(runs), cache.lengths, cache.table, max(runs))
    mode = cache.scales | {"batch_invariant": rng.random() < 0.3}
    out, lse = ops.paged_attention(*call, **options, **mode)
    again, lse_again = ops.paged_attention(*call, **options, **mode)
    assert torch.equal(out, again), "out has other bits in a second run"
    assert torch.equal(lse, lse_again), "lse has other bits in a second run"
    of_tokens = kind is not None and cache.scales["k_scale"].dim() == 3
    check(q, cache, runs, lengths, out, lse, options, rounds_keys=of_tokens)
    check_e4m3(rng, out, lse, lambda **own: ops.paged_attention(*call, **options, **mode, **own))


def check_e4m3(rng: random.Random, out: Tensor, lse: Tensor, attend: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """The same call with its output in e4m3, of which much, little or nothing is cut: near what out would be, and every row
    written."""
    largest = out.float().abs().max().clamp(min=1e-3)
    scale = (largest / rng.choice((20.0, 448.0, 2000.0))).reshape(1)
    eight = torch.full_like(out, math.nan).to(torch.float8_e4m3fn)
    found, found_lse = attend(out_scale=scale, out=eight)
    assert found is eight
    assert torch.allclose(found_lse, lse, rtol=1e-5, atol=2e-3)  # of prompts, another form of the kernel
    wanted = (out.float() / scale).clamp(-448, 448)
    noise = 4 * torch.finfo(out.dtype).eps * torch.minimum(largest / scale, largest.new_tensor(448.0))
    worst = (eight.float() - wanted).abs() - (wanted.abs() / 16).clamp(min=2**-10) - noise
    assert float(worst.max()) <= 0, "NaN, or further from out than half a step of e4m3"
    again, _ = attend(out_scale=scale)
    assert torch.equal(eight.view(torch.uint8), again.view(torch.uint8))


def drawn_decodes(seed: int) -> None:
    rng = random.Random(seed)
    dtype = rng.choice((torch.bfloat16, torch.float16))
    kv_heads, group = draw_heads(rng, (1, 2, 3, 8), (1, 2, 3, 4, 8, 16, 24))
    shape = (kv_heads * group, kv_heads, rng.choice(HEAD_DIMS))
    batch = rng.choice((1, 2, 3, 7, 33, 70))
    longest = rng.choice((1, 20, 300, 1500, 5000 if batch < 8 else 300))
    lengths = [rng.choice((0, 1, longest, rng.randint(0, longest))) for _ in range(batch)]
    most = max(1, 32 // group)
    runs = [most, *(rng.randint(0, most) for _ in range(batch - 1))]
    attend_twice(rng, shape, rng.choice(PAGES), runs, lengths, dtype)


def drawn_decodes_of_few_keys(seed: int) -> None:
    """What the kernel for few rows and keys takes where there are clusters, and calls at its edges."""
    rng = random.Random(seed)
    dtype = rng.choice((torch.bfloat16, torch.float16))
    kv_heads, group = rng.choice((1, 2, 3, 8)), rng.choice((1, 2, 3, 4, 8))
    batch, longest = rng.choice(((1, 2000), (1, 2200), (1, 300), (2, 1000), (3, 500), (4, 500), (8, 250)))
    lengths = [longest, *(rng.choice((0, 1, longest, rng.randint(0, longest))) for _ in range(batch - 1))]
    runs = [8 // group, *(rng.randint(0, 8 // group) for _ in range(batch - 1))]
    cache = Cache(rng, lengths, rng.choice((16, 48, 64)), (kv_heads * group, kv_heads, rng.choice((64, 128))), dtype)
    q = torch.randn(sum(runs), kv_heads * group, cache.k_cache.size(-1), dtype=dtype, device="cuda")
    options = {"causal": rng.random() < 0.7}
    if rng.random() < 0.5:  # a head's tokens side by side, and q a part of wider rows
        cache.k_cache, cache.v_cache = (
            pages.transpose(1, 2).contiguous().transpose(1, 2) for pages in (cache.k_cache, cache.v_cache)
        )
        q = torch.cat((q, q), 1)[:, : q.size(1)]
    call = (q, cache.k_cache, cache.v_cache, starts_of(runs), cache.lengths, cache.table, max(runs))
    out, lse = ops.paged_attention(*call, **options)
    again, lse_again = ops.paged_attention(*call, **options)
    assert torch.equal(out, again), "out has other bits in a second run"
    assert torch.equal(lse, lse_again), "lse has other bits in a second run"
    check(q, cache, runs, lengths, out, lse, options)


def drawn_caches_of_8_bits(seed: int) -> None:
    """Of both kinds, with both kinds of scales; with more rows than decoding has, too."""
    rng = random.Random(2000 + seed)
    dtype, kind = rng.choice((torch.bfloat16, torch.float16)), rng.choice((torch.int8, torch.float8_e4m3fn))
    kv_heads, group = draw_heads(rng, (1, 2, 3, 8), (1, 2, 3, 4, 8, 16, 24))
    shape = (kv_heads * group, kv_heads, rng.choice((16, 48, 64, 80, 96, 128, 160, 256)))
    batch = rng.choice((1, 2, 3, 7, 33))
    longest = rng.choice((1, 20, 300, 1500, 5000 if batch < 8 else 300))
    lengths = [rng.choice((0, 1, longest, rng.randint(0, longest))) for _ in range(batch)]
    runs = [rng.randint(1 if b == 0 else 0, max(1, rng.choice((16, 80)) // group)) for b in range(batch)]
    attend_twice(rng, shape, rng.choice(PAGES), runs, lengths, dtype, kind)


def drawn_trees(seed: int) -> None:
    """Of the decode kernel's sizes and larger ones, beside prompts too, over caches of every dtype."""
    rng = random.Random(3000 + seed)
    dtype = rng.choice((torch.bfloat16, torch.float16))
    kind = rng.choice((None, None, torch.int8, torch.float8_e4m3fn))
    kv_heads, group = draw_heads(rng, (1, 2, 3), (1, 2, 3, 4, 8, 16, 40))
    shape = (kv_heads * group, kv_heads, rng.choice(HEAD_DIMS if kind is None else (48, 64, 128, 256)))
    batch = rng.choice((1, 2, 5, 33))
    most = rng.choice((max(1, 32 // group), 16, 64))
    runs = [most, *(rng.choice((0, 1, rng.randint(1, most))) for _ in range(batch - 1))]
    if rng.random() < 0.4:
        runs[-1] = rng.choice((65, 90, 400))
    prefixes = [rng.choice((0, 1, rng.randint(0, 1500 if batch < 33 else 200))) for _ in runs]
    lengths = [prefix + run if rng.random() < 0.9 else run // 2 for prefix, run in zip(prefixes, runs, strict=True)]
    attend_twice(rng, shape, rng.choice(PAGES), runs, lengths, dtype, kind, trees=True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("dim", [80, 128, 256])
@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_what_is_appended_is_attended_to(kind: torch.dtype, dim: int, hadamard: bool, seed: int) -> None:
    """Keys and values that rope_kv_write makes of 8 bits, with their scales, and the same ones in 16 bits. Where it mixes the
    dims of keys it mixes those of queries."""
    torch.manual_seed(seed)
    tokens, heads, page = 300, (8, 2), 16
    q, k, v = (torch.randn(tokens, n, dim, dtype=torch.bfloat16, device="cuda") for n in (heads[0], heads[1], heads[1]))
    angle = torch.rand(tokens, dim // 2, device="cuda") * 6
    order = torch.randperm(-(-tokens // page), device="cuda").int()
    position = torch.arange(tokens, device="cuda").int()
    slots = order[(position // page).long()] * page + position % page
    outs = []
    for dtype in (torch.bfloat16, kind):
        pools = [torch.zeros(len(order), page, heads[1], dim, device="cuda").to(dtype) for _ in range(2)]
        scales: dict[str, Tensor] = {}
        mixed = {"hadamard": hadamard} if dtype is kind else {}
        if dtype is kind:
            for name in ("k_scale", "v_scale"):
                scales[name] = torch.zeros(len(order), heads[1], page, device="cuda").transpose(1, 2)
        rows = q.clone()
        ops.rope_kv_write(
            rows, k, v, torch.cat([angle.cos(), angle.sin()], 1), position, slots.int(), *pools, **scales, **mixed
        )
        call = (rows, *pools, starts_of([tokens]), starts_of([tokens])[1:], order[None], tokens)
        outs.append(ops.paged_attention(*call, **scales)[0].float())
    error = float((outs[0] - outs[1]).abs().max())
    assert error < (0.04 if kind is torch.int8 else 0.2), error


def drawn_prompts(seed: int) -> None:
    """Chunks behind prefixes, long and short ones mixed: the Hopper kernel, and the decode kernel for the short ones."""
    rng = random.Random(1000 + seed)
    dtype = rng.choice((torch.bfloat16, torch.float16))
    kv_heads, group = draw_heads(rng, (1, 2, 3), (1, 2, 4, 7))
    shape = (kv_heads * group, kv_heads, rng.choice(HEAD_DIMS))
    batch, longest = rng.choice(((1, 3000), (2, 1100), (5, 500), (40, 200)) if group < 16 else ((1, 300), (3, 200)))
    runs = [rng.choice((0, 1, 63, 64, 65, 129, rng.randint(0, longest))) for _ in range(batch)]
    runs[0] = longest
    prefixes = [rng.choice((0, 0, 1, rng.randint(0, 700))) for _ in runs]
    lengths = [prefix + run if rng.random() < 0.9 else run // 2 for prefix, run in zip(prefixes, runs, strict=True)]
    attend_twice(rng, shape, rng.choice((*PAGES, 24, 256)), runs, lengths, dtype)


def drawn_drafts(seed: int) -> None:
    """More rows than decoding has, of a few tokens each: a tile packs the heads of a group, or has few rows."""
    rng = random.Random(4000 + seed)
    dtype = rng.choice((torch.bfloat16, torch.float16))
    kv_heads, group = draw_heads(rng, (1, 2, 5), (2, 3, 4, 8, 9, 16, 24, 71))
    shape = (kv_heads * group, kv_heads, rng.choice(HEAD_DIMS))
    batch, longest = rng.choice((1, 2, 9, 40 if group < 31 else 3)), rng.choice((-(-64 // group), 17, 40, 150))
    runs = [longest, *(rng.choice((0, 1, longest, rng.randint(0, longest))) for _ in range(batch - 1))]
    lengths = [run + rng.choice((0, 1, rng.randint(0, 4000))) for run in runs]
    attend_twice(rng, shape, rng.choice((*PAGES, 24, 256)), runs, lengths, dtype)


def drawn_prompts_of_8_bits(seed: int) -> None:
    """The Hopper kernel again, which widens K and V, and the decode kernel for the short ones."""
    rng = random.Random(3000 + seed)
    dtype, kind = rng.choice((torch.bfloat16, torch.float16)), rng.choice((torch.int8, torch.float8_e4m3fn))
    kv_heads, group = draw_heads(rng, (1, 2, 3), (1, 2, 4, 7))
    shape = (kv_heads * group, kv_heads, rng.choice((16, 48, 64, 80, 96, 128, 160, 256)))
    batch, longest = rng.choice(((1, 3000), (2, 1100), (5, 500), (40, 200)) if group < 16 else ((1, 300), (3, 200)))
    runs = [longest, *(rng.choice((0, 1, 63, 64, 65, 129, rng.randint(0, longest))) for _ in range(batch - 1))]
    lengths = [run + rng.choice((0, 0, 1, rng.randint(0, 700))) for run in runs]
    attend_twice(rng, shape, rng.choice((*PAGES, 24, 256)), runs, lengths, dtype, kind)


FAMILIES = (
    drawn_decodes, drawn_decodes_of_few_keys, drawn_caches_of_8_bits, drawn_trees, drawn_prompts, drawn_drafts,
    drawn_prompts_of_8_bits,
)  # fmt: skip


def run_drawn(family: Callable[[int], None], seed: int) -> None:
    """The same call for the same seed, whatever ran before; the message of a failure names it."""
    torch.manual_seed(seed)
    try:
        family(seed)
    except (AssertionError, RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise AssertionError(f"run_drawn({family.__name__}, {seed}): {error}") from error


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_drawn_calls(family: Callable[[int], None], chunk: int) -> None:
    for seed in range(chunk * PER_CHUNK, (chunk + 1) * PER_CHUNK):
        run_drawn(family, seed)


@pytest.mark.parametrize("blocks", [0, 3])
def test_a_cache_without_keys(blocks: int) -> None:
    """No pages at all, or tables without a slot: zeros, and no error."""
    q = torch.randn(200, 4, 64, dtype=torch.bfloat16, device="cuda")
    pools = torch.empty(blocks, 16, 2, 64, dtype=torch.bfloat16, device="cuda")
    table = torch.zeros(2, 3 - blocks, dtype=torch.int32, device="cuda")
    out, lse = ops.paged_attention(q, pools, pools, starts_of([130, 70]), table.new_zeros(2), table, 130)
    assert not out.any()
    assert bool((lse == -math.inf).all())


@pytest.mark.parametrize("capacity", [[3000, 200, 1, 900], [450, 200, 1, 400]])
def test_one_graph_serves_every_length(capacity: list[int]) -> None:
    rng = random.Random(0)
    cache = Cache(rng, capacity, 16, (32, 8, 128), torch.bfloat16)
    q = torch.randn(4, 32, 128, dtype=torch.bfloat16, device="cuda")
    call = (q, cache.k_cache, cache.v_cache, starts_of([1] * 4), cache.lengths, cache.table, 1)
    ops.paged_attention(*call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = ops.paged_attention(*call)
    for lengths in (capacity, [5, 0, 1, 0], [capacity[0] - 1, 199, 0, 1], [0] * 4, capacity, [64, 64, 1, 64]):
        cache.lengths.copy_(torch.tensor(lengths))
        for _ in range(2):  # the second finds no mark of the first
            out.fill_(math.nan)
            graph.replay()
            check(q, cache, [1] * 4, lengths, out, lse, {"causal": True})


def test_one_graph_serves_every_mixture() -> None:
    """Prompts and short sequences share the SMs, whichever are which. What is read is overwritten right behind the call, and
    what is written is read and overwritten there."""
    rng = random.Random(3)
    mixtures = [[512, *[1] * 17, 103, 8], [*[1] * 19, 621], [*[3] * 10, 300, *[1] * 8, 302]]
    cache = Cache(rng, [900] * 20, 16, (32, 8, 128), torch.bfloat16)
    q = torch.zeros(640, 32, 128, dtype=torch.bfloat16, device="cuda")
    starts = starts_of(mixtures[0])
    call = (q, cache.k_cache, cache.v_cache, starts, cache.lengths, cache.table, 640)
    ops.paged_attention(*call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = ops.paged_attention(*call)
        kept = out.clone()
        for tensor in (q, out):
            tensor.fill_(math.nan)
    results: dict[int, Tensor] = {}
    for i in (0, 1, 2, 0, 2, 1):
        runs = mixtures[i]
        rng.seed(i)
        lengths = [rng.randint(run, 900) for run in runs]
        fresh = torch.randn(q.shape, generator=torch.Generator("cuda").manual_seed(i), dtype=q.dtype, device="cuda")
        q.copy_(fresh)
        starts.copy_(starts_of(runs))
        cache.lengths.copy_(torch.tensor(lengths))
        graph.replay()
        check(fresh, cache, runs, lengths, kept, lse, {"causal": True})
        assert torch.equal(kept, results.setdefault(i, kept.clone()))


def test_one_graph_serves_every_tree() -> None:
    rng = random.Random(2)
    runs, capacity = [8, 8, 1], [900, 70, 300]
    cache = Cache(rng, capacity, 16, (32, 8, 128), torch.bfloat16)
    q = torch.randn(sum(runs), 32, 128, dtype=torch.bfloat16, device="cuda")
    call = (q, cache.k_cache, cache.v_cache, starts_of(runs), cache.lengths, cache.table, max(runs))
    words = draw_trees(rng, runs)
    ops.paged_attention(*call, tree_mask=words)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = ops.paged_attention(*call, tree_mask=words)
    for lengths in (capacity, [8, 9, 1], [500, 16, 0], capacity):
        cache.lengths.copy_(torch.tensor(lengths))
        words.copy_(draw_trees(rng, runs))
        out.fill_(math.nan)
        graph.replay()
        check(q, cache, runs, lengths, out, lse, {"causal": True, "tree_mask": words})


def test_calls_on_two_streams_do_not_meet() -> None:
    rng = random.Random(1)
    caches = [Cache(rng, [4000, 100], 16, (32, 8, 128), torch.bfloat16) for _ in range(2)]
    q = torch.randn(2, 32, 128, dtype=torch.bfloat16, device="cuda")
    calls = [(q, c.k_cache, c.v_cache, starts_of([1, 1]), c.lengths, c.table, 1) for c in caches]
    alone = [ops.paged_attention(*call)[0] for call in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    results: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for i, (stream, call) in enumerate(zip(streams, calls, strict=True)):
            with torch.cuda.stream(stream):
                results[i].append(ops.paged_attention(*call)[0])
    torch.cuda.synchronize()
    assert all(torch.equal(out, alone[i]) for i in range(2) for out in results[i])
