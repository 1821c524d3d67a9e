"""The families: their ids, the command line, and what compares engines' tokens."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import __main__ as command
from bench.families import (
    FAMILIES,
    gemm_bf16,
    smollm2,
)
from bench.harness import environment
from bench.harness.accuracy import WrongResultError
from bench.harness.case import Context

CPU = torch.device("cpu")


def test_ids_are_those_that_the_targets_ask_for() -> None:
    """`match` expressions of targets.toml, and how many cases each must find."""
    wanted = {
        "flash_fwd": {r"d128_s(8192|16384)_full_bf16": 2, ".*": 72},
        "flash_bwd": {r"^d80_": 6, r"_q\d+_k": 8, "_varlen": 2, ".*": 64},
        "flash_fwd_fp8": {r"^d(80|96|192)_": 18, r"_q\d+_k": 10, "_varlen": 2, ".*": 55},
        "flash_sm80": {"^fwd_": 18, "^bwd_": 18, ".*": 36},
        "paged_decode": {
            r"_b(1|2|4|8)_": 33,
            r"bf16_.*_b(32|64|128|256)_": 14,
            r"(fp8|int8)_.*_b128_s4096": 2,
            r"^bf16_p(8|32|64|128)_b32_s4096$": 4,
            ".*": 59,
        },
        "paged_prefill": {r"_h\d+x": 4, r"^bf16_p(8|16|32|64|128)_b8_t512_s4096$": 5, ".*": 29},
        "cascade": {".*": 8},
        "paged_invariant": {"_usual$": 11, "_invariant$": 11},
        **{
            name: {r"^m(1|2|4|8|16|32|64)_": 56, r"_k(576|1536)$": 52, ".*": 104}
            for name in ("gemm_bf16", "gemm_int8", "gemm_fp8", "gemm_fp8_block")
        },
        "gemm_fp4": {r"^m(1|2|4|8|16|32|64)_": 147, r"^w4a8_m(512|1024|4096|8192)_": 64, ".*": 385},
        "gemm_sparse": {"_bf16$": 52, "_int8$": 52, "_fp8$": 52},
        "norm_gemm": {"_rms$": 104, "_rms_given$": 104, "_layer$": 104, "_residual$": 104, ".*": 416},
        "gated_linear": {"_rms$": 36, ".*": 72},
        "lm_head": {"_greedy$": 15, "_drawn$": 15, ".*": 30},
        "small_ops": {".*": 29},
        "engine": {"bf16_b1_": 2, "bf16_": 7, "(int8|fp4)_": 14, "hf_mixed": 1, "startup": 1, ".*": 23},
        "engine_saturated": {".*": 12},
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
    assert lines[end + 1 :] == [f"  m64_n{n}_k{k}" for n, k in (*gemm_bf16.WEIGHTS, *gemm_bf16.SMOLLM2)]


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
