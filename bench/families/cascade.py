"""Decoding behind a prefix that all requests share, read once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.families.flash_fwd import first
from bench.harness import formulas
from bench.harness.case import Case, CaseSpec, Context, Family, op_case
from bench.harness.ceilings import Work
from bench.harness.peers import require
from fastattn import ops

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
# requests, keys that they share, keys of each one's own
SHARED = ((4, 8192, 512), (16, 2048, 512), (16, 8192, 512), (16, 32768, 512), (64, 2048, 512), (64, 8192, 512), (64, 8192, 4096), (256, 2048, 256))  # fmt: skip


def cascade(context: Context, batch: int, shared: int, own: int) -> Case:
    """One token of each request."""
    device, dtype = context.device, torch.bfloat16
    rng = context.generator(batch + shared)
    shared_pages, own_pages = shared // PAGE, own // PAGE
    num_pages = shared_pages + batch * own_pages
    k_cache, v_cache = (
        torch.randn(num_pages, PAGE, KV_HEADS, DIM, generator=rng, device=device, dtype=dtype) for _ in range(2)
    )
    order = torch.randperm(num_pages, generator=rng, device=device).int()
    prefix, rest = order[:shared_pages], order[shared_pages:].view(batch, own_pages)
    table = torch.cat([prefix.expand(batch, -1), rest], 1)
    q = torch.randn(batch, HEADS, DIM, generator=rng, device=device, dtype=dtype)
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=device)
    lengths = torch.full((batch,), shared + own, dtype=torch.int32, device=device)
    levels = ops.shared_prefix_levels(offsets, lengths, table, 1, num_shared_blocks=shared_pages, block_size=PAGE)
    whole: dict[str, Any] = {
        "k_cache": k_cache, "v_cache": v_cache, "cu_seqlens_q": offsets, "seqused_k": lengths, "block_table": table,
        "max_seqlen_q": 1, "causal": True,
    }  # fmt: skip

    def formula(c: torch.dtype, q: Tensor, **_: Any) -> list[Tensor]:
        return formulas.paged_attention(c, q=q, **whole)

    def paged() -> Callable[[], Tensor]:
        """Ours, each request's keys for itself."""
        return lambda: first(ops.paged_attention(q, **whole))

    def fa3(level: ops.CascadeLevel, max_seqlen_k: int, causal: bool) -> Callable[[], tuple[Tensor, Tensor]]:
        attend = require("vllm.vllm_flash_attn").flash_attn_varlen_func
        return lambda: attend(
            q, k_cache, v_cache, max_seqlen_q=level.max_seqlen_q, cu_seqlens_q=level.cu_seqlens_q,
            max_seqlen_k=max_seqlen_k, seqused_k=level.seqused_k, causal=causal, block_table=level.block_table,
            fa_version=3, return_softmax_lse=True,
        )[:2]  # fmt: skip

    def vllm_fa3() -> Callable[[], Tensor]:
        attend = fa3(ops.CascadeLevel(offsets, lengths, table, 1), shared + own, True)
        return lambda: attend()[0]

    def vllm_cascade() -> Callable[[], Tensor]:
        """As vLLM's cascade_attention: two calls of FlashAttention-3, and its merge."""
        merge = require("vllm.v1.attention.ops.merge_attn_states").merge_attn_states
        outer, inner = fa3(levels[0], shared, False), fa3(levels[1], own, True)
        out = torch.empty_like(q)

        def call() -> Tensor:
            prefix_out, prefix_lse = outer()
            suffix_out, suffix_lse = inner()
            merge(out, prefix_out, prefix_lse, suffix_out, suffix_lse)
            return out

        return call

    num_keys = shared + batch * own
    return op_case(
        ops.cascade_attention,
        {"q": q, "k_cache": k_cache, "v_cache": v_cache, "levels": levels},
        formula,
        peers={"vllm_cascade": vllm_cascade, "vllm_fa3": vllm_fa3, "paged": paged},
        work=Work(
            num_bytes=num_keys * KV_HEADS * 4 * DIM + 2 * q.nbytes, num_ops=4 * batch * (shared + own) * HEADS * DIM
        ),
        config=f"{batch} requests, {shared} keys of all and {own} of each, {HEADS}/{KV_HEADS} heads of {DIM}, pages of {PAGE}",
    )


FAMILY = Family(
    "cascade",
    "cuda",
    "cascade_attention behind a shared prefix, beside vLLM's, and beside attention of each request for itself",
    tuple(
        CaseSpec(f"b{batch}_shared{shared}_own{own}", partial(cascade, batch=batch, shared=shared, own=own), quick=batch == 16)
        for batch, shared, own in SHARED
    ),
)  # fmt: skip
