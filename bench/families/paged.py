"""Attention over a paged KV cache: a few tokens a sequence, and prefills over a prefix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.families.flash_fwd import first, lognormal
from bench.harness import formulas
from bench.harness.case import Case, CaseSpec, Context, Family, op_case
from bench.harness.ceilings import Work
from bench.harness.peers import PeerAbsentError, flashinfer, require
from fastattn import ops

HEADS, KV_HEADS, DIM = 32, 8, 128
# batch, context
DECODES = ((1, 1024), (1, 8192), (1, 65536), (2, 4096), (4, 4096), (8, 4096), (32, 4096), (64, 2048), (128, 1024), (128, 4096), (256, 1024))  # fmt: skip
# heads, KV heads, head dim; batch, new tokens of each sequence, context with them
OTHER_DECODES = (
    (9, 3, 64, 1, 1, 1024),  # SmolLM2
    (9, 3, 64, 64, 1, 2048),
    (64, 8, 128, 8, 1, 4096),
    (16, 16, 128, 16, 1, 4096),
    (8, 1, 256, 8, 1, 8192),
    (32, 8, 128, 8, 4, 4096),  # drafts
    (32, 8, 128, 8, 8, 4096),
    (32, 8, 128, 8, 16, 4096),
    (64, 8, 128, 8, 8, 4096),
)
# batch, nodes of each sequence's tree, context with them
TREES = ((8, 8, 4096), (8, 64, 4096))
# batch, new tokens of each sequence, context with them
PREFILLS = ((1, 8192, 8192), (4, 2048, 2048), (1, 8192, 32768), (8, 512, 4096))
# heads, KV heads, head dim; batch, new tokens of each sequence, context with them
OTHER_PREFILLS = (
    (9, 3, 64, 8, 1024, 1024),  # SmolLM2
    (64, 8, 128, 4, 1024, 2048),
    (16, 16, 128, 4, 2048, 2048),
    (8, 1, 256, 4, 2048, 4096),
)
PAGES = (8, 32, 64, 128)  # besides 16
# batch, how many sequences have a chunk of a prompt and of how many tokens (the others have one), context with them
MIXED = ((64, 1, 512, 4096), (64, 1, 2048, 4096), (64, 8, 512, 4096), (64, 1, 8192, 8192), (257, 1, 512, 1024))
PREFILLS_8BIT = ((1, 8192, 32768), (4, 2048, 2048), (8, 512, 4096))
MIXED_8BIT = ((64, 1, 512, 4096), (64, 1, 2048, 4096), (64, 8, 512, 4096))
# batch, context; once as ever and once batch-invariant
INVARIANT_DECODES = ((1, 1024), (8, 4096), (64, 4096), (256, 1024))
_QUICK_DECODES = {(1, 1024), (8, 4096), (128, 1024)}


def paged(
    context: Context,
    page: int,
    batch: int,
    new: int,
    length: int,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    dim: int = DIM,
    ragged: bool = False,
    kv: torch.dtype = torch.bfloat16,
    chunk: int | None = None,
    num_chunks: int = 1,
    tree: bool = False,
    batch_invariant: bool = False,
) -> Case:
    """`new` tokens (the first `num_chunks`: `chunk`; or as many nodes of a binary tree) each of `batch` sequences that are `length`
    tokens long with them, or lognormal up to that; pages in random order, in fp8 with a scale for each KV head, in int8 with
    one for each token's."""
    device, dtype = context.device, torch.bfloat16
    rng = context.generator(batch + length)
    pages_each = -(-length // page)
    shape = (batch * pages_each, page, kv_heads, dim)
    caches = [torch.randn(shape, generator=rng, device=device, dtype=dtype) for _ in range(2)]
    scales: dict[str, Tensor] = {}
    if kv is torch.float8_e4m3fn:
        scales = {name: torch.rand(kv_heads, generator=rng, device=device) + 0.5 for name in ("k_scale", "v_scale")}
        caches = [cache.to(kv) for cache in caches]
    elif kv is torch.int8:
        order = (shape[0], kv_heads, page)  # a page's tokens are neighbours
        largest = [cache.abs().amax(-1, keepdim=True) for cache in caches]
        caches = [(cache.float() / (most / 127)).round().to(kv) for cache, most in zip(caches, largest, strict=True)]
        for name, most in zip(("k_scale", "v_scale"), largest, strict=True):
            own = torch.empty(order, device=device).transpose(1, 2)
            scales[name] = own.copy_(most.squeeze(-1).float() / 127)
    k_cache, v_cache = caches
    table = torch.randperm(shape[0], generator=rng, device=device).int().view(batch, pages_each)
    all_new = [chunk or new] * num_chunks + [new] * (batch - num_chunks)
    q = torch.randn(sum(all_new), heads, dim, generator=rng, device=device, dtype=dtype)
    offsets = torch.tensor([0, *all_new], device=device).cumsum(0).int()
    all_lengths = lognormal(batch, length, 665, seed=1) if ragged else [length] * batch
    lengths = torch.tensor(all_lengths, dtype=torch.int32, device=device)

    words: list[int] = []
    for i in range(new if tree else 0):
        words.append(1 << i | (words[(i - 1) // 2] if i > 0 else 0))
    trees: dict[str, Tensor] = {}
    if tree:
        own = torch.tensor([word - (word >> 63 << 64) for word in words], device=device)
        trees = {"tree_mask": own.repeat(batch)}

    def no_trees() -> None:
        if tree:
            raise PeerAbsentError("it has no masks of trees")

    fp8_q = q.to(torch.float8_e4m3fn)  # FlashAttention-3 wants q like k

    def vllm_fa3() -> Callable[[], Tensor]:
        no_trees()
        attend = require("vllm.vllm_flash_attn").flash_attn_varlen_func
        if kv is torch.int8:
            raise PeerAbsentError("FlashAttention-3 has no int8")
        out = torch.empty_like(q)
        descales = {f"{name}_descale": scales[f"{name}_scale"].expand(batch, kv_heads) for name in "kv" if scales}
        return lambda: first(
            attend(
                q if kv is dtype else fp8_q,
                k_cache,
                v_cache,
                max_seqlen_q=max(all_new),
                cu_seqlens_q=offsets,
                max_seqlen_k=max(all_lengths),
                seqused_k=lengths,
                causal=True,
                block_table=table,
                fa_version=3,
                out=out,
                **descales,
            )
        )

    def only_16_bits() -> None:
        if kv is not dtype:
            raise PeerAbsentError("not set up for pages of 8 bits")
        if chunk:
            raise PeerAbsentError("not set up for mixed batches")

    def fa3() -> Callable[[], Tensor]:
        only_16_bits()
        no_trees()
        library = require("fa3_fwd_interface")
        flags = require("fa3_fwd_config").CONFIG.get("build_flags", {})
        if flags.get("FLASHATTENTION_DISABLE_PAGEDKV"):
            raise PeerAbsentError("this FlashAttention-3 wheel was built without paged KV")
        grouped = q.view(batch, new, heads, dim)
        return lambda: first(
            library.flash_attn_with_kvcache(
                grouped, k_cache, v_cache, cache_seqlens=lengths, page_table=table, causal=True
            )
        )

    def flash_attn() -> Callable[[], Tensor]:
        only_16_bits()
        no_trees()
        attend = require("flash_attn").flash_attn_with_kvcache  # raises for pages that are no multiple of 256
        grouped = q.view(batch, new, heads, dim)
        return lambda: first(attend(grouped, k_cache, v_cache, cache_seqlens=lengths, block_table=table, causal=True))

    def flashinfer_paged() -> Callable[[], Tensor]:
        only_16_bits()
        if ragged:
            raise PeerAbsentError("FlashInfer's plan wants the pages of each sequence one after the other")
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
        indptr = torch.arange(0, batch * pages_each + 1, pages_each, dtype=torch.int32, device=device)
        last = torch.full((batch,), (length - 1) % page + 1, dtype=torch.int32, device=device)
        if new == 1:
            wrapper = flashinfer("flashinfer.decode").BatchDecodeWithPagedKVCacheWrapper(
                workspace, "NHD", use_tensor_cores=True
            )
            wrapper.plan(
                indptr, table.flatten(), last, heads, kv_heads, dim, page, q_data_type=dtype, kv_data_type=dtype
            )
        else:
            wrapper = flashinfer("flashinfer.prefill").BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            masks = {}
            if tree:  # of all requests one after the other
                seen = own.unsqueeze(1) >> torch.arange(new, device=device) & 1
                mask = torch.cat([seen.new_ones(new, length - new), seen], 1).bool()
                masks = {"custom_mask": mask.flatten().repeat(batch)}
            wrapper.plan(
                offsets,
                indptr,
                table.flatten(),
                last,
                heads,
                kv_heads,
                dim,
                page,
                causal=not tree,
                q_data_type=dtype,
                kv_data_type=dtype,
                **masks,
            )
        return lambda: first(wrapper.run(q, (k_cache, v_cache)))

    def torch_gather() -> Callable[[], Tensor]:
        """What torch alone can do: collect the pages, then attend."""
        only_16_bits()
        no_trees()
        if ragged:
            raise PeerAbsentError("torch has no attention to keys of different lengths in one call")
        if 1 < new < length:  # torch aligns its causal mask top-left
            raise PeerAbsentError("torch has no causal attention over a prefix without a mask tensor")
        order = table.flatten().long()
        rows = q.view(batch, new, heads, dim).transpose(1, 2)

        def call() -> Tensor:
            k, v = (c[order].view(batch, -1, kv_heads, dim)[:, :length].transpose(1, 2) for c in (k_cache, v_cache))
            return F.scaled_dot_product_attention(rows, k, v, is_causal=new > 1, enable_gqa=True).transpose(1, 2)

        return call

    num_keys = sum(all_lengths)
    key_bytes = 2 * dim * kv.itemsize + (8 if kv is torch.int8 else 0)  # of a KV head, with its value
    pairs = sum(m * (n - m) + m * (m + 1) // 2 for m, n in zip(all_new, all_lengths, strict=True))
    if tree:
        pairs = batch * (new * (length - new) + sum(word.bit_count() for word in words))
    what = f"{min(all_lengths)} to {max(all_lengths)}" if ragged else f"{length}"
    return op_case(
        ops.paged_attention,
        {
            "q": q,
            "k_cache": k_cache,
            "v_cache": v_cache,
            "cu_seqlens_q": offsets,
            "seqused_k": lengths,
            "block_table": table,
            "max_seqlen_q": max(all_new),
            "causal": True,
            "batch_invariant": batch_invariant,
            **scales,
            **trees,
        },
        formulas.paged_attention,
        peers={
            "vllm_fa3": vllm_fa3,
            "fa3": fa3,
            "flashinfer": flashinfer_paged,
            "flash_attn": flash_attn,
            "torch": torch_gather,
        },
        work=Work(num_bytes=num_keys * kv_heads * key_bytes + 2 * q.nbytes, num_ops=4 * pairs * heads * dim),
        config=(f"{num_chunks} × {chunk} and {batch - num_chunks}" if chunk else f"{batch}")
        + f" × {new}{' (trees)' if tree else ''} of {what} tokens, {heads}/{kv_heads} heads of {dim}, pages of {page}, "
        f"{str(kv).removeprefix('torch.')}{', batch-invariant' if batch_invariant else ''}",
    )


DECODE = Family(
    "paged_decode",
    "cuda",
    "paged_attention with a few tokens a sequence, beside vLLM's FlashAttention-3",
    tuple(
        CaseSpec(
            f"bf16_p{page}_b{batch}_s{length}",
            partial(paged, page=page, batch=batch, new=1, length=length),
            quick=page == 16 and (batch, length) in _QUICK_DECODES,
        )
        for page in (16, 64)
        for batch, length in DECODES
    )
    + tuple(
        CaseSpec(
            f"bf16_p16_b{batch}_s{length}_h{heads}x{kv_heads}x{dim}" + (f"_t{new}" if new > 1 else ""),
            partial(paged, page=16, batch=batch, new=new, length=length, heads=heads, kv_heads=kv_heads, dim=dim),
        )
        for heads, kv_heads, dim, batch, new, length in OTHER_DECODES
    )
    + tuple(
        CaseSpec(
            f"{name}_p16_b{batch}_s{length}",
            partial(paged, page=16, batch=batch, new=1, length=length, kv=kv),
            quick=(batch, length) in _QUICK_DECODES,
        )
        for name, kv in (("fp8", torch.float8_e4m3fn), ("int8", torch.int8))
        for batch, length in DECODES
    )
    + tuple(
        CaseSpec(
            f"bf16_p16_b{batch}_s{length}_tree{new}",
            partial(paged, page=16, batch=batch, new=new, length=length, tree=True),
        )
        for batch, new, length in TREES
    )
    + tuple(
        CaseSpec(f"bf16_p{page}_b32_s4096", partial(paged, page=page, batch=32, new=1, length=4096))
        for page in PAGES
        if page != 64  # is above
    )
    + (CaseSpec("bf16_p16_ragged64_s8192", partial(paged, page=16, batch=64, new=1, length=8192, ragged=True)),),
)
PREFILL = Family(
    "paged_prefill",
    "cuda",
    "paged_attention with prompts and chunks of prompts, beside vLLM's FlashAttention-3",
    tuple(
        CaseSpec(
            f"bf16_p16_b{batch}_t{new}_s{length}",
            partial(paged, page=16, batch=batch, new=new, length=length),
            quick=length <= 4096,
        )
        for batch, new, length in PREFILLS
    )
    + tuple(
        CaseSpec(
            f"{name}_p16_mixed{batch}_t{chunk}{f'x{num_chunks}' if num_chunks > 1 else ''}_s{length}",
            partial(paged, page=16, batch=batch, new=1, length=length, chunk=chunk, num_chunks=num_chunks, kv=kv),
        )
        for name, kv, cases in (
            ("bf16", torch.bfloat16, MIXED),
            ("fp8", torch.float8_e4m3fn, MIXED_8BIT),
            ("int8", torch.int8, MIXED_8BIT),
        )
        for batch, num_chunks, chunk, length in cases
    )
    + tuple(
        CaseSpec(
            f"{name}_p16_b{batch}_t{new}_s{length}", partial(paged, page=16, batch=batch, new=new, length=length, kv=kv)
        )
        for name, kv in (("fp8", torch.float8_e4m3fn), ("int8", torch.int8))
        for batch, new, length in PREFILLS_8BIT
    )
    + tuple(
        CaseSpec(
            f"bf16_p16_b{batch}_t{new}_s{length}_h{heads}x{kv_heads}x{dim}",
            partial(paged, page=16, batch=batch, new=new, length=length, heads=heads, kv_heads=kv_heads, dim=dim),
        )
        for heads, kv_heads, dim, batch, new, length in OTHER_PREFILLS
    )
    + tuple(
        CaseSpec(f"bf16_p{page}_b8_t512_s4096", partial(paged, page=page, batch=8, new=512, length=4096))
        for page in PAGES
    ),
)
INVARIANT = Family(
    "paged_invariant",
    "cuda",
    "paged_attention as ever, and batch-invariant",
    tuple(
        CaseSpec(f"{name}_{mode}", partial(case, batch_invariant=mode == "invariant"), quick=name == "bf16_b8_s4096")
        for name, case in (
            *(
                (f"{kind}_b{batch}_s{length}", partial(paged, page=16, batch=batch, new=1, length=length, kv=kv))
                for kind, kv in (("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn))
                for batch, length in INVARIANT_DECODES
            ),
            ("bf16_ragged64_s8192", partial(paged, page=16, batch=64, new=1, length=8192, ragged=True)),
            ("bf16_mixed64_t2048_s4096", partial(paged, page=16, batch=64, new=1, length=4096, chunk=2048)),
            ("bf16_b1_t512_s4096", partial(paged, page=16, batch=1, new=512, length=4096)),
        )
        for mode in ("usual", "invariant")
    ),
)
