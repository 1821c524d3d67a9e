"""`paged_attention` with batch_invariant: a sequence has the same bits alone, in batches of any size and order, beside any
others, and wherever its pages lie."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import ops
from tests.gpu.test_paged_attention import Cache, Shape, starts_of

pytestmark = pytest.mark.gpu


class Sequences:
    """Queries and keys of so many sequences, of which calls have some, in any order."""

    def __init__(
        self,
        rng: random.Random,
        shape: Shape,
        runs: list[int],
        lengths: list[int],
        kind: torch.dtype | None,
        of_tokens: bool,
        page: int = 16,
        **options: Any,
    ) -> None:
        self.runs, self.lengths, self.options = runs, lengths, options
        self.cache = Cache(rng, lengths, page, shape, torch.bfloat16 if kind is None else torch.float32)
        if kind is not None:
            self.cache.to_8_bits(rng, kind, of_tokens)
        self.q = [torch.randn(run, shape[0], shape[2], dtype=torch.bfloat16, device="cuda") for run in runs]

    def attend(self, members: list[int], **changes: Any) -> list[tuple[Tensor, Tensor]]:
        """out (run, H, D) and lse (H, run) of each."""
        runs, at = [self.runs[b] for b in members], torch.tensor(members, device="cuda")
        out, lse = ops.paged_attention(
            torch.cat([self.q[b] for b in members]),
            changes.get("k_cache", self.cache.k_cache),
            changes.get("v_cache", self.cache.v_cache),
            starts_of(runs),
            self.cache.lengths[at],
            changes.get("table", self.cache.table)[at],
            max(runs) + changes.get("longer", 0),
            batch_invariant=True,
            **changes.get("scales", self.cache.scales),
            **self.options,
        )
        starts = starts_of(runs).tolist()
        return [(out[i:j], lse[:, i:j]) for i, j in pairwise(starts)]

    def elsewhere(self) -> dict[str, Any]:
        """The same pages in another order, a wider table, and a higher bound of the query runs."""
        cache = self.cache
        blocks = cache.k_cache.shape[0]
        order = torch.randperm(blocks, device="cuda")  # new place → old one
        table = torch.randint(0, 1 << 30, (len(self.runs), cache.table.shape[1] + 300), device="cuda").int()
        for b, length in enumerate(self.lengths):
            used = -(-length // cache.k_cache.shape[1])
            table[b, :used] = order.argsort()[cache.table[b, :used].long()].int()
        moved = {name: getattr(cache, name).view(torch.uint8)[order] for name in ("k_cache", "v_cache")}
        return {
            **{name: t.view(getattr(cache, name).dtype) for name, t in moved.items()},
            "table": table,
            "longer": 1,
            "scales": {name: s[order] if s.dim() == 3 else s for name, s in cache.scales.items()},
        }


def check(sequences: Sequences, rng: random.Random) -> None:
    num = len(sequences.runs)
    alone = [sequences.attend([b])[0] for b in range(num)]
    groups = [list(range(num)), rng.sample(range(num), num)]
    groups += [rng.sample(range(num), min(n, num)) for n in (2, 7, 7)]
    calls = [(group, sequences.attend(group)) for group in groups]
    calls.append((groups[1], sequences.attend(groups[1], **sequences.elsewhere())))
    for group, results in calls:
        for b, (out, lse) in zip(group, results, strict=True):
            text = f"{sequences.runs[b]} queries to {sequences.lengths[b]} keys among {len(group)}"
            assert torch.equal(out, alone[b][0]), f"out of {text}"
            assert torch.equal(lse, alone[b][1]), f"lse of {text}"


KINDS = ((None, False), (torch.int8, True), (torch.float8_e4m3fn, False), (torch.float8_e4m3fn, True))


@pytest.mark.parametrize("shape", [(8, 8, 64), (32, 8, 128), (32, 2, 128), (8, 1, 256), (9, 3, 64), (40, 1, 128)])
@pytest.mark.parametrize(("kind", "of_tokens"), KINDS)
@pytest.mark.parametrize("window", [(-1, -1), (700, 0)])
def test_decodes(shape: Shape, kind: torch.dtype | None, of_tokens: bool, window: tuple[int, int]) -> None:
    """64 sequences, drafts among them, from no key to more than splits of the shortest size hold."""
    rng = random.Random(f"{shape} {kind} {of_tokens} {window}")
    most = max(1, 32 * shape[1] // shape[0])
    runs = [rng.choice((1, 1, 1, rng.randint(1, most))) for _ in range(64)]
    lengths = [rng.choice((0, 1, 255, 256, 257, 1024, rng.randint(1, 3000))) for _ in runs]
    lengths[:2] = 9000, 20_000
    sinks = {"sinks": torch.randn(shape[0], device="cuda")} if window[0] >= 0 else {}
    check(Sequences(rng, shape, runs, lengths, kind, of_tokens, window_size=window, **sinks), rng)


@pytest.mark.parametrize("shape", [(32, 8, 128), (8, 8, 64), (16, 2, 256), (6, 2, 96), (40, 1, 128)])
@pytest.mark.parametrize(("kind", "of_tokens"), KINDS)
@pytest.mark.parametrize("page", [16, 5])
def test_mixtures(shape: Shape, kind: torch.dtype | None, of_tokens: bool, page: int) -> None:
    """Prompts, chunks of them, drafts of more tokens than the decode kernel takes, and single tokens."""
    if kind is not None and shape[2] == 96:
        shape = (6, 2, 64)
    rng = random.Random(f"{shape} {kind} {of_tokens} {page}")
    runs = [rng.choice((1, 1, 1, 5, 17, 40, 63, 64, 65, rng.randint(1, 700))) for _ in range(24)]
    lengths = [run + rng.choice((0, 0, 300, rng.randint(0, 2500))) for run in runs]
    slopes = {"alibi_slopes": torch.rand(shape[0], device="cuda") * 0.1} if page == 16 and rng.random() < 0.5 else {}
    check(Sequences(rng, shape, runs, lengths, kind, of_tokens, page, **slopes), rng)


def test_trees() -> None:
    """One tree, in batches with and without longer sequences."""
    words = torch.tensor([1, 3, 5, 11, 17], device="cuda")
    gen = torch.Generator("cuda").manual_seed(3)
    k, v = (torch.randn(400, 16, 2, 128, generator=gen, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    q = torch.randn(900, 8, 128, generator=gen, device="cuda", dtype=torch.bfloat16)
    table = torch.arange(400, device="cuda").int().view(4, 100)
    found = []
    for others in ([], [1], [20], [200, 3], [64, 65, 1]):
        runs = [5, *others]
        lengths = torch.tensor([1200, *(run + 500 for run in others)], device="cuda").int()
        chains = [torch.full((run,), -1, device="cuda") for run in others]
        out, lse = ops.paged_attention(
            q[: sum(runs)], k, v, starts_of(runs), lengths, table[: len(runs)], max(runs),
            tree_mask=torch.cat([words, *chains]), batch_invariant=True,
        )  # fmt: skip
        found.append((out[:5], lse[:, :5]))
    for out, lse in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(lse, found[0][1])


def test_tokens_of_a_decode_one_by_one() -> None:
    """What the decode kernel takes has the same bits in one call or several, without V's scales of tokens."""
    rng = random.Random(11)
    for kind in (None, torch.float8_e4m3fn):
        sequences = Sequences(rng, (32, 8, 128), [8], [3000], kind, of_tokens=False)
        (together, lse) = sequences.attend([0])[0]
        q = sequences.q[0]
        for i in range(8):
            sequences.q, sequences.runs = [q[i : i + 1]], [1]
            sequences.cache.lengths.fill_(3000 - 7 + i)
            (out, own_lse) = sequences.attend([0])[0]
            assert torch.equal(out[0], together[i])
            assert torch.equal(own_lse[:, 0], lse[:, i])


def test_one_graph_serves_every_length() -> None:
    rng = random.Random(12)
    sequences = Sequences(rng, (32, 8, 128), [1] * 7, [5000] * 7, None, False)
    cache, q = sequences.cache, torch.cat(sequences.q)
    starts = starts_of([1] * 7)

    def call() -> tuple[Tensor, Tensor]:
        return ops.paged_attention(
            q, cache.k_cache, cache.v_cache, starts, cache.lengths, cache.table, 1, batch_invariant=True
        )

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call()
    for _ in range(20):
        cache.lengths.copy_(torch.tensor([rng.choice((0, 1, 300, rng.randint(1, 5000))) for _ in range(7)]))
        graph.replay()
        expected, expected_lse = call()
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)
