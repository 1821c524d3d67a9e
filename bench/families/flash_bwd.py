"""Gradients of attention, 16k tokens a call, beside cuDNN and FlashAttention-2 through torch.

Timed is the backward alone: the forward's output and LSE are there. Operations are counted as five products, as everyone
does, whatever a kernel computes again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.families.flash_fwd import HEADS, LENGTHS, TOKENS
from bench.harness import formulas
from bench.harness.case import Case, CaseSpec, Context, Family, PeerBuilder, op_case
from bench.harness.ceilings import Work
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
    kv_heads = kv_heads or heads
    batch = tokens // length
    rng = context.generator(dim + length)

    def randn(num_heads: int) -> Tensor:
        shape = (batch, length, num_heads, dim)
        return torch.randn(shape, generator=rng, device=context.device, dtype=torch.bfloat16)

    q, dout = randn(heads), randn(heads)
    k, v = randn(kv_heads), randn(kv_heads)
    out, lse = ops.batch_attention(q, k, v, causal=causal)
    pairs = batch * (length * (length + 1) // 2 if causal else length * length)
    call = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse, "causal": causal}
    return op_case(
        ops.batch_attention_backward,
        call | options,
        formulas.batch_attention_backward,
        peers={
            "cudnn": sdpa_backward(SDPBackend.CUDNN_ATTENTION, dout, q, k, v, causal),
            "fa2": sdpa_backward(SDPBackend.FLASH_ATTENTION, dout, q, k, v, causal),
        },
        work=Work(num_bytes=4 * q.nbytes + 4 * k.nbytes, num_ops=10 * pairs * heads * dim),
        config=f"{batch} × {length} tokens, {heads} heads{f' to {kv_heads}' if kv_heads != heads else ''} of {dim}, bf16, "
        f"{'causal' if causal else 'full'}{', deterministic' if options.get('deterministic') else ''}",
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
    for dim, length, causal in product((96, 192, 256), (1024, 4096, 16384), (False, True)):
        yield CaseSpec(f"d{dim}_s{length}_{name(causal)}", partial(gradients, dim=dim, length=length, causal=causal))
    for length, causal in product((1024, 4096, 16384), (False, True)):
        build = partial(gradients, dim=128, length=length, causal=causal, heads=32, kv_heads=8)
        yield CaseSpec(f"d128_gqa32to8_s{length}_{name(causal)}", build)


FAMILY = Family(
    "flash_bwd",
    "cuda",
    "batch_attention_backward beside cuDNN and FlashAttention-2",
    tuple(_cases()),
)
