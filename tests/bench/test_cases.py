"""The cases of the GPU families, built small on a CPU: results, and their peers' arguments. Whole engines are in the benchmark."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.families import (
    flash_bwd,
    flash_fwd,
    flash_fwd_fp8,
    flash_sm80,
    gated_linear,
    gemm_8bit,
    gemm_bf16,
    gemm_fp4,
    gemm_sparse,
    lm_head,
    norm_gemm,
    paged,
    small_ops,
    small_ops_logits,
)
from bench.harness import accuracy
from bench.harness.accuracy import WrongResultError
from bench.harness.case import Case, Context, Family
from bench.harness.peers import PeerAbsentError

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
    "gradients few queries": partial(
        flash_bwd.of_sequences, dim=64, lengths=[5], causal=False, heads=4, kv_heads=2, key_lengths=[48]
    ),
    "gradients varlen": partial(flash_bwd.of_sequences, dim=80, lengths=[9, 1, 30], causal=True, heads=4, kv_heads=2),
    **{
        f"portable {direction}": partial(
            flash_sm80.portable, direction=direction, dim=64, lengths=[48, 48], causal=True, heads=4, kv_heads=2
        )
        for direction in flash_sm80.DIRECTIONS
    },
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
    "adjust_logits": partial(small_ops_logits.adjust_logits, rows=3, touched=9, vocab=50),
    "apply_token_bitmask": partial(small_ops_logits.apply_token_bitmask, rows=3, vocab=50),
    "token_logprobs": partial(small_ops_logits.token_logprobs, rows=3, num_top=4, vocab=50),
    **{
        f"sample {kind}": partial(small_ops_logits.sample, kind=kind, rows=4, vocab=200)
        for kind in ("greedy", "plain", "topk_topp", "minp")
    },
}


# What each case can be measured beside when everything is installed, but for torch.compile.
BESIDE = {
    "gemm": {"cublas"},
    **{f"gemm {name}": {"marlin", "cublas"} for name in ("nvfp4", "mxfp4")},
    "gemm int4": {"marlin", "machete", "cublas"},
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
    "gradients few queries": set(),  # aten's operators have no CPU
    "gradients varlen": set(),
    "portable fwd": {"fa2"},
    "portable bwd": {"fa2"},
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


ISSUE_7_ROWS = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192}


@pytest.mark.parametrize(
    "family", [gemm_bf16.FAMILY, gemm_8bit.INT8, gemm_8bit.FP8, gemm_fp4.FAMILY, norm_gemm.FAMILY], ids=lambda f: f.name
)
def test_products_have_all_rows_and_shapes_that_goals_are_about(family: Family) -> None:
    sizes = {tuple(map(int, re.findall(r"[mnk](\d+)", spec.id.removeprefix("w4a8_"))[:3])) for spec in family.specs}
    for n, k in (*gemm_bf16.WEIGHTS, *gemm_bf16.SMOLLM2):
        assert {m for m, *weight in sizes if weight == [n, k]} >= ISSUE_7_ROWS, (n, k)
    assert len({spec.id for spec in family.specs}) == len(family.specs)


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
    judge = small_ops_logits.judge_sample

    def second(kind: str, call: dict[str, Any], results: list[Tensor]) -> Any:
        moved = results[0].clone()
        moved[2] = (moved[2] + 1) % 200
        return judge(kind, call, [moved])

    monkeypatch.setattr(small_ops_logits, "judge_sample", second)
    with pytest.raises(WrongResultError, match=r"sample: (tokens|1 of 4 rows are wrong, first 2)"):
        small_ops_logits.sample(Context(CPU), kind, rows=4, vocab=200).check()


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


@pytest.mark.parametrize(
    "shape",
    [
        {"lengths": [48, 48], "causal": True},
        {"lengths": [5], "causal": False, "key_lengths": [48]},
        {"lengths": [9, 1, 30], "causal": True},
    ],
    ids=["batch", "few queries", "varlen"],
)
def test_fp8_attention_holds_and_a_wrong_element_is_caught(
    shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = partial(flash_fwd_fp8.attention, Context(CPU), dim=80, heads=4, kv_heads=2, **shape)
    case = build()
    assert case.check().share <= 1
    case.ours()
    real = accuracy.compare

    def tampered(actual: Tensor, exact: Tensor, allowed: float, what: str) -> float:
        flat = actual.reshape(-1)
        flat[flat.numel() // 2] += float(exact.abs().max()) * 0.1 + 0.1
        return real(flat.view(actual.shape), exact, allowed, what)

    monkeypatch.setattr(accuracy, "compare", tampered)
    with pytest.raises(WrongResultError, match="1 of"):
        build().check()


@pytest.mark.parametrize("direction", flash_sm80.DIRECTIONS)
def test_the_portable_kernel_is_forced(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forced = []

    def record(op: Any, call: dict[str, Any], formula: Any, **rest: Any) -> Case:
        forced.append(call["kernel"])
        return Case(lambda: None, lambda: pytest.fail("not checked here"), rest["peers"], rest["work"], rest["config"])

    monkeypatch.setattr(flash_sm80.flash_fwd, "op_case", record)
    monkeypatch.setattr(flash_sm80.flash_bwd, "op_case", record)
    for lengths in ([8, 8], [3, 5]):
        case = flash_sm80.portable(Context(CPU), direction, 64, lengths, causal=True, heads=4, kv_heads=2)
        assert (set(case.peers), case.target) == ({"fa2"}, 0.9)
    assert forced == ["sm80", "sm80"]
