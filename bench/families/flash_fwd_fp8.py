"""Attention forward on fp8 (e4m3) inputs, 16k tokens a call, beside FlashAttention-3."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from bench.families.flash_fwd import HEADS, TOKENS, first, lognormal
from bench.families.sequences import Sequences
from bench.harness import accuracy, formulas
from bench.harness.case import Case, CaseSpec, Checked, Context, Family, op_case
from bench.harness.ceilings import Work
from bench.harness.peers import require
from fastattn import ops

_QUICK = {(64, 1024, True), (128, 8192, False), (256, 1024, True)}


def _rounded(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Plain torch in fp32 on what the inputs hold, with P, at most 1, rounded to e4m3 before it is multiplied by V."""
    out = torch.empty(q.shape, device=q.device)
    group, num_keys = q.shape[2] // k.shape[2], k.shape[1]
    key = torch.arange(num_keys, device=q.device)
    for b, head in product(range(q.shape[0]), range(q.shape[2])):
        keys, values = (t[b, :, head // group].float() for t in (k, v))
        for start in range(0, q.shape[1], 4096):
            rows = q[b, start : start + 4096, head].float()
            scores = rows @ keys.t() * q.shape[3] ** -0.5
            if causal:
                last = torch.arange(start, start + len(rows), device=q.device) + num_keys - q.shape[1]
                scores.masked_fill_(key > last[:, None], -torch.inf)
            probs = (scores - scores.amax(-1, keepdim=True)).exp_()
            total = probs.sum(-1, keepdim=True)
            out[b, start : start + 4096, head] = probs.to(torch.float8_e4m3fn).float() @ values / total
    return out


def _judge(call: dict[str, Any], results: list[Tensor]) -> Checked:
    q, k, v, causal = (call[name] for name in ("q", "k", "v", "causal"))
    if "cu_seqlens_q" in call:
        starts = [pairwise(call[name].tolist()) for name in ("cu_seqlens_q", "cu_seqlens_k")]
        exact, exact_lse = formulas.varlen_attention(
            torch.float32, q, k, v, call["cu_seqlens_q"], call["cu_seqlens_k"], causal
        )
        runs = [(slice(*own), slice(*keys)) for own, keys in zip(*starts, strict=True)]
        parts = [_rounded(q[None, own], k[None, keys], v[None, keys], causal)[0] for own, keys in runs]
        rounded = torch.cat(parts)
    else:
        exact, exact_lse = formulas.batch_attention(torch.float32, q, k, v, causal)
        rounded = _rounded(q, k, v, causal)
    allowed = accuracy.allowed_error(torch.bfloat16, exact, rounded)
    out, lse = results
    share = accuracy.compare(out, exact, allowed, "attention, result 0")
    # Hopper adds up products of fp8 with 13 bits behind the leading one.
    allowed = 1e-3 * max(20.0, float(exact_lse.abs().max()))
    return Checked(max(share, accuracy.compare(lse, exact_lse, allowed, "attention, result 1")), exact)


def attention(
    context: Context,
    dim: int,
    lengths: Sequence[int],
    causal: bool,
    heads: int,
    kv_heads: int,
    key_lengths: Sequence[int] | None = None,
) -> Case:
    """Sequences of these lengths, as one batch where all are alike."""
    sequences = Sequences(lengths, key_lengths or lengths)
    alike, packed = sequences.alike, sequences.packed(context.device)
    rng = context.generator(dim + lengths[0])

    def randn(runs: Sequence[int], num_heads: int) -> Tensor:
        shape = (*sequences.shape(runs), num_heads, dim)
        return torch.randn(shape, generator=rng, device=context.device).to(torch.float8_e4m3fn)

    q = randn(sequences.lengths, heads)
    k, v = (randn(sequences.key_lengths, kv_heads) for _ in range(2))
    names = ("q_descale", "k_descale", "v_descale")
    scales = {name: torch.ones(len(lengths), kv_heads, device=context.device) for name in names}

    def fa3() -> Callable[[], Tensor]:
        library = require("fa3_fwd_interface")
        attend = library.flash_attn_func if alike else library.flash_attn_varlen_func
        return lambda: first(attend(q, k, v, **packed, causal=causal, **scales))

    return op_case(
        ops.batch_attention if alike else ops.varlen_attention,
        {"q": q, "k": k, "v": v, **packed, "causal": causal, **scales},
        formulas.batch_attention if alike else formulas.varlen_attention,
        peers={"fa3": fa3},
        work=Work(
            num_bytes=3 * q.nbytes + k.nbytes + v.nbytes,
            num_ops=4 * sequences.pairs(causal) * heads * dim,
            rate="fp8_tflop_s",
        ),
        config=sequences.describe(heads, kv_heads, dim, "e4m3", causal),
        judge=_judge,
    )


def _cases() -> Iterator[CaseSpec]:
    def of_batch(dim: int, length: int, causal: bool, heads: int, kv_heads: int) -> Callable[[Context], Case]:
        lengths = [length] * (TOKENS // length)
        return partial(attention, dim=dim, lengths=lengths, causal=causal, heads=heads, kv_heads=kv_heads)

    for dims, lengths in (((64, 128, 256), (1024, 4096, 8192, 16384)), ((80, 96, 192), (1024, 4096, 16384))):
        for dim, length, causal in product(dims, lengths, (False, True)):
            build = of_batch(dim, length, causal, HEADS[dim], HEADS[dim])
            name = f"d{dim}_s{length}_{'causal' if causal else 'full'}_fp8"
            yield CaseSpec(name, build, quick=(dim, length, causal) in _QUICK)
    yield CaseSpec("d128_gqa32to8_s8192_causal_fp8", of_batch(128, 8192, True, 32, 8))
    for queries, keys in product((1, 16, 64, 128, 512), (8192, 65536)):
        few = partial(attention, dim=128, lengths=[queries], causal=False, heads=32, kv_heads=8, key_lengths=[keys])
        yield CaseSpec(f"d128_q{queries}_k{keys}_full_fp8", few)
    for median, count in ((200.0, 64), (1000.0, 16)):
        drawn = lognormal(count, 8192, median, seed=1)
        packed = partial(attention, dim=128, lengths=drawn, causal=True, heads=32, kv_heads=8)
        yield CaseSpec(f"d128_varlen{median:.0f}_causal_fp8", packed)


FAMILY = Family(
    "flash_fwd_fp8",
    "cuda",
    "batch_attention and varlen_attention on e4m3 inputs beside FlashAttention-3",
    tuple(_cases()),
)
