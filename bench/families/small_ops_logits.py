"""Cases of `small_ops`: sampling, and what changes and reads logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import formulas
from bench.harness.accuracy import WrongResultError
from bench.harness.case import Case, CaseSpec, Checked, Context, PeerBuilder, op_case
from bench.harness.ceilings import Work
from bench.harness.compiled import compiled_peer
from bench.harness.peers import flashinfer, require, vllm_ops
from fastattn import ops
from fastattn.reference.philox import philox_first_word

VOCAB = 128256


# name → temperature, top-k, top-p, min-p
_SAMPLING = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "plain": (1.0, 0, 1.0, 0.0),
    "topk_topp": (0.8, 50, 0.9, 0.0),
    "minp": (0.8, 0, 1.0, 0.05),
}


def sample(context: Context, kind: str, rows: int, vocab: int = VOCAB) -> Case:
    device, rng = context.device, context.generator(rows)
    temperature, top_k, top_p, min_p = _SAMPLING[kind]
    logits = torch.randn(rows, vocab, generator=rng, device=device) * 3
    k, p = torch.full((rows,), top_k, dtype=torch.int32, device=device), torch.full((rows,), top_p, device=device)
    call = {
        "logits": logits,
        "temperature": torch.full((rows,), temperature, device=device),
        "top_k": k,
        "top_p": p,
        "min_p": torch.full((rows,), min_p, device=device),
        "seed": torch.randint(-(2**62), 2**62, (rows,), generator=rng, device=device),
        "position": torch.randint(0, 2**40, (rows,), generator=rng, device=device),
    }

    def plain(logits: Tensor) -> Tensor:
        """Sort, cut, and take the first arrival of exponential clocks: no host work in between, as engines do it."""
        if temperature == 0:
            return logits.argmax(-1)
        scaled = logits / temperature
        if top_k or top_p < 1:
            ranked, order = scaled.sort(-1, descending=True)
            if top_k:
                ranked[:, top_k:] = -torch.inf
            chances = ranked.softmax(-1)
            chances = chances.masked_fill(chances.cumsum(-1) - chances >= top_p, 0.0)
        else:
            order, chances = None, scaled.softmax(-1)
            chances = chances.masked_fill(chances < min_p * chances.amax(-1, keepdim=True), 0.0)
        drawn = (chances / torch.empty_like(chances).exponential_()).argmax(-1, keepdim=True)
        return (drawn if order is None else order.gather(-1, drawn)).squeeze(-1)

    def vllm() -> Callable[[], Tensor]:
        vllm_ops()
        sampler = require("vllm.v1.sample.ops.topk_topp_sampler")

        def call() -> Tensor:
            if temperature == 0:
                return logits.argmax(-1)
            cut = sampler.apply_top_k_top_p(logits / temperature, k if top_k else None, p if top_p < 1 else None)
            drawn: Tensor = sampler.random_sample(cut.softmax(-1, dtype=torch.float32), {})
            return drawn

        return call

    def infer() -> Callable[[], Tensor]:
        draw = flashinfer("flashinfer.sampling").top_k_top_p_sampling_from_logits
        return lambda: draw(logits / max(temperature, 1e-6), k if top_k else vocab, p)

    return op_case(
        ops.sample,
        call,
        _no_formula,
        judge=partial(judge_sample, kind),
        peers={
            "torch": lambda: lambda: plain(logits),
            "compile": compiled_peer(context, plain, logits),
            **({} if kind == "minp" else {"vllm": vllm, "flashinfer": infer}),
        },
        work=Work(num_bytes=logits.nbytes),
        config=f"{rows} × {vocab} fp32, temperature {temperature}, top-k {top_k}, top-p {top_p}, min-p {min_p}",
    )


def _no_formula(c: torch.dtype, **_: Any) -> list[Tensor]:
    raise AssertionError("sample is judged by its distribution")


def judge_sample(kind: str, call: dict[str, Any], results: list[Tensor]) -> Checked:
    """Holds each token to the exact (fp64) distribution, but for the rounding of sums: the draw lies in its own interval."""
    tokens = results[0]
    temperature, top_k, top_p, min_p = _SAMPLING[kind]
    if temperature == 0:
        best = call["logits"].argmax(-1).int()
        if not torch.equal(tokens, best):
            raise WrongResultError(
                f"sample: tokens {tokens.tolist()[:8]} …, expected the largest {best.tolist()[:8]} …"
            )
        return Checked(0.0, best)
    x = call["logits"].double()
    weights = ((x - x.amax(-1, keepdim=True)) / temperature).exp()
    if top_k:
        weights = weights.masked_fill(x < x.topk(top_k).values[:, -1:], 0.0)
    words = [philox_first_word(s, p) for s, p in zip(call["seed"].tolist(), call["position"].tolist(), strict=True)]
    u = torch.tensor(words, dtype=torch.float64, device=x.device) / 2**32
    ranked, order = weights.sort(-1, descending=True)
    before = torch.empty_like(weights).scatter_(1, order, ranked.cumsum(-1) - ranked)
    worst, right = 0.0, torch.zeros_like(tokens, dtype=torch.bool)
    for slack in (0.0, 1e-6, -1e-6):  # a limit within rounding of a token may fall on either side of it
        kept = weights > 0
        if top_p < 1:
            kept &= before < (top_p + slack) * weights.sum(-1, keepdim=True)
        kept &= weights >= min_p * (1 - slack)
        cdf = weights.masked_fill(~kept, 0.0).cumsum(-1)
        chosen = tokens.long().clamp(0, x.shape[1] - 1).unsqueeze(1)
        total, high = cdf[:, -1], cdf.gather(1, chosen).squeeze(1)
        low = high - weights.gather(1, chosen).squeeze(1)
        outside = torch.maximum(low - u * total, u * total - high).clamp(min=0) / total
        fits = kept.gather(1, chosen).squeeze(1) & (outside <= 1e-5) & (tokens >= 0)
        worst = max(worst, float(outside[fits & ~right].max()) if bool((fits & ~right).any()) else 0.0)
        right |= fits
    if not bool(right.all()):
        row = int((~right).nonzero()[0])
        raise WrongResultError(
            f"sample: {int((~right).sum())} of {len(right)} rows are wrong, first {row}: got {int(tokens[row])}"
        )
    return Checked(worst / 1e-5)


def adjust_logits(context: Context, rows: int, touched: int, vocab: int = VOCAB) -> Case:
    device, rng = context.device, context.generator(rows)
    ids = torch.rand(rows, vocab, generator=rng, device=device).argsort(-1)[:, :touched].flatten().int()
    call = {
        "logits": torch.randn(rows, vocab, generator=rng, device=device) * 3,
        "token_ids": ids,
        "counts": torch.randint(-1, 4, ids.shape, generator=rng, device=device, dtype=torch.int32),
        "bias": torch.randn(ids.shape, generator=rng, device=device),
        "indptr": torch.arange(0, rows * touched + 1, touched, dtype=torch.int32, device=device),
        **{
            f"{name}_penalty": torch.rand(rows, generator=rng, device=device) + 0.5
            for name in ("repetition", "presence", "frequency")
        },
    }
    row = torch.arange(rows, device=device).repeat_interleave(touched)

    def plain(logits: Tensor) -> Tensor:
        rep, presence, frequency = (call[f"{name}_penalty"][row] for name in ("repetition", "presence", "frequency"))
        old, counts = logits[row, ids], call["counts"]
        penalized = torch.where(old > 0, old / rep, old * rep) - presence * (counts > 0) - frequency * counts
        logits[row, ids] = torch.where(counts >= 0, penalized, old) + call["bias"]
        return logits

    def torch_peer() -> Callable[[], Tensor]:
        mine = call["logits"].clone()
        return lambda: plain(mine)

    return op_case(
        ops.adjust_logits,
        call,
        formulas.adjust_logits,
        mutates=("logits",),
        peers={"torch": torch_peer, "compile": compiled_peer(context, plain, call["logits"].clone())},
        # scattered logits are read and written by sectors of 32 bytes
        work=Work(num_bytes=ids.numel() * (12 + 64)),
        config=f"{rows} × {vocab} fp32, {touched} tokens touched in each row",
    )


def apply_token_bitmask(context: Context, rows: int, vocab: int = VOCAB) -> Case:
    """Half the tokens are allowed, more than most grammars allow."""
    device, rng = context.device, context.generator(rows)
    words = torch.randint(-(2**31), 2**31 - 1, (rows, -(-vocab // 32)), generator=rng, device=device).int()
    call = {
        "logits": torch.randn(rows, vocab, generator=rng, device=device) * 3,
        "bitmask": words,
        "rows": torch.arange(rows, dtype=torch.int32, device=device),
    }
    bit = torch.arange(32, dtype=torch.int32, device=device)

    def plain(logits: Tensor) -> Tensor:
        allowed = ((words.unsqueeze(2) >> bit) & 1).flatten(1)[:, :vocab]
        return logits.masked_fill_(allowed == 0, -torch.inf)

    def torch_peer() -> Callable[[], Tensor]:
        mine = call["logits"].clone()
        return lambda: plain(mine)

    return op_case(
        ops.apply_token_bitmask,
        call,
        formulas.apply_token_bitmask,
        mutates=("logits",),
        peers={"torch": torch_peer, "compile": compiled_peer(context, plain, call["logits"].clone())},
        # with random bits every sector of 32 bytes has one to write
        work=Work(num_bytes=words.nbytes + call["logits"].nbytes),
        config=f"{rows} × {vocab} fp32, every second token allowed",
    )


def token_logprobs(context: Context, rows: int, num_top: int, vocab: int = VOCAB) -> Case:
    rng = context.generator(rows)
    logits = torch.randn(rows, vocab, generator=rng, device=context.device) * 3
    ids = torch.randint(0, vocab, (rows,), generator=rng, device=context.device, dtype=torch.int32)

    def plain(logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(1, ids.long().unsqueeze(1))
        values, best = logprobs.topk(num_top, -1)
        return chosen.squeeze(1), (logprobs > chosen).sum(-1) + 1, values, best

    return op_case(
        ops.token_logprobs,
        {"logits": logits, "token_ids": ids, "num_top": num_top},
        formulas.token_logprobs,
        peers={"torch": lambda: lambda: plain(logits, ids)[0], "compile": _compiled_first(context, plain, logits, ids)},
        work=Work(num_bytes=logits.nbytes),
        config=f"{rows} × {vocab} fp32, {num_top} best",
    )


def _compiled_first(context: Context, function: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> PeerBuilder:
    build = compiled_peer(context, function, *arguments)

    def first() -> Callable[[], Tensor]:
        call = build()
        return lambda: call()[0]

    return first


def logits_specs() -> Iterator[CaseSpec]:
    for kind in _SAMPLING:
        for rows in (1, 64, 256) if kind == "topk_topp" else (64,):
            yield CaseSpec(f"sample_{kind}_b{rows}", partial(sample, kind=kind, rows=rows), rows == 64)
    yield CaseSpec("adjust_logits_b64", partial(adjust_logits, rows=64, touched=512), True)
    yield CaseSpec("apply_token_bitmask_b64", partial(apply_token_bitmask, rows=64), True)
    yield CaseSpec("token_logprobs_b64_top5", partial(token_logprobs, rows=64, num_top=5), True)
