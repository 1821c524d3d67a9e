"""Valid and bad calls of the sampling operators, and what a drawn token must satisfy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastattn.reference.philox import philox_first_word, philox_words
from tests.harness.generators import Gen, offsets
from tests.harness.opspec import Bad, Call

F32, I64 = torch.float32, torch.int64
NAN, INF = math.nan, math.inf


def adjust_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for name, vocab, touched in (
        ("mixed", 50, [5, 0, 50]),
        ("nothing touched", 8, [0, 0]),
        ("no rows", 8, []),
        ("wide", 4099, [300, 1]),
        ("many rows", 9, [row % 4 for row in range(2100)]),
    ):
        rows, nnz = len(touched), sum(touched)
        yield (
            name,
            {
                "logits": gen.randn(rows, vocab, scale=3.0),
                "token_ids": gen.tensor([t for n in touched for t in gen.permutation(vocab)[:n]]),
                "counts": gen.ints(-1, 4, nnz),
                "bias": gen.randn(nnz),
                "indptr": gen.tensor(offsets(touched)),
                "repetition_penalty": gen.rand(rows) + 0.5,
                "presence_penalty": gen.randn(rows),
                "frequency_penalty": gen.randn(rows),
            },
        )


def bad_adjust(gen: Gen, base: Call) -> Bad:
    if base["logits"].is_cuda:
        return

    def at(name: str, index: int, value: float) -> Call:
        wrong = base[name].clone()
        wrong[index] = value
        return {name: wrong}

    yield "indptr from 1", at("indptr", 0, 1), ValueError, ("indptr[0] is 1", "expected 0")
    yield "indptr descends", at("indptr", 2, 4), ValueError, ("indptr[2] is 4", "≥ indptr[1] = 5")
    yield "indptr short", at("indptr", 3, 54), ValueError, ("indptr[-1] is 54", "nnz = 55")
    yield "token -1", at("token_ids", 7, -1), ValueError, ("token_ids[7] is -1", "≤ 49")
    yield "token 50", at("token_ids", 7, 50), ValueError, ("token_ids[7] is 50", "≤ 49")
    yield "count -2", at("counts", 7, -2), ValueError, ("counts[7] is -2",)
    for value in (0.0, -1.0, NAN, INF):
        yield (
            f"repetition {value}",
            at("repetition_penalty", 1, value),
            ValueError,
            (f"repetition_penalty[1] is {value}",),
        )
    for name in ("presence_penalty", "frequency_penalty"):
        for value in (NAN, INF):
            yield f"{name} {value}", at(name, 1, value), ValueError, (f"{name}[1] is {value}", "finite")


def bitmask_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for name, rows, vocab, named in (
        ("some rows", 5, 100, [3, 0]),
        ("whole words", 2, 64, [0, 1]),
        ("one token", 3, 1, [2, 1]),
        ("no masks", 4, 33, []),
        ("a row twice", 2, 97, [1, 1, 0]),
        ("every row", 33, 1025, list(range(33))[::-1]),
        ("wide", 2, 4099, [1]),
        ("several CTAs, rows that begin anywhere", 3, 20001, [1, 2]),
    ):
        words = gen.ints(-(2**31), 2**31 - 1, len(named), -(-vocab // 32))
        yield name, {"logits": gen.randn(rows, vocab, scale=3.0), "bitmask": words, "rows": gen.tensor(named)}
    odd = gen.randn(3, 40)
    odd[0, 3], odd[1, 4], odd[2, :] = NAN, INF, -INF
    # Nothing allowed, all allowed, the highest bit alone.
    words = gen.tensor([[0, 0], [-1, -1], [-(2**31), 0]])
    yield "not finite", {"logits": odd, "bitmask": words, "rows": gen.tensor([0, 1, 2])}


def bad_bitmask(gen: Gen, base: Call) -> Bad:
    for words in (3, 5):
        wrong = base["bitmask"].new_zeros(2, words)
        yield f"{words} words", {"bitmask": wrong}, ValueError, (f"bitmask has shape (2, {words})", "(R, 4)", "V = 100")
    if not base["logits"].is_cuda:
        for row in (-1, 5, 2**31 - 1):
            wrong = base["rows"].clone()
            wrong[1] = row
            yield f"row {row}", {"rows": wrong}, ValueError, (f"rows[1] is {row}", "≤ 4")


def sample_call(
    gen: Gen,
    logits: Tensor,
    temperature: float | list[float] = 1.0,
    top_k: int | list[int] = 0,
    top_p: float | list[float] = 1.0,
    min_p: float | list[float] = 0.0,
) -> Call:
    rows = logits.shape[0]

    def column(value: Any, dtype: torch.dtype) -> Tensor:
        return gen.tensor(value if isinstance(value, list) else [value] * rows, dtype)

    return {
        "logits": logits,
        "temperature": column(temperature, F32),
        "top_k": column(top_k, torch.int32),
        "top_p": column(top_p, F32),
        "min_p": column(min_p, F32),
        "seed": gen.ints(-(2**62), 2**62, rows, dtype=I64),
        "position": gen.ints(0, 2**40, rows, dtype=I64),
    }


def sample_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    def logits(rows: int, vocab: int, scale: float = 3.0) -> Tensor:
        return gen.randn(rows, vocab, dtype=dtype, scale=scale)

    yield "all kinds", sample_call(gen, logits(5, 300), [0.0, 1.0, 0.7, 2.0, 1.0], [5, 0, 10, 1, 300], 0.9, 0.02)
    yield "greedy", sample_call(gen, logits(7, 127), 0.0)
    yield "plain", sample_call(gen, logits(33, 1000), 1.0)
    yield "top-k", sample_call(gen, logits(20, 513), 1.3, [1, 2, 3, 50, -1] * 4)
    yield "top-p", sample_call(gen, logits(20, 2048), 1.0, 0, [0.0, 0.1, 0.5, 0.99, 1.0] * 4)
    yield "flat top-p", sample_call(gen, logits(4, 2048, 0.1), 1.0, 0, 0.8)
    yield "min-p", sample_call(gen, logits(20, 129), 1.0, 0, 1.0, [0.0, 0.01, 0.3, 1.0] * 5)
    yield "no rows", sample_call(gen, logits(0, 16))
    long = logits(7, 16_400)  # on Hopper the CTAs of a cluster share them
    long[4, 16_399] = NAN
    long[5] = -INF
    long[6] = -INF
    long[6, 9_000] = 1
    yield (
        "long rows",
        sample_call(
            gen, long, [0.0, 1.0, 0.7, 1.5, 1.0, 1.0, 1.0], [0, 50, 0, 5000, 0, 0, 0], [1, 1, 0.9] + [0.99] * 4
        ),
    )
    yield "one token", sample_call(gen, logits(3, 1), [0.0, 1.0, 1e-6])
    tied = torch.zeros(6, 64, dtype=dtype, device=gen.device)
    tied[:, 40:] = -1
    yield (
        "ties",
        sample_call(
            gen, tied, [0.0, 1.0, 1.0, 1.0, 0.5, 1.0], [0, 3, 0, 0, 50, 0], [1, 1, 0.1, 1, 1, 0.0], [0, 0, 0, 1, 0, 0]
        ),
    )
    odd = logits(8, 65)
    odd[0, 3] = NAN
    odd[1] = -INF
    odd[2, 5:] = -INF
    odd[3, 7] = INF
    odd[4, 9] = NAN
    odd[5] = -INF
    odd[5, 64] = 0
    odd[6, :] = INF
    odd[7, 20:30] = -INF
    yield "not finite", sample_call(gen, odd, [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 0, [1, 1, 0.9, 1, 1, 0.5, 1, 1])
    yield "not finite, greedy", sample_call(gen, odd, 0.0)
    yield "cold", sample_call(gen, logits(5, 100), [1e-3, 1e-10, 1e-30, 1e-38, 100.0])
    yield "vocabulary", sample_call(gen, logits(3, 49152), 0.8, [0, 40, 0], [0.95, 1.0, 1.0], [0.0, 0.0, 0.05])


def _kept(x: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, slack: float) -> tuple[Tensor, Tensor]:
    """fp64 weights of one row and which of them are kept, with limits that are looser by `slack`."""
    weights = torch.where(x == x.max(), 1.0, ((x - x.max()) / temperature).exp())
    if 0 < top_k < x.numel():
        weights = torch.where(x >= x.sort(descending=True).values[top_k - 1], weights, 0.0)
    values, which = weights.unique(return_inverse=True)  # ascending
    mass = torch.zeros_like(values).index_add_(0, which, weights)
    above = (mass.flip(0).cumsum(0).flip(0) - mass)[which]  # of all that are strictly larger
    in_top_p = (
        (above < top_p * weights.sum() + slack) | (weights == 1.0)
        if top_p < 1
        else torch.ones_like(above, dtype=torch.bool)
    )
    return weights, in_top_p & (weights >= min_p * (1 - slack)) & (weights > 0)


def verify_sample(call: Call, results: list[Tensor]) -> None:
    """Each token is what the exact (fp64) distribution gives, but for the rounding of the cumulative sums."""
    tokens = results[0].tolist()
    columns = {k: v.cpu().tolist() for k, v in call.items() if k != "logits"}
    for b, token in enumerate(tokens):
        x = call["logits"][b].cpu().double()
        row = {k: v[b] for k, v in columns.items()}
        if bool(x.isnan().any()) or not bool(x.isfinite().any()):
            assert token == -1, f"row {b}: got {token}, expected -1"
            continue
        if row["temperature"] == 0:
            best = int((x == x.max()).nonzero()[0])
            assert token == best, f"row {b}: got {token}, expected the first of the largest, {best}"
            continue
        limits = (row["temperature"], row["top_k"], row["top_p"], row["min_p"])
        u = philox_first_word(row["seed"], row["position"]) / 2**32
        answers = []
        for slack in (0.0, 1e-6, -1e-6):  # a limit within rounding of a token may fall on either side of it
            weights, kept = _kept(x, *limits, slack)
            cdf = torch.where(kept, weights, 0.0).cumsum(0)
            target = u * float(cdf[-1])
            low, high = float(cdf[token] - weights[token]), float(cdf[token])
            tolerance = 1e-5 * float(cdf[-1])
            if bool(kept[token]) and low - tolerance <= target <= high + tolerance:
                break
            answers.append(int((cdf > target).nonzero()[0]))
        else:
            raise AssertionError(f"row {b} {row}: got {token}, expected {answers[0]}")


def bad_sample(gen: Gen, base: Call) -> Bad:
    logits = base["logits"]
    yield "no vocabulary", {"logits": logits[:, :0]}, ValueError, ("logits has shape (5, 0)", "V ≥ 1")
    if logits.is_cuda:
        return
    for name, values in (
        ("temperature", (-1.0, NAN, INF, -INF)),
        ("top_p", (-0.1, 1.5, NAN, INF)),
        ("min_p", (-0.1, 1.5, NAN, -INF)),
    ):
        for value in values:
            wrong = base[name].clone()
            wrong[2] = value
            yield f"{name} {value}", {name: wrong}, ValueError, (f"{name}[2] is {wrong[2].item()}", "expected")


def speculative_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    def call(p: Tensor, q: Tensor, rows: list[int], tokens: Tensor | None = None, **limits: Any) -> Call:
        drafts = {
            "draft_logits": q,
            "draft_token_ids": gen.ints(0, p.shape[1], p.shape[0]) if tokens is None else tokens,
            "draft_rows": gen.tensor(rows),
        }
        return sample_call(gen, p, **limits) | drafts

    def logits(rows: int, vocab: int, scale: float = 2.0) -> Tensor:
        return gen.randn(rows, vocab, dtype=dtype, scale=scale)

    mixed = {"temperature": [0.0, 1.0, 0.7, 2.0, 1.0, 1.0], "top_k": [5, 0, 10, 1, 300, 0], "top_p": 0.9, "min_p": 0.02}
    yield "all kinds", call(logits(6, 300), logits(4, 300), [3, 1, 0, -1, 2, 2], **mixed)
    yield "greedy", call(logits(5, 127), logits(5, 127), [0, 1, 2, 3, 4], temperature=0.0)
    yield "no drafts", call(logits(5, 127), logits(0, 127), [-1] * 5, top_p=0.9)
    near = logits(24, 40)
    likely = near.float().argmax(1).int()
    yield "near", call(near, near + logits(24, 40, 0.3), list(range(24)), likely)
    yield "the same", call(near, near.clone(), list(range(24)), likely)
    yield "far", call(near, -near, list(range(24)), (-near).float().argmax(1).int())
    yield "limits", call(near, near + logits(24, 40, 0.3), list(range(24)), likely, top_k=[3, 10] * 12, top_p=0.8)
    yield "no rows", call(logits(0, 16), logits(3, 16), [])
    yield "one token", call(logits(3, 1), logits(2, 1), [1, -1, 0])
    odd, odd_drafts = logits(10, 65), logits(10, 65)
    odd[0, 3] = NAN
    odd[1] = -INF
    odd[2, 5:] = -INF
    odd[3, 7] = INF
    odd_drafts[4, 9] = NAN
    odd_drafts[5] = -INF
    odd_drafts[6, 5:] = -INF
    odd_drafts[7, 11] = INF
    odd[8, 11] = odd_drafts[8, 11] = INF
    tokens = gen.tensor([3, 4, 2, 7, 9, 5, 4, 11, 11, 60])
    yield "not finite", call(odd, odd_drafts, list(range(10)), tokens)
    unread = logits(6, 90)
    unread[1::2] = NAN
    yield "rows that none names", call(logits(3, 90), unread, [4, 0, 2])
    yield "vocabulary", call(logits(3, 49152), logits(3, 49152), [2, 1, 0], top_k=[0, 40, 0], top_p=[0.95, 1.0, 1.0])


def _distributions(call: Call, row: dict[str, Any], b: int, slack: float) -> tuple[Tensor, Tensor]:
    """p and q of one row in fp64, with limits that are looser by `slack`."""
    limits = (row["temperature"], row["top_k"], row["top_p"], row["min_p"], slack)
    out = []
    for x in (call["logits"][b], call["draft_logits"][row["draft_rows"]]):
        weights, kept = _kept(x.cpu().double(), *limits)
        weights = torch.where(kept, weights, 0.0)
        out.append(weights / weights.sum())
    return out[0], out[1]


def verify_speculative(call: Call, results: list[Tensor]) -> None:
    """Each token is what the rule says in fp64, but for the rounding of p, q and their sums."""
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "position")
    plain = {"logits": call["logits"]} | {name: call[name] for name in names}
    columns = {k: v.cpu().tolist() for k, v in call.items() if k not in ("logits", "draft_logits")}
    for b, token in enumerate(results[0].tolist()):
        row = {k: v[b] for k, v in columns.items()}
        x, q_logits = call["logits"][b].cpu(), None
        if row["draft_rows"] >= 0:
            q_logits = call["draft_logits"][row["draft_rows"]].cpu()
        decided = (
            q_logits is not None
            and row["temperature"] > 0
            and all(bool(t.isfinite().any()) and not bool(t.isnan().any()) for t in (x, q_logits))
        )
        if not decided:
            verify_sample({k: v[b : b + 1] for k, v in plain.items()}, [results[0][b : b + 1]])
            continue
        _, accept, again, _ = (word / 2**32 for word in philox_words(row["seed"], row["position"]))
        draft, rounding = row["draft_token_ids"], 1e-5
        for slack in (0.0, 1e-6, -1e-6):
            p, q = _distributions(call, row, b, slack)
            margin = float(p[draft] - accept * q[draft])
            if token == draft and margin > -rounding * float(p[draft] + q[draft]) and margin != 0:
                break
            left = (p - q).clamp(min=0)
            total = float(left.sum())
            if margin > rounding * float(p[draft] + q[draft]):
                continue
            if total < rounding:  # p is q: whatever p allows
                if float(p[token]) > 0:
                    break
                continue
            cdf = left.cumsum(0)
            low, high = float(cdf[token] - left[token]), float(cdf[token])
            if float(p[token] - q[token]) > -rounding and low - rounding <= again * total <= high + rounding:
                break
        else:
            raise AssertionError(
                f"row {b} {row}: got {token}, p {float(p[token])}, q {float(q[token])}, margin {margin}"
            )


def bad_speculative(gen: Gen, base: Call) -> Bad:
    empty = {"logits": base["logits"][:, :0], "draft_logits": base["draft_logits"][:, :0]}
    yield "no vocabulary", empty, ValueError, ("logits has shape (6, 0)", "V ≥ 1")
    if base["logits"].is_cuda:
        return
    yield from (case for case in bad_sample(gen, base) if case[0] != "no vocabulary")
    for name, index, value, says in (
        ("draft_rows", 1, -2, "-1 ≤ draft_rows ≤ 3"),
        ("draft_rows", 1, 4, "-1 ≤ draft_rows ≤ 3"),
        ("draft_token_ids", 0, -1, "0 ≤ draft_token_ids ≤ 299"),
        ("draft_token_ids", 4, 300, "0 ≤ draft_token_ids ≤ 299"),
    ):
        wrong = base[name].clone()
        wrong[index] = value
        yield f"{name} {value}", {name: wrong}, ValueError, (f"{name}[{index}] is {value}", says)


def logprob_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for name, rows, vocab, num_top in (
        ("some", 4, 100, 5),
        ("none", 3, 50, 0),
        ("all", 2, 17, 17),
        ("no rows", 0, 8, 3),
        ("vocabulary", 2, 49152, 20),
    ):
        call = {"logits": gen.randn(rows, vocab, dtype=dtype, scale=3.0), "token_ids": gen.ints(0, vocab, rows)}
        yield name, call | {"num_top": num_top}
    tied = gen.ints(0, 4, 6, 200).to(dtype)
    tied[1] = 0
    tied[2, 5:] = -INF
    yield "ties", {"logits": tied, "token_ids": gen.tensor([0, 199, 3, 50, 7, 8]), "num_top": 20}
