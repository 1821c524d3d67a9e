"""The cases of the GPU families, built small on a CPU: results, peers' arguments, ids. Whole engines are in the benchmark."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench import __main__ as command
from bench.families import (
    FAMILIES,
    flash_bwd,
    flash_fwd,
    gated_linear,
    gemm_8bit,
    gemm_bf16,
    gemm_fp4,
    gemm_sparse,
    lm_head,
    norm_gemm,
    paged,
    small_ops,
    smollm2,
)
from bench.harness import accuracy, environment, formulas
from bench.harness.accuracy import WrongResultError
from bench.harness.case import Case, Context
from bench.harness.peers import PeerAbsentError
from fastattn.reference.quantize import unpack_e2m1
from tests.harness import formulas as loops
from tests.harness.attention_calls import (
    batch_backward_calls,
    batch_calls,
    merge_calls,
    paged_calls,
    varlen_backward_calls,
    varlen_calls,
)
from tests.harness.generators import Gen
from tests.harness.sampling_calls import adjust_calls, bitmask_calls, logprob_calls
from tests.harness.specs.elementwise import embedding_calls
from tests.harness.specs.kv_cache import rope_calls

CPU = torch.device("cpu")
PAGED = {"heads": 4, "kv_heads": 2}
CASES: dict[str, Callable[[Context], Case]] = {
    "gemm": partial(gemm_bf16.gemm, m=5, n=48, k=64),
    **{f"gemm {name}": partial(gemm_fp4.gemm, name=name, m=5, n=48, k=128) for name in gemm_fp4.FORMATS},
    "rms_norm and gemm": partial(norm_gemm.norm_gemm, m=5, n=48, k=64, norm="rms"),
    "rms_norm and gemm, squares given": partial(norm_gemm.norm_gemm, m=5, n=48, k=64, norm="rms_given"),
    "layer_norm and gemm": partial(norm_gemm.norm_gemm, m=5, n=48, k=64, norm="layer"),
    "gemm and a residual": partial(norm_gemm.residual_gemm, m=5, n=48, k=64),
    "gated gemm": partial(gated_linear.gated_linear, m=5, n=48, k=64, norm=False),
    "rms_norm and gated gemm": partial(gated_linear.gated_linear, m=5, n=48, k=64, norm=True),
    "sample of a head, greedy": partial(lm_head.lm_head, m=5, vocab=304, k=64, temperature=0.0),
    "sample of a head, drawn": partial(lm_head.lm_head, m=5, vocab=304, k=64, temperature=0.8),
    **{f"gemm {name} fp8": partial(gemm_fp4.gemm_fp8, name=name, m=5, n=48, k=128) for name in ("nvfp4", "mxfp4")},
    "gemm int8": partial(gemm_8bit.int8, m=20, n=48, k=64),
    "gemm fp8": partial(gemm_8bit.fp8, m=20, n=48, k=64),
    "gemm fp8 blocks": partial(gemm_8bit.fp8_blocks, m=5, n=256, k=384),
    **{f"sparse gemm {kind}": partial(gemm_sparse.case, kind=kind, m=5, n=48, k=64) for kind in gemm_sparse.KINDS},
    "flash full": partial(flash_fwd.flash, dim=64, length=48, causal=False, heads=2, tokens=96),
    "flash causal": partial(flash_fwd.flash, dim=64, length=48, causal=True, heads=2, tokens=96),
    "gradients full": partial(flash_bwd.gradients, dim=64, length=48, causal=False, heads=4, kv_heads=2, tokens=96),
    "gradients causal": partial(flash_bwd.gradients, dim=64, length=48, causal=True, heads=2, tokens=96),
    "decode": partial(paged.paged, page=4, batch=3, new=1, length=21, **PAGED),
    "decode ragged": partial(paged.paged, page=16, batch=3, new=1, length=90, dim=64, ragged=True, **PAGED),
    "tree": partial(paged.paged, page=4, batch=3, new=7, length=21, tree=True, **PAGED),
    "prefill": partial(paged.paged, page=4, batch=2, new=10, length=10, **PAGED),
    "invariant": partial(paged.paged, page=4, batch=3, new=1, length=21, batch_invariant=True, **PAGED),
    "chunk": partial(paged.paged, page=4, batch=2, new=5, length=11, **PAGED),
    "rms_norm": partial(small_ops.rms_norm, tokens=7, width=64),
    "add_rms_norm": partial(small_ops.add_rms_norm, tokens=7, width=64),
    "layer_norm": partial(small_ops.layer_norm, tokens=7, width=64),
    "swiglu": partial(small_ops.swiglu, tokens=7, width=64),
    "rope_kv_write": partial(small_ops.rope_kv_write, tokens=7, heads=4, kv_heads=2, page=4),
    "copy_blocks": partial(small_ops.copy_blocks, pairs=3, layers=2, kv_heads=2, page=4, dim=8),
    "embedding": partial(small_ops.embedding, tokens=7, vocab=50, width=64),
    "adjust_logits": partial(small_ops.adjust_logits, rows=3, touched=9, vocab=50),
    "apply_token_bitmask": partial(small_ops.apply_token_bitmask, rows=3, vocab=50),
    "token_logprobs": partial(small_ops.token_logprobs, rows=3, num_top=4, vocab=50),
    **{
        f"sample {kind}": partial(small_ops.sample, kind=kind, rows=4, vocab=200)
        for kind in ("greedy", "plain", "topk_topp", "minp")
    },
}
# What each case can be measured beside when everything is installed, but for torch.compile.
BESIDE = {
    "gemm": {"cublas"},
    **{f"gemm {name}": {"marlin", "cublas"} for name in gemm_fp4.FORMATS},
    "rms_norm and gemm": {"cublas", "torch"},
    "rms_norm and gemm, squares given": {"cublas", "torch"},
    "layer_norm and gemm": {"cublas", "torch"},
    "gemm and a residual": {"cublas", "cublas_add_rms_norm"},
    "gated gemm": {"cublas_swiglu", "cublas_vllm", "cublas_flashinfer", "cublas_torch"},
    "rms_norm and gated gemm": {"cublas_swiglu", "cublas_vllm", "cublas_flashinfer", "cublas_torch"},
    "sample of a head, greedy": {"linear_sample", "cublas_torch"},
    "sample of a head, drawn": {"linear_sample", "cublas_torch"},
    "gemm nvfp4 fp8": {"cublas"},
    "gemm mxfp4 fp8": {"cublas"},
    "gemm int8": {"int_mm", "vllm"},
    "gemm fp8": {"scaled_mm", "vllm"},
    "gemm fp8 blocks": {"vllm"},
    "sparse gemm bf16": {"dense"},  # cuSPARSELt has no CPU
    "sparse gemm int8": {"dense"},
    "sparse gemm fp8": {"dense"},
    "gradients full": {"fa2"},
    "gradients causal": {"fa2"},
    "flash full": {"fa3", "fa2", "flash_attn"},
    "flash causal": {"fa3", "fa2", "flash_attn"},
    "decode": {"vllm_fa3", "fa3", "flashinfer", "flash_attn", "torch"},
    "decode ragged": {"vllm_fa3", "fa3", "flash_attn"},
    "invariant": {"vllm_fa3", "fa3", "flashinfer", "flash_attn", "torch"},
    "tree": {"flashinfer"},
    "prefill": {"vllm_fa3", "fa3", "flashinfer", "flash_attn", "torch"},
    "chunk": {"vllm_fa3", "fa3", "flashinfer", "flash_attn"},
    "rms_norm": {"torch", "vllm", "flashinfer"},
    "add_rms_norm": {"torch", "vllm", "flashinfer"},
    "layer_norm": {"torch"},
    "swiglu": {"torch", "vllm", "flashinfer"},
    "rope_kv_write": {"torch", "vllm"},
    "copy_blocks": {"torch"},
    "embedding": {"torch"},
    "adjust_logits": {"torch"},
    "apply_token_bitmask": {"torch"},
    "token_logprobs": {"torch"},
    "sample greedy": {"torch", "vllm", "flashinfer"},
    "sample plain": {"torch", "vllm", "flashinfer"},
    "sample topk_topp": {"torch", "vllm", "flashinfer"},
    "sample minp": {"torch"},
}


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


@pytest.mark.parametrize("name", CASES)
def test_case_holds_and_its_peers_agree(name: str, libraries: None) -> None:
    case = CASES[name](Context(CPU, quick=True))
    checked = case.check()
    assert checked.share <= 1
    case.ours()
    agreed, absent = set(), {}
    for peer, build in case.peers.items():
        try:
            result = build()()
        except (PeerAbsentError, RuntimeError) as error:
            absent[peer] = str(error)
            continue
        if checked.exact is not None and result is not None:
            accuracy.check_peer(peer, result, checked.exact)
        agreed.add(peer)
    assert agreed == BESIDE[name], absent
    assert case.work.num_bytes > 0
    assert case.config


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("sample")])
def test_a_slightly_wrong_result_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One element off by 10 % of the largest: the check of every case sees it."""
    real = accuracy.check_results

    def tampered(op: str, actual: list[Tensor], exact: list[Tensor], plain: list[Tensor], noise: float = 0.0) -> float:
        flat = actual[0].reshape(-1)
        flat[flat.numel() // 2] += float(exact[0].abs().max()) * 0.1 + 0.1
        return real(op, [flat.view(actual[0].shape), *actual[1:]], exact, plain, noise)

    monkeypatch.setattr(accuracy, "check_results", tampered)
    with pytest.raises(WrongResultError, match="1 of"):
        CASES[name](Context(CPU, quick=True)).check()


@pytest.mark.parametrize("kind", ["greedy", "plain", "topk_topp", "minp"])
def test_a_wrong_draw_is_caught(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = small_ops.judge_sample

    def second(kind: str, call: dict[str, Any], results: list[Tensor]) -> Any:
        moved = results[0].clone()
        moved[2] = (moved[2] + 1) % 200
        return judge(kind, call, [moved])

    monkeypatch.setattr(small_ops, "judge_sample", second)
    with pytest.raises(WrongResultError, match=r"sample: (tokens|1 of 4 rows are wrong, first 2)"):
        small_ops.sample(Context(CPU), kind, rows=4, vocab=200).check()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_wrong_draw_of_a_head_is_caught(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = lm_head.judge

    def second(call: dict[str, Any], results: list[Tensor]) -> Any:
        moved = results[0].clone()
        moved[2] = (moved[2] + 1) % 304
        return judge(call, [moved, results[1]])

    monkeypatch.setattr(lm_head, "judge", second)
    with pytest.raises(WrongResultError, match="lm_head_sample: row 2 got"):
        lm_head.lm_head(Context(CPU), m=5, vocab=304, k=64, temperature=temperature).check()


def finite_merge_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, call in merge_calls(gen, dtype):
        yield name, {key: t.nan_to_num(1.0, 2.0, -2.0) for key, t in call.items()}


FORMULAS = {
    "embedding": embedding_calls,
    "batch_attention": batch_calls,
    "batch_attention_backward": batch_backward_calls,
    "merge_attention_states": finite_merge_calls,
    "paged_attention": paged_calls,
    "varlen_attention": varlen_calls,
    "varlen_attention_backward": varlen_backward_calls,
    "adjust_logits": adjust_calls,
    "apply_token_bitmask": bitmask_calls,
    "token_logprobs": logprob_calls,
    "rope_kv_write": rope_calls,
}


# Arguments that no benchmark gives; a call that makes use of one is left out.
UNUSED: dict[str, Any] = {
    "window_size": (-1, -1),
    "softcap": 0.0,
    "q_norm_weight": None,
    "interleaved": False,
    "hadamard": False,
    **dict.fromkeys(("alibi_slopes", "sinks", "seqused_q", "q_descale", "k_descale", "v_descale", "dlse")),
}


def is_covered(call: dict[str, Any]) -> bool:
    if any(call.get(name, default) != default for name, default in UNUSED.items() if name != "q_norm_weight"):
        return False
    if "cos_sin" in call:
        return "q_norm_weight" not in call and call["cos_sin"].shape[1] == call["q"].shape[2]
    if "seqused_k" in call and "cu_seqlens_k" in call:
        return False
    if "v" in call and call["v"].shape[-1] != call["q"].shape[-1]:
        return False
    scale = call.get("softmax_scale")
    return scale is None or scale == call["q"].shape[-1] ** -0.5


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_agree_with_those_in_loops(name: str) -> None:
    """On every call of the operator tests that the benchmark's formula covers."""
    compared = 0
    for label, call in FORMULAS[name](Gen(), torch.float32):
        expected = getattr(loops, name)(torch.float64, **call)
        has_no_keys = "attention" in name and bool(torch.isneginf(call.get("lse", expected[1])).any())
        if not is_covered(call) or has_no_keys or expected[0].numel() == 0:
            continue
        dropped = {*UNUSED, "norm_eps", "softmax_scale"}
        found = getattr(formulas, name)(torch.float64, **{k: v for k, v in call.items() if k not in dropped})
        for i, (a, e) in enumerate(zip(found, expected, strict=True)):
            torch.testing.assert_close(
                a.double(),
                e.double(),
                rtol=1e-9,
                atol=1e-9,
                equal_nan=True,
                msg=lambda m, at=f"{label}, result {i}": f"{at}: {m}",
            )
        compared += 1
    assert compared >= 2


def test_ids_are_those_that_the_targets_ask_for() -> None:
    """`match` expressions of targets.toml, and how many cases each must find."""
    wanted = {
        "flash_fwd": {r"d128_s(8192|16384)_full_bf16": 2, ".*": 72},
        "flash_bwd": {".*": 48},
        "paged_decode": {
            r"_b(1|2|4|8)_": 33,
            r"bf16_.*_b(32|64|128|256)_": 11,
            r"(fp8|int8)_.*_b128_s4096": 2,
            ".*": 56,
        },
        "paged_prefill": {".*": 21},
        "cascade": {".*": 8},
        "paged_invariant": {"_usual$": 11, "_invariant$": 11},
        **{
            name: {r"^m(1|2|4|8|16|32|64)_": 20, ".*": 44}
            for name in ("gemm_bf16", "gemm_int8", "gemm_fp8", "gemm_fp8_block")
        },
        "gemm_fp4": {r"^m(1|2|4|8|16|32|64)_": 60, r"^w4a8_m(512|1024|4096|8192)_": 32, ".*": 188},
        "gemm_sparse": {"_bf16$": 44, "_int8$": 44, "_fp8$": 44},
        "norm_gemm": {"_rms$": 36, "_rms_given$": 36, "_layer$": 36, "_residual$": 36, ".*": 144},
        "gated_linear": {"_rms$": 36, ".*": 72},
        "lm_head": {"_greedy$": 15, "_drawn$": 15, ".*": 30},
        "small_ops": {".*": 29},
        "engine": {"bf16_b1_": 2, "bf16_": 7, "(int8|fp4)_": 14, "hf_mixed": 1, "startup": 1, ".*": 23},
        "engine_saturated": {".*": 8},
    }
    for family, matches in wanted.items():
        ids = [spec.id for spec in FAMILIES[family].specs]
        assert len(ids) == len(set(ids))
        for match, count in matches.items():
            assert sum(re.search(match, i) is not None for i in ids) == count, (family, match)
    for family in FAMILIES.values():
        assert any(spec.quick for spec in family.specs)


# ---- command line ----


def test_list_names_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list", "paged_decode", "gemm_bf16", "--case", "b8_|^m64_"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("paged_decode (cuda): ")
    assert lines[1:3] == ["  bf16_p16_b8_s4096", "  bf16_p64_b8_s4096"]
    end = next(i for i, line in enumerate(lines) if line.startswith("gemm_bf16 (cuda): "))
    assert end > 10 and all("_b8_" in line for line in lines[1:end])
    assert lines[end + 1 :] == [f"  m64_n{n}_k{k}" for n, k in gemm_bf16.WEIGHTS]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nope"], "unknown family 'nope', known are small_ops, gemm_bf16"),
        ([], "which family? Known are small_ops"),
        (["small_ops", "--case", "("], "--case is '(', which is no regular expression"),
        (["small_ops", "--case", "zzz", "--quick"], "no case of small_ops matches 'zzz' and is in --quick"),
    ],
)
def test_mistakes_are_named(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_a_gpu_one_clear_line_each() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "small_ops", "flash_fwd"],
        cwd=environment.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert [line.split(",")[0] for line in done.stderr.splitlines()] == [
        "bench: small_ops needs an NVIDIA GPU",
        "bench: flash_fwd needs an NVIDIA GPU",
    ]


def test_partial_runs_do_not_replace_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the cases is no answer to the targets, so it goes elsewhere."""
    from bench.harness import runner

    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(runner, "device_for", lambda family: CPU)
    gemm = FAMILIES["gemm_bf16"]
    small = type(gemm.specs[0])("m5", partial(gemm_bf16.gemm, m=5, n=48, k=64), quick=True)
    monkeypatch.setitem(FAMILIES, "gemm_bf16", type(gemm)(gemm.name, "cuda", gemm.about, (small,)))
    assert command.main(["gemm_bf16", "--case", "m5", "--quick", "--commit", "abc"]) == 0
    assert not (tmp_path / "gemm_bf16.json").exists()
    meta = json.loads((tmp_path / "partial" / "gemm_bf16.json").read_text())["meta"]
    assert (meta["partial"], meta["commit"], meta["complete"]) == (True, "abc", True)
    assert command.main(["gemm_bf16", "--out", str(tmp_path / "full"), "--quick"]) == 0
    assert (tmp_path / "full" / "gemm_bf16.md").read_text().startswith("# gemm_bf16")


# ---- engines ----


def test_requests_have_the_lengths_that_were_asked_for() -> None:
    class Tokenizer:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            assert not add_special_tokens
            return [ord(c) for c in text[:50]]

    found = smollm2.requests(Context(CPU), Tokenizer(), ((3, 5), (120, 2), (50, 1)))
    assert [(len(ids), new) for ids, new in found] == [(3, 5), (120, 2), (50, 1)]
    assert found[0][0] == [ord(c) for c in smollm2.TEXT[:3]]
    assert found[1][0][:3] == [ord(c) for c in smollm2.TEXT[17:20]]


def test_unequal_tokens_are_named() -> None:
    smollm2.check_equal([[1, 2], [3]], [[1, 2], [3]])
    with pytest.raises(WrongResultError, match=r"request 1: token 2 is \[9\], transformers gives \[5\]"):
        smollm2.check_equal([[1], [3, 4, 9]], [[1], [3, 4, 5]])
    with pytest.raises(WrongResultError, match=r"request 0: token 1 is \[\], transformers gives \[2\]"):
        smollm2.check_equal([[1]], [[1, 2]])


class Logits:
    """A model whose logits for the token after each are a table's row, off by `error`."""

    device = CPU

    def __init__(self, error: float) -> None:
        table = torch.zeros(4, 4)
        table[0, 1], table[1, 2], table[2, 3], table[2, 0] = 5.0, 5.0, 5.0, 4.9
        self.table = table + error

    def __call__(self, ids: Tensor) -> Any:
        return type("Out", (), {"logits": self.table[ids]})


def test_greedy_tokens_may_differ_only_at_near_ties() -> None:
    exact, plain = Logits(0.0), Logits(0.05)  # allowed: 4 × 0.05
    assert smollm2.check_near(exact, plain, [([0], 3)], [[1, 2, 3]]) == 0.0
    assert smollm2.check_near(exact, plain, [([0], 3)], [[1, 2, 0]]) == pytest.approx(0.5, rel=1e-4)
    with pytest.raises(
        WrongResultError, match=r"request 0: token 1 is 3, 5.000 below the best logit \(2\), allowed 0.200"
    ):
        smollm2.check_near(exact, plain, [([0], 3)], [[1, 3, 3]])
    with pytest.raises(WrongResultError, match="request 0: 2 tokens, expected 3"):
        smollm2.check_near(exact, plain, [([0], 3)], [[1, 2]])
