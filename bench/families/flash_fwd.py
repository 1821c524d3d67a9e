"""Attention forward, 16k tokens a call, beside FlashAttention-3, cuDNN and FlashAttention-2."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.families.sequences import Sequences
from bench.harness import formulas
from bench.harness.case import Case, CaseSpec, Context, Family, PeerBuilder, op_case
from bench.harness.ceilings import Work
from bench.harness.peers import PeerAbsentError, require
from fastattn import ops

TOKENS = 16384
HEADS = {64: 32, 80: 24, 96: 20, 128: 16, 192: 10, 256: 8}  # by head dim: about the same amount of work
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
_QUICK = {(64, 1024, True), (128, 2048, True), (128, 8192, False), (256, 512, True)}


def first(result: Any) -> Tensor:
    """The output of a library that may give the log-sum-exp beside it."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


def sdpa_peer(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> PeerBuilder:
    """torch's attention on one backend. q, k, v: (B, S, H, D); the result is in that order too."""

    def build() -> Callable[[], Tensor]:
        turned_q, turned_k, turned_v = (t.transpose(1, 2) for t in (q, k, v))
        if causal and q.shape[1] != k.shape[1]:
            raise PeerAbsentError("torch's causal mask is aligned top-left")

        def call() -> Tensor:
            with sdpa_kernel(backend), torch.no_grad():
                return F.scaled_dot_product_attention(
                    turned_q, turned_k, turned_v, is_causal=causal, enable_gqa=q.shape[2] != k.shape[2]
                ).transpose(1, 2)

        return call

    return build


def attention(
    context: Context,
    dim: int,
    lengths: Sequence[int],
    causal: bool,
    heads: int,
    kv_heads: int,
    key_lengths: Sequence[int] | None = None,
    **options: Any,
) -> Case:
    """Sequences of these lengths; where all are alike, as one batch for the peers that want it so. options: of the operator."""
    sequences = Sequences(lengths, key_lengths or lengths)
    alike, packed = sequences.alike, sequences.packed(context.device)
    rng = context.generator(dim + len(lengths) + lengths[0])

    def randn(runs: Sequence[int], num_heads: int) -> Tensor:
        shape = (*sequences.shape(runs), num_heads, dim)
        return torch.randn(shape, generator=rng, device=context.device, dtype=torch.bfloat16)

    q = randn(sequences.lengths, heads)
    k, v = (randn(sequences.key_lengths, kv_heads) for _ in range(2))
    peers: dict[str, PeerBuilder] = {}
    if alike:

        def batched(module: str) -> PeerBuilder:
            def build() -> Callable[[], Tensor]:
                attend = require(module).flash_attn_func
                return lambda: first(attend(q, k, v, causal=causal))

            return build

        peers = {
            "fa3": batched("fa3_fwd_interface"),
            "cudnn": sdpa_peer(SDPBackend.CUDNN_ATTENTION, q, k, v, causal),
            "fa2": sdpa_peer(SDPBackend.FLASH_ATTENTION, q, k, v, causal),
            "flash_attn": batched("flash_attn"),
        }
    else:

        def varlen(module: str) -> PeerBuilder:
            def build() -> Callable[[], Tensor]:
                attend = require(module).flash_attn_varlen_func
                return lambda: first(attend(q, k, v, *packed.values(), causal=causal))

            return build

        def fa2() -> Callable[[], Tensor]:
            attend = torch.ops.aten._flash_attention_forward
            return lambda: first(attend(q, k, v, *packed.values(), 0.0, causal, False))

        peers = {"fa3": varlen("fa3_fwd_interface"), "fa2": fa2, "flash_attn": varlen("flash_attn")}

    return op_case(
        ops.batch_attention if alike else ops.varlen_attention,
        {"q": q, "k": k, "v": v, **packed, "causal": causal, **options},
        formulas.batch_attention if alike else formulas.varlen_attention,
        peers=peers,
        work=Work(num_bytes=2 * q.nbytes + 2 * k.nbytes, num_ops=4 * sequences.pairs(causal) * heads * dim),
        config=sequences.describe(heads, kv_heads, dim, "bf16", causal),
    )


def flash(
    context: Context,
    dim: int,
    length: int,
    causal: bool,
    heads: int | None = None,
    kv_heads: int | None = None,
    tokens: int = TOKENS,
) -> Case:
    heads = heads or HEADS[dim]
    return attention(context, dim, [length] * (tokens // length), causal, heads, kv_heads or heads)


def lognormal(count: int, longest: int, median: float, seed: int) -> list[int]:
    """Lengths as users' prompts have them: few are long."""
    rng = random.Random(seed)
    return [max(1, min(longest, round(rng.lognormvariate(math.log(median), 1.0)))) for _ in range(count)]


def _name(causal: bool) -> str:
    return f"{'causal' if causal else 'full'}_bf16"


def _cases() -> Iterator[CaseSpec]:
    for dim, length, causal in product((64, 128, 256), LENGTHS, (False, True)):
        yield CaseSpec(
            f"d{dim}_s{length}_{_name(causal)}",
            partial(flash, dim=dim, length=length, causal=causal),
            quick=(dim, length, causal) in _QUICK,
        )
    for dim, length, causal in product((80, 96, 192), (1024, 4096, 16384), (False, True)):
        yield CaseSpec(f"d{dim}_s{length}_{_name(causal)}", partial(flash, dim=dim, length=length, causal=causal))
    for length, causal in product((1024, 4096, 16384), (False, True)):
        build = partial(flash, dim=128, length=length, causal=causal, heads=32, kv_heads=8)
        yield CaseSpec(f"d128_gqa32to8_s{length}_{_name(causal)}", build)
    for median, count in ((200.0, 64), (1000.0, 16)):
        lengths = lognormal(count, 8192, median, seed=1)
        build = partial(attention, dim=128, lengths=lengths, causal=True, heads=32, kv_heads=8)
        yield CaseSpec(f"d128_varlen{median:.0f}_causal_bf16", build)
    for queries, keys in product((1, 16, 64, 128, 512), (8192, 65536)):
        build = partial(attention, dim=128, lengths=[queries], causal=False, heads=32, kv_heads=8, key_lengths=[keys])
        yield CaseSpec(f"d128_q{queries}_k{keys}_full_bf16", build)


FAMILY = Family(
    "flash_fwd",
    "cuda",
    "batch_attention and varlen_attention beside FlashAttention-3, cuDNN and FlashAttention-2",
    tuple(_cases()),
)
