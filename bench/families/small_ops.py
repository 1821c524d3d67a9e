"""Operators that move memory: norms, RoPE + KV write, block copies, SwiGLU, embedding, sampling; sizes of an 8B-class decoder.

Beside torch, torch.compile, vLLM's kernels and FlashInfer's. They are bound by the copy rate where the tensors are large, and by
a launch where they are small: `floor_us` and `bound` of a case say which.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness import formulas
from bench.harness.accuracy import WrongResultError
from bench.harness.case import Case, CaseSpec, Checked, Context, Family, PeerBuilder, op_case
from bench.harness.ceilings import Work
from bench.harness.peers import PeerAbsentError, compiled, flashinfer, require, skip, vllm_ops
from fastattn import ops
from fastattn.reference.philox import philox_first_word

HIDDEN, FFN, VOCAB = 4096, 14336, 128256
HEADS, KV_HEADS, DIM = 32, 8, 128
EPS = 1e-5
BF16 = torch.bfloat16


# Seconds a run may spend on compiling torch.compile's side: a lent GPU waits meanwhile.
COMPILE_SECONDS = 40.0


def _compiled(context: Context, function: Callable[..., Any], *arguments: Tensor) -> PeerBuilder:
    if context.quick:
        return skip("torch.compile takes seconds a shape and is left out of --quick")

    def build() -> Callable[[], Any]:
        spent = context.shared.get("compile seconds", 0.0)
        if spent > COMPILE_SECONDS:
            raise PeerAbsentError(f"torch.compile has had its {COMPILE_SECONDS:g} s of this run")
        start = time.perf_counter()
        call = compiled(function)
        call(*(t.clone() for t in arguments))  # compiles; on copies, because some functions change their arguments
        context.shared["compile seconds"] = spent + time.perf_counter() - start
        return lambda: call(*arguments)

    return build


def rms_norm(context: Context, tokens: int, width: int = HIDDEN) -> Case:
    rng = context.generator(tokens)
    x, weight = (torch.randn(s, generator=rng, device=context.device, dtype=BF16) for s in ((tokens, width), (width,)))

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (width,), weight, EPS)

    def vllm() -> Callable[[], Tensor]:
        norm, out = vllm_ops().rms_norm, torch.empty_like(x)

        def call() -> Tensor:
            norm(out, x, weight, EPS)
            return out

        return call

    def infer() -> Callable[[], Tensor]:
        norm = flashinfer("flashinfer.norm").rmsnorm
        return lambda: norm(x, weight, EPS)

    return op_case(
        ops.rms_norm,
        {"x": x, "weight": weight, "eps": EPS},
        formulas.rms_norm,
        peers={
            "torch": lambda: lambda: plain(x, weight),
            "compile": _compiled(context, plain, x, weight),
            "vllm": vllm,
            "flashinfer": infer,
        },
        work=Work(num_bytes=2 * x.nbytes + weight.nbytes),
        config=f"{tokens} × {width} bf16",
    )


def add_rms_norm(context: Context, tokens: int, width: int = HIDDEN) -> Case:
    rng = context.generator(tokens)
    x, residual = (torch.randn(tokens, width, generator=rng, device=context.device, dtype=BF16) for _ in range(2))
    weight = torch.randn(width, generator=rng, device=context.device, dtype=BF16)

    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        residual.add_(x)
        return F.rms_norm(residual, (width,), weight, EPS)

    def of_copies(make: Callable[[], Callable[[Tensor, Tensor], Tensor]]) -> PeerBuilder:
        """Each peer changes tensors in place, so it gets its own."""

        def build() -> Callable[[], Tensor]:
            function, mine, other = make(), x.clone(), residual.clone()
            return lambda: function(mine, other)

        return build

    def vllm() -> Callable[[Tensor, Tensor], Tensor]:
        norm = vllm_ops().fused_add_rms_norm

        def call(x: Tensor, residual: Tensor) -> Tensor:
            norm(x, residual, weight, EPS)
            return x

        return call

    def infer() -> Callable[[Tensor, Tensor], Tensor]:
        norm = flashinfer("flashinfer.norm").fused_add_rmsnorm

        def call(x: Tensor, residual: Tensor) -> Tensor:
            norm(x, residual, weight, EPS)
            return x

        return call

    return op_case(
        ops.add_rms_norm,
        {"x": x, "residual": residual, "weight": weight, "eps": EPS},
        formulas.add_rms_norm,
        mutates=("residual",),
        peers={
            "torch": of_copies(lambda: lambda x, residual: plain(x, residual, weight)),
            "compile": _compiled(context, plain, x.clone(), residual.clone(), weight),
            "vllm": of_copies(vllm),
            "flashinfer": of_copies(infer),
        },
        work=Work(num_bytes=4 * x.nbytes + weight.nbytes),
        config=f"{tokens} × {width} bf16, residual in place",
    )


def layer_norm(context: Context, tokens: int, width: int = HIDDEN) -> Case:
    rng = context.generator(tokens)
    x = torch.randn(tokens, width, generator=rng, device=context.device, dtype=BF16)
    weight, bias = (torch.randn(width, generator=rng, device=context.device, dtype=BF16) for _ in range(2))

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), weight, bias, EPS)

    return op_case(
        ops.layer_norm,
        {"x": x, "weight": weight, "bias": bias, "eps": EPS},
        formulas.layer_norm,
        peers={
            "torch": lambda: lambda: plain(x, weight, bias),
            "compile": _compiled(context, plain, x, weight, bias),
        },
        work=Work(num_bytes=2 * x.nbytes + weight.nbytes + bias.nbytes),
        config=f"{tokens} × {width} bf16",
    )


def swiglu(context: Context, tokens: int, width: int = FFN) -> Case:
    x = torch.randn(tokens, 2 * width, generator=context.generator(tokens), device=context.device, dtype=BF16)

    def plain(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    def vllm() -> Callable[[], Tensor]:
        vllm_ops()
        out = x.new_empty(tokens, width)

        def call() -> Tensor:
            torch.ops._C.silu_and_mul(out, x)
            return out

        return call

    def infer() -> Callable[[], Tensor]:
        activate = flashinfer("flashinfer.activation").silu_and_mul
        return lambda: activate(x)

    return op_case(
        ops.swiglu,
        {"x": x},
        formulas.swiglu,
        peers={
            "torch": lambda: lambda: plain(x),
            "compile": _compiled(context, plain, x),
            "vllm": vllm,
            "flashinfer": infer,
        },
        work=Work(num_bytes=x.nbytes * 3 // 2),
        config=f"{tokens} × 2·{width} bf16",
    )


def rope_kv_write(context: Context, tokens: int, heads: int = HEADS, kv_heads: int = KV_HEADS, page: int = 16) -> Case:
    device, rng = context.device, context.generator(tokens)
    q, k, v = (
        torch.randn(tokens, h, DIM, generator=rng, device=device, dtype=BF16) for h in (heads, kv_heads, kv_heads)
    )
    angle = torch.rand(8192, DIM // 2, generator=rng, device=device) * 6
    cos_sin = torch.cat([angle.cos(), angle.sin()], 1)
    positions = torch.randint(0, 8192, (tokens,), generator=rng, device=device, dtype=torch.int32)
    num_blocks = -(-tokens // page) + 3
    slots = torch.randperm(num_blocks * page, generator=rng, device=device)[:tokens].int()
    caches = [torch.zeros(num_blocks, page, kv_heads, DIM, device=device, dtype=BF16) for _ in range(2)]

    def plain(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, -1)

        def turned(x: Tensor) -> Tensor:
            a, b = x.float().chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

        k_cache.view(-1, kv_heads, DIM)[slots] = turned(k)
        v_cache.view(-1, kv_heads, DIM)[slots] = v
        return q.copy_(turned(q))

    def torch_peer() -> Callable[[], Tensor]:
        mine = (q.clone(), k, v, *(c.clone() for c in caches))
        return lambda: plain(*mine)

    def vllm() -> Callable[[], Tensor]:
        library = vllm_ops()
        mine_q, mine_k = q.clone(), k.clone()
        k_cache, v_cache = (c.clone() for c in caches)
        table, at, to = cos_sin.to(BF16), positions.long(), slots.long()
        scale = torch.ones(1, device=device)

        def call() -> Tensor:
            library.rotary_embedding(at, mine_q, mine_k, DIM, table, True)
            library.reshape_and_cache_flash(mine_k, v, k_cache, v_cache, to, "auto", scale, scale)
            return mine_q

        return call

    return op_case(
        ops.rope_kv_write,
        {
            "q": q,
            "k": k,
            "v": v,
            "cos_sin": cos_sin,
            "positions": positions,
            "slot_mapping": slots,
            "k_cache": caches[0],
            "v_cache": caches[1],
        },
        formulas.rope_kv_write,
        mutates=("q", "k_cache", "v_cache"),
        peers={
            "torch": torch_peer,
            "compile": _compiled(context, plain, q.clone(), k, v, *(c.clone() for c in caches)),
            "vllm": vllm,
        },
        work=Work(num_bytes=2 * (q.nbytes + k.nbytes + v.nbytes) + tokens * (4 * DIM + 8)),
        config=f"{tokens} tokens, {heads}/{kv_heads} heads of {DIM}, bf16, pages of {page}",
    )


def copy_blocks(
    context: Context, pairs: int, layers: int = 32, kv_heads: int = KV_HEADS, page: int = 16, dim: int = DIM
) -> Case:
    """Blocks of all layers of a model, in one call."""
    device, rng = context.device, context.generator(pairs)
    shape = (layers, 2 * pairs, page, kv_heads, dim)
    k_cache, v_cache = (torch.randn(shape, generator=rng, device=device, dtype=BF16) for _ in range(2))
    mapping = torch.randperm(2 * pairs, generator=rng, device=device).int().view(pairs, 2)
    source, target = mapping.long().unbind(1)

    def ours(k_cache: Tensor, v_cache: Tensor, block_mapping: Tensor) -> None:
        ops.copy_blocks([*k_cache, *v_cache], block_mapping)

    def torch_peer() -> Callable[[], Tensor]:
        mine = [k_cache.clone(), v_cache.clone()]

        def call() -> Tensor:
            for cache in mine:
                cache.index_copy_(1, target, cache.index_select(1, source))
            return mine[0]

        return call

    return op_case(
        ours,
        {"k_cache": k_cache, "v_cache": v_cache, "block_mapping": mapping},
        formulas.copy_blocks,
        mutates=("k_cache", "v_cache"),
        peers={"torch": torch_peer},
        work=Work(num_bytes=k_cache.nbytes + v_cache.nbytes),
        config=f"{pairs} blocks of {page} tokens, {layers} layers, {kv_heads} heads of {dim}, bf16",
    )


def embedding(context: Context, tokens: int, vocab: int = VOCAB, width: int = HIDDEN) -> Case:
    rng = context.generator(tokens)
    weight = torch.randn(vocab, width, generator=rng, device=context.device, dtype=BF16)
    ids = torch.randint(0, vocab, (tokens,), generator=rng, device=context.device, dtype=torch.int32)
    return op_case(
        ops.embedding,
        {"token_ids": ids, "weight": weight},
        formulas.embedding,
        peers={
            "torch": lambda: lambda: F.embedding(ids, weight),
            "compile": _compiled(context, F.embedding, ids, weight),
        },
        work=Work(num_bytes=tokens * (4 + 4 * width)),
        config=f"{tokens} rows of {vocab} × {width} bf16",
    )


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
            "compile": _compiled(context, plain, logits),
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
        peers={"torch": torch_peer, "compile": _compiled(context, plain, call["logits"].clone())},
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
        peers={"torch": torch_peer, "compile": _compiled(context, plain, call["logits"].clone())},
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
    build = _compiled(context, function, *arguments)

    def first() -> Callable[[], Tensor]:
        call = build()
        return lambda: call()[0]

    return first


def _specs() -> Iterator[CaseSpec]:
    for tokens in (1, 128, 1024, 8192):
        yield CaseSpec(f"rms_norm_t{tokens}", partial(rms_norm, tokens=tokens), tokens == 8192)
        yield CaseSpec(f"add_rms_norm_t{tokens}", partial(add_rms_norm, tokens=tokens), tokens in (1, 8192))
    for tokens in (128, 8192):
        yield CaseSpec(f"layer_norm_t{tokens}", partial(layer_norm, tokens=tokens), tokens == 8192)
    for tokens in (1, 128, 8192):
        yield CaseSpec(f"swiglu_t{tokens}", partial(swiglu, tokens=tokens), tokens == 8192)
        yield CaseSpec(f"rope_kv_write_t{tokens}", partial(rope_kv_write, tokens=tokens), tokens == 8192)
    for pairs in (1, 64):
        yield CaseSpec(f"copy_blocks_n{pairs}", partial(copy_blocks, pairs=pairs), pairs == 64)
    for tokens in (128, 8192):
        yield CaseSpec(f"embedding_t{tokens}", partial(embedding, tokens=tokens), tokens == 8192)
    for kind in _SAMPLING:
        for rows in (1, 64, 256) if kind == "topk_topp" else (64,):
            yield CaseSpec(f"sample_{kind}_b{rows}", partial(sample, kind=kind, rows=rows), rows == 64)
    yield CaseSpec("adjust_logits_b64", partial(adjust_logits, rows=64, touched=512), True)
    yield CaseSpec("apply_token_bitmask_b64", partial(apply_token_bitmask, rows=64), True)
    yield CaseSpec("token_logprobs_b64_top5", partial(token_logprobs, rows=64, num_top=5), True)


FAMILY = Family(
    "small_ops", "cuda", "norms, RoPE + KV write, block copies, SwiGLU, embedding, sampling", tuple(_specs())
)
