"""Valid and bad calls of `lm_head_sample`, and what its tokens and scores must satisfy."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn.reference.philox import philox4x32
from tests.harness.generators import Gen
from tests.harness.opspec import Bad, Call

NAN, INF = math.nan, math.inf


def lm_head_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    """Products of small integers, which are exact in any order of summation; many logits are equal."""

    def numbers(*shape: int) -> Tensor:
        return (gen.ints(1, 4, *shape) * (2 * gen.ints(0, 2, *shape) - 1)).to(dtype)

    def call(rows: int, k: int, vocab: int, temperature: list[float], first_id: int = 0, bias: bool = True) -> Call:
        return {
            "x": numbers(rows, k),
            "weight": numbers(vocab, k),
            "temperature": gen.tensor((temperature * rows)[:rows], torch.float32),
            "seed": gen.ints(-(2**62), 2**62, rows, dtype=torch.int64),
            "position": gen.ints(0, 2**40, rows, dtype=torch.int64),
            "bias": numbers(vocab) if bias else None,
            "first_id": first_id,
        }

    mixed = [0.0, 1.0, 0.7, 4.0, 20.0]
    yield "all kinds", call(5, 64, 304, mixed)
    yield "greedy", call(16, 520, 128, [0.0], 2**31 - 132, bias=False)
    yield "drawn", call(33, 72, 520, [5.0], 1000)
    yield "unaligned", call(5, 37, 4301, mixed, 8)
    yield "65 to 128 rows", call(70, 136, 264, mixed, bias=False)
    yield "many rows", call(260, 72, 136, mixed, 264)
    yield "cold and hot", call(5, 64, 72, [1e-3, 1e-30, 1e-45, 100.0, 3e38])
    yield "no columns", call(3, 0, 12, mixed)
    yield "one token", call(3, 8, 1, mixed)
    yield "no rows", call(0, 16, 8, mixed)
    odd = call(7, 64, 80, [0.0, 1.0])
    odd["x"][0, 3] = NAN
    odd["x"][1, 3] = INF  # all logits infinite
    odd["x"][4, 0] = odd["x"][5, 0] = -INF
    yield "no answer", odd
    odd = call(4, 64, 80, [0.0, 1.0])
    odd["weight"][17, 5] = odd["weight"][70, 5] = INF  # infinite logits of either sign, and others
    yield "infinite logits", odd


def _scores(call: Call) -> tuple[Tensor, Tensor]:
    """Rounded logits and logits + temperature · noise in fp64."""
    x, weight, bias, temperature = (call[name] for name in ("x", "weight", "bias", "temperature"))
    logits = x.double() @ weight.double().t()
    logits = (logits if bias is None else logits + bias.double()).to(x.dtype).double()
    ids = call["first_id"] + torch.arange(weight.shape[0])
    words = []
    for name in ("position", "seed"):
        words += [call[name][:, None] & 0xFFFFFFFF, call[name][:, None] >> 32 & 0xFFFFFFFF]
    drawn = torch.stack(philox4x32((words[0], words[1], ids // 4, torch.ones_like(ids)), (words[2], words[3])))
    word = drawn.gather(0, (ids % 4).expand_as(drawn[0])[None])[0]
    u = (word.float() * 2.0**-32 + 2.0**-33).double().clamp(max=1 - 2.0**-24)
    noise = -(-(-u).log1p()).log()
    hot = temperature.double().clamp(max=1e36)[:, None]
    return logits, torch.where(hot > 0, logits + hot * noise, logits)


def verify_lm_head(call: Call, results: list[Tensor]) -> None:
    """At temperature 0 the first id of the largest logit, exactly; else the largest score but for fp32's rounding."""
    logits, exact = _scores(call)
    for b, (token, score) in enumerate(zip(results[0].tolist(), results[1].tolist(), strict=True)):
        row = f"row {b} at temperature {float(call['temperature'][b])}"
        if bool(logits[b].isnan().any()) or not bool(logits[b].isfinite().any()):
            assert token == -1, f"{row}: got {token}, expected -1"
            continue
        best, temperature = float(exact[b].max()), min(float(call["temperature"][b]), 1e36)
        tolerance = 0.0 if temperature == 0 else 1e-5 * max(abs(best), temperature) if math.isfinite(best) else 0.0
        first = call["first_id"] + int((exact[b] == best).nonzero()[0])
        at = token - call["first_id"]
        assert 0 <= at < logits.shape[1], f"{row}: got {token}, expected {first}"
        of_token = float(exact[b, at])
        if tolerance == 0.0:
            assert token == first, f"{row}: got {token}, whose score is {of_token}, expected {first} with {best}"
        assert of_token >= best - tolerance, f"{row}: got {token} with {of_token}, expected {first} with {best}"
        assert score == of_token or abs(score - of_token) <= tolerance, f"{row}: score {score}, expected {of_token}"


def bad_lm_head(gen: Gen, base: Call) -> Bad:
    vocab = base["weight"].shape[0]
    none = {"weight": base["weight"][:0], "bias": None}
    yield "no vocabulary", none, ValueError, ("weight has shape (0, 64)", "V ≥ 1")
    for first_id in (2, 2**31 - vocab):
        yield f"first_id {first_id}", {"first_id": first_id}, ValueError, (f"first_id is {first_id}", "multiple of 4")
    if not base["x"].is_cuda:
        for value in (-1.0, NAN, INF):
            wrong = base["temperature"].clone()
            wrong[2] = value
            yield f"temperature {value}", {"temperature": wrong}, ValueError, (f"temperature[2] is {value}", "≥ 0")
