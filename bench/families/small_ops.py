"""Operators that move memory: norms, RoPE + KV write, block copies, SwiGLU, embedding, sampling; sizes of an 8B-class decoder.

Beside torch, torch.compile, vLLM's kernels and FlashInfer's. They are bound by the copy rate where the tensors are large, and by
a launch where they are small: `floor_us` and `bound` of a case say which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.families.small_ops_logits import VOCAB, logits_specs
from bench.harness import formulas
from bench.harness.case import Case, CaseSpec, Context, Family, PeerBuilder, op_case
from bench.harness.ceilings import Work
from bench.harness.compiled import compiled_peer
from bench.harness.peers import flashinfer, vllm_ops
from fastattn import ops

HIDDEN, FFN = 4096, 14336
HEADS, KV_HEADS, DIM = 32, 8, 128
EPS = 1e-5
BF16 = torch.bfloat16


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
            "compile": compiled_peer(context, plain, x, weight),
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
            "compile": compiled_peer(context, plain, x.clone(), residual.clone(), weight),
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
            "compile": compiled_peer(context, plain, x, weight, bias),
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
            "compile": compiled_peer(context, plain, x),
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
            "compile": compiled_peer(context, plain, q.clone(), k, v, *(c.clone() for c in caches)),
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
            "compile": compiled_peer(context, F.embedding, ids, weight),
        },
        work=Work(num_bytes=tokens * (4 + 4 * width)),
        config=f"{tokens} rows of {vocab} × {width} bf16",
    )


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
    yield from logits_specs()


FAMILY = Family(
    "small_ops", "cuda", "norms, RoPE + KV write, block copies, SwiGLU, embedding, sampling", tuple(_specs())
)
