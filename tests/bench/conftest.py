"""Peers that are not installed here, with their signatures, in torch."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn.reference.quantize import unpack_e2m1
from tests.harness import formulas as loops


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool | Tensor) -> Tensor:
    """One sequence, fp32, bottom-right or with a mask (Sq, Sk): q (Sq, H, D), k and v (Sk, Hk, D)."""
    rows, keys = q.shape[0], k.shape[0]
    if isinstance(causal, Tensor):
        mask: Tensor | None = causal
    else:
        mask = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows) if causal else None
    q, k, v = (t.transpose(0, 1).float() for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(0, 1)


def attend_paged(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, table: Tensor, causal: bool | Tensor
) -> Tensor:
    """q: (B, Sq, H, D)."""
    out = []
    for b, n in enumerate(lengths.tolist()):
        k, v = (c[table[b].long()].flatten(0, 1)[:n] for c in (k_cache, v_cache))
        out.append(attend(q[b], k, v, causal))
    return torch.stack(out)


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(members)
    return made


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers with the signatures of vLLM 0.26, FlashAttention-3 0.0.3, flash-attn 2.8 and FlashInfer 0.6, in torch."""

    def rms_norm(out: Tensor, input: Tensor, weight: Tensor | None, epsilon: float) -> None:
        assert weight is not None
        out.copy_(F.rms_norm(input, weight.shape, weight, epsilon))

    def fused_add_rms_norm(input: Tensor, residual: Tensor, weight: Tensor | None, epsilon: float) -> None:
        assert weight is not None
        residual.add_(input)
        input.copy_(F.rms_norm(residual, weight.shape, weight, epsilon))

    def rotary_embedding(
        positions: Tensor, query: Tensor, key: Tensor | None, head_size: int, cos_sin_cache: Tensor, is_neox: bool
    ) -> None:
        assert is_neox
        assert positions.dtype is torch.int64
        assert cos_sin_cache.dtype is query.dtype
        cos, sin = cos_sin_cache[positions].unsqueeze(1).float().chunk(2, -1)
        for x in (query, key):
            assert x is not None
            assert x.shape[-1] == head_size
            a, b = x.float().chunk(2, -1)
            x.copy_(torch.cat([a * cos - b * sin, b * cos + a * sin], -1))

    def cutlass_scaled_mm(
        a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, bias: Tensor | None = None
    ) -> Tensor:
        assert b.stride(0) == 1
        if scale_b.shape[0] > 1:  # of blocks, all of them whole
            assert len(a) % 4 == 0 and scale_a.stride(0) == 1
            columns = scale_a.repeat_interleave(128, 1), scale_b.repeat_interleave(128, 0).repeat_interleave(128, 1)
            assert columns[0].shape == a.shape and columns[1].shape == b.shape
            return ((a.double() * columns[0]) @ (b.double() * columns[1])).to(out_dtype)
        assert scale_a.shape == (len(a), 1) and scale_b.shape == (1, b.shape[1])
        return (a.double() @ b.double() * scale_a * scale_b).to(out_dtype)

    def reshape_and_cache_flash(
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
        kv_cache_dtype: str,
        k_scale: Tensor,
        v_scale: Tensor,
    ) -> None:
        assert (kv_cache_dtype, slot_mapping.dtype) == ("auto", torch.int64)
        key_cache.view(-1, *key.shape[1:])[slot_mapping] = key
        value_cache.view(-1, *key.shape[1:])[slot_mapping] = value

    def vllm_varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        max_seqlen_q: int,
        cu_seqlens_q: Tensor,
        max_seqlen_k: int,
        cu_seqlens_k: Tensor | None = None,
        seqused_k: Tensor | None = None,
        *,
        causal: bool = False,
        block_table: Tensor | None = None,
        out: Tensor | None = None,
        fa_version: int = 2,
    ) -> Tensor:
        assert seqused_k is not None
        assert block_table is not None
        assert out is not None
        assert fa_version == 3
        assert int(seqused_k.max()) == max_seqlen_k
        out.copy_(
            attend_paged(q.view(-1, max_seqlen_q, *q.shape[1:]), k, v, seqused_k, block_table, causal).flatten(0, 1)
        )
        return out

    def fa3_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, page_table: Tensor, causal: bool = False
    ) -> Tensor:
        return attend_paged(q, k_cache, v_cache, cache_seqlens, page_table, causal)

    def fa2_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, block_table: Tensor, causal: bool = False
    ) -> Tensor:
        return attend_paged(q, k_cache, v_cache, cache_seqlens, block_table, causal)

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        return torch.stack([attend(*x, causal) for x in zip(q, k, v, strict=True)])

    class Wrapper:
        def __init__(self, workspace: Tensor, kv_layout: str, use_tensor_cores: bool = False) -> None:
            assert (workspace.dtype, kv_layout) == (torch.uint8, "NHD")

        def run(self, q: Tensor, caches: tuple[Tensor, Tensor]) -> Tensor:
            batch = len(self.indptr) - 1
            table = self.indices.view(batch, -1)
            lengths = (self.indptr.diff() - 1) * caches[0].shape[1] + self.last
            mask = self.causal if self.mask is None else self.mask.view(batch, len(q) // batch, -1)[0]
            return attend_paged(q.view(batch, -1, *q.shape[1:]), *caches, lengths, table, mask).flatten(0, 1)

    class Decode(Wrapper):
        def plan(
            self, indptr: Tensor, indices: Tensor, last: Tensor, *sizes: int, q_data_type: Any, kv_data_type: Any
        ) -> None:
            self.indptr, self.indices, self.last, self.causal, self.mask = indptr, indices, last, False, None

    class Prefill(Wrapper):
        def plan(
            self, qo: Tensor, indptr: Tensor, indices: Tensor, last: Tensor, *sizes: int, causal: bool, **rest: Any
        ) -> None:
            self.indptr, self.indices, self.last, self.causal = indptr, indices, last, causal
            self.mask = rest.get("custom_mask")

    def apply_top_k_top_p(logits: Tensor, k: Tensor | None, p: Tensor | None) -> Tensor:
        assert k is None or k.shape == logits.shape[:1]
        assert p is None or p.shape == logits.shape[:1]
        return logits

    def infer_sample(logits: Tensor, top_k: Tensor | int, top_p: Tensor | float) -> Tensor:
        return logits.argmax(-1).int()

    def repack(words: Tensor, perm: Tensor, size_k: int, size_n: int, num_bits: int) -> Tensor:
        assert (words.dtype, words.shape, perm.numel(), num_bits) == (torch.int32, (size_k // 8, size_n), 0, 4)
        return words

    def marlin_fp4(
        x: Tensor, words: Tensor, scale: Tensor, whole: Tensor | None, workspace: Tensor, size_n: int, size_k: int
    ) -> Tensor:
        codes = words.t().contiguous().view(torch.uint8)
        weight = unpack_e2m1(codes) * scale.float().t().repeat_interleave(size_k // len(scale), 1)
        return F.linear(x.float(), weight * (1.0 if whole is None else whole)).to(x.dtype)

    def marlin_int4(x: Tensor, words: Tensor, scale: Tensor, *none: Tensor | str | int, is_k_full: bool) -> Tensor:
        assert is_k_full
        assert none[-3:] == ("uint4b8", scale.shape[1], x.shape[1])
        return loops.int4_linear(torch.float32, x, words.t(), scale.t(), x.shape[1] // len(scale))[0].to(x.dtype)

    def machete_prepack(b_q_weight: Tensor, a_type: torch.dtype, b_type: str, group_scales_type: torch.dtype) -> Tensor:
        assert b_q_weight.stride(0) == 1 and (a_type, b_type, group_scales_type) == (torch.bfloat16, "uint4b8", a_type)
        return b_q_weight

    def machete_mm(a: Tensor, b_q: Tensor, b_type: str, *, b_group_scales: Tensor, b_group_size: int) -> Tensor:
        assert b_group_scales.is_contiguous() and b_type == "uint4b8"
        return loops.int4_linear(torch.float32, a, b_q.t(), b_group_scales.t(), b_group_size)[0].to(a.dtype)

    marlin = {
        "marlin_make_workspace_new": lambda device: torch.zeros(1, device=device),
        "marlin_make_empty_g_idx": lambda device: torch.zeros(0, dtype=torch.int32, device=device),
        "marlin_permute_scales": lambda s, size_k, size_n, group_size: s,
        "apply_gptq_marlin_linear": marlin_int4,
    }
    marlin_for_fp4 = {
        "nvfp4_marlin_process_scales": lambda s: (s * 8, 8.0),
        "nvfp4_marlin_process_global_scale": lambda s: s,
        "mxfp4_marlin_process_scales": lambda s: s,
        "apply_fp4_marlin_linear": marlin_fp4,
    }
    layers = "vllm.model_executor.layers.quantization.utils"
    sampler = {"apply_top_k_top_p": apply_top_k_top_p, "random_sample": lambda probs, generators: probs.argmax(-1)}
    for made in (
        module("vllm"),
        module(
            "vllm._custom_ops",
            rms_norm=rms_norm,
            fused_add_rms_norm=fused_add_rms_norm,
            rotary_embedding=rotary_embedding,
            reshape_and_cache_flash=reshape_and_cache_flash,
            gptq_marlin_repack=repack,
            machete_prepack_B=machete_prepack,
            machete_mm=machete_mm,
            cutlass_scaled_mm=cutlass_scaled_mm,
        ),
        *(module(layers.rsplit(".", i)[0]) for i in range(4, 0, -1)),
        module(layers),
        module(f"{layers}.marlin_utils", **marlin),
        module(f"{layers}.marlin_utils_fp4", **marlin_for_fp4),
        module("vllm.scalar_type", scalar_types=SimpleNamespace(uint4b8="uint4b8")),
        module("vllm.vllm_flash_attn", flash_attn_varlen_func=vllm_varlen),
        *(module(f"vllm.{name}") for name in ("v1", "v1.sample", "v1.sample.ops")),
        module("vllm.v1.sample.ops.topk_topp_sampler", **sampler),
        module("fa3_fwd_interface", flash_attn_func=flash_attn_func, flash_attn_with_kvcache=fa3_with_kvcache),
        module("fa3_fwd_config", CONFIG={"build_flags": {}}),
        module("flash_attn", flash_attn_func=flash_attn_func, flash_attn_with_kvcache=fa2_with_kvcache),
        module("flashinfer_jit_cache"),
        module("flashinfer"),
        module("flashinfer.decode", BatchDecodeWithPagedKVCacheWrapper=Decode),
        module("flashinfer.prefill", BatchPrefillWithPagedKVCacheWrapper=Prefill),
        module(
            "flashinfer.norm",
            rmsnorm=lambda x, w, eps: F.rms_norm(x, w.shape, w, eps),
            fused_add_rmsnorm=fused_add_rms_norm,
        ),
        module("flashinfer.activation", silu_and_mul=lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]),
        module("flashinfer.sampling", top_k_top_p_sampling_from_logits=infer_sample),
    ):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    kernels = module(
        "_C", rms_norm=rms_norm, silu_and_mul=lambda out, x: out.copy_(F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1])
    )
    monkeypatch.setattr(torch.ops, "_C", kernels, raising=False)
