"""Attention forward, 16k tokens a call, beside FlashAttention-3, cuDNN and FlashAttention-2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.harness import formulas
from bench.harness.case import Case, CaseSpec, Context, Family, PeerBuilder, op_case
from bench.harness.ceilings import Work
from bench.harness.peers import require
from fastattn import ops

TOKENS = 16384
HEADS = {64: 32, 128: 16, 256: 8}  # by head dim: the same amount of work
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

        def call() -> Tensor:
            with sdpa_kernel(backend), torch.no_grad():
                return F.scaled_dot_product_attention(turned_q, turned_k, turned_v, is_causal=causal).transpose(1, 2)

        return call

    return build


def flash(
    context: Context, dim: int, length: int, causal: bool, heads: int | None = None, tokens: int = TOKENS
) -> Case:
    heads = heads or HEADS[dim]
    batch = tokens // length
    rng = context.generator(dim + length)
    q, k, v = (
        torch.randn(batch, length, heads, dim, generator=rng, device=context.device, dtype=torch.bfloat16)
        for _ in range(3)
    )
    offsets = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=context.device)

    def fa3() -> Callable[[], Tensor]:
        attend = require("fa3_fwd_interface").flash_attn_func
        return lambda: first(attend(q, k, v, causal=causal))

    def flash_attn() -> Callable[[], Tensor]:
        attend = require("flash_attn").flash_attn_func
        return lambda: first(attend(q, k, v, causal=causal))

    pairs = batch * (length * (length + 1) // 2 if causal else length * length)
    return op_case(
        ops.varlen_attention,
        {
            "q": q.flatten(0, 1),
            "k": k.flatten(0, 1),
            "v": v.flatten(0, 1),
            "cu_seqlens_q": offsets,
            "cu_seqlens_k": offsets,
            "max_seqlen_q": length,
            "max_seqlen_k": length,
            "causal": causal,
        },
        formulas.varlen_attention,
        peers={
            "fa3": fa3,
            "cudnn": sdpa_peer(SDPBackend.CUDNN_ATTENTION, q, k, v, causal),
            "fa2": sdpa_peer(SDPBackend.FLASH_ATTENTION, q, k, v, causal),
            "flash_attn": flash_attn,
        },
        work=Work(num_bytes=4 * q.nbytes, num_ops=4 * pairs * heads * dim),
        config=f"{batch} × {length} tokens, {heads} heads of {dim}, bf16, {'causal' if causal else 'full'}",
    )


FAMILY = Family(
    "flash_fwd",
    "cuda",
    "varlen_attention beside FlashAttention-3, cuDNN and FlashAttention-2",
    tuple(
        CaseSpec(
            f"d{dim}_s{length}_{'causal' if causal else 'full'}_bf16",
            partial(flash, dim=dim, length=length, causal=causal),
            quick=(dim, length, causal) in _QUICK,
        )
        for dim in HEADS
        for length in LENGTHS
        for causal in (False, True)
    ),
)
