"""Gradients of attention, 16k tokens a call, beside cuDNN and FlashAttention-2 through torch.

Timed is the backward alone: the forward's output and LSE are there. Operations are counted as five products, as everyone
does, whatever a kernel computes again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.families.flash_fwd import HEADS, LENGTHS, TOKENS, first, lognormal
from bench.families.sequences import Sequences
from bench.harness import formulas
from bench.harness.case import Case, CaseSpec, Context, Family, PeerBuilder, op_case
from bench.harness.ceilings import Work
from bench.harness.peers import skip
from fastattn import ops

_QUICK = {(64, 1024, True), (128, 2048, True), (128, 8192, False)}


def sdpa_backward(backend: SDPBackend, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> PeerBuilder:
    """torch's gradients on one backend. All (B, S, H, D); the result is dq in that order."""

    def build() -> Callable[[], Tensor]:
        inputs = [t.transpose(1, 2).detach().requires_grad_() for t in (q, k, v)]
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*inputs, is_causal=causal, enable_gqa=q.shape[2] != k.shape[2])
        turned = dout.transpose(1, 2)

        def call() -> Tensor:
            return torch.autograd.grad(out, inputs, turned, retain_graph=True)[0].transpose(1, 2)

        return call

    return build


def aten_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: tuple[Tensor, Tensor] | None,
    longest: tuple[int, int],
    causal: bool,
) -> PeerBuilder:
    """torch's FlashAttention-2 without autograd, whose host work would outlast a short call and cannot be captured.
    All (B, S, H, D), or with `starts`, of queries and of keys, (T, H, D); the result is dq."""

    def build() -> Callable[[], Tensor]:
        offsets = starts or (None, None)
        forward = torch.ops.aten._flash_attention_forward(q, k, v, *offsets, *longest, 0.0, causal, False)
        out, lse, *rng = forward[:4]
        attend = torch.ops.aten._flash_attention_backward
        return lambda: first(attend(dout, q, k, v, out, lse, *offsets, *longest, 0.0, causal, *rng))

    return build


def cudnn_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> PeerBuilder:
    """torch's cuDNN without autograd. All (B, S, H, D); the result is dq in that order."""

    def build() -> Callable[[], Tensor]:
        turned_dout, *turned = (t.transpose(1, 2) for t in (dout, q, k, v))
        forward = torch.ops.aten._scaled_dot_product_cudnn_attention(*turned, None, True, 0.0, causal)
        out, lse, cu_q, cu_k, max_q, max_k, seed, offset, _ = forward
        attend = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
        saved = (out, lse, seed, offset, None, cu_q, cu_k, max_q, max_k)
        return lambda: first(attend(turned_dout, *turned, *saved, 0.0, causal)).transpose(1, 2)

    return build


def gradients(
    context: Context,
    dim: int,
    length: int,
    causal: bool,
    heads: int | None = None,
    kv_heads: int | None = None,
    tokens: int = TOKENS,
    **options: Any,
) -> Case:
    """tokens / length sequences of one length, as a batch. options: of the operator."""
    heads = heads or HEADS[dim]
    return of_sequences(context, dim, [length] * (tokens // length), causal, heads, kv_heads or heads, **options)


def of_sequences(
    context: Context,
    dim: int,
    lengths: Sequence[int],
    causal: bool,
    heads: int,
    kv_heads: int,
    key_lengths: Sequence[int] | None = None,
    **options: Any,
) -> Case:
    """Sequences of these lengths, as one batch where all are alike. options: of the operator."""
    sequences = Sequences(lengths, key_lengths or lengths)
    alike, packed = sequences.alike, sequences.packed(context.device)
    longest = max(sequences.lengths), max(sequences.key_lengths)
    rng = context.generator(dim + lengths[0])

    def randn(runs: Sequence[int], num_heads: int) -> Tensor:
        shape = (*sequences.shape(runs), num_heads, dim)
        return torch.randn(shape, generator=rng, device=context.device, dtype=torch.bfloat16)

    q, dout = (randn(sequences.lengths, heads) for _ in range(2))
    k, v = (randn(sequences.key_lengths, kv_heads) for _ in range(2))
    kernel = {name: options[name] for name in ("kernel",) if name in options}
    attend = ops.batch_attention if alike else ops.varlen_attention
    out, lse = attend(q, k, v, **packed, causal=causal, **kernel)
    call = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse, **packed, "causal": causal}
    if not alike:
        peers = {
            "cudnn": skip("torch has cuDNN's gradients of packed sequences turned off"),
            "fa2": aten_backward(dout, q, k, v, (packed["cu_seqlens_q"], packed["cu_seqlens_k"]), longest, causal),
        }
    elif longest[0] != longest[1]:
        peers = {
            "cudnn": cudnn_backward(dout, q, k, v, causal),
            "fa2": aten_backward(dout, q, k, v, None, longest, causal),
        }
    else:
        peers = {
            "cudnn": sdpa_backward(SDPBackend.CUDNN_ATTENTION, dout, q, k, v, causal),
            "fa2": sdpa_backward(SDPBackend.FLASH_ATTENTION, dout, q, k, v, causal),
        }
    return op_case(
        ops.batch_attention_backward if alike else ops.varlen_attention_backward,
        call | options,
        formulas.batch_attention_backward if alike else formulas.varlen_attention_backward,
        peers=peers,
        work=Work(num_bytes=4 * q.nbytes + 4 * k.nbytes, num_ops=10 * sequences.pairs(causal) * heads * dim),
        config=sequences.describe(heads, kv_heads, dim, "bf16", causal)
        + (", deterministic" if options.get("deterministic") else ""),
    )


def _cases() -> Iterator[CaseSpec]:
    def name(causal: bool) -> str:
        return f"{'causal' if causal else 'full'}_bf16"

    for dim, length, causal in product((64, 128), LENGTHS, (False, True)):
        yield CaseSpec(
            f"d{dim}_s{length}_{name(causal)}",
            partial(gradients, dim=dim, length=length, causal=causal),
            quick=(dim, length, causal) in _QUICK,
        )
    for dim, length, causal in product((80, 96, 192, 256), (1024, 4096, 16384), (False, True)):
        yield CaseSpec(f"d{dim}_s{length}_{name(causal)}", partial(gradients, dim=dim, length=length, causal=causal))
    for length, causal in product((1024, 4096, 16384), (False, True)):
        build = partial(gradients, dim=128, length=length, causal=causal, heads=32, kv_heads=8)
        yield CaseSpec(f"d128_gqa32to8_s{length}_{name(causal)}", build)
    for queries, keys in product((16, 64, 128, 512), (8192, 65536)):
        few = partial(of_sequences, dim=128, lengths=[queries], causal=False, heads=32, kv_heads=8, key_lengths=[keys])
        yield CaseSpec(f"d128_q{queries}_k{keys}_full_bf16", few)
    for median, count in ((200.0, 64), (1000.0, 16)):
        lengths = lognormal(count, 8192, median, seed=1)
        packed = partial(of_sequences, dim=128, lengths=lengths, causal=True, heads=32, kv_heads=8)
        yield CaseSpec(f"d128_varlen{median:.0f}_causal_bf16", packed)


FAMILY = Family(
    "flash_bwd",
    "cuda",
    "batch_attention_backward and varlen_attention_backward beside cuDNN and FlashAttention-2",
    tuple(_cases()),
)
