"""`fastattn bench … --against`: which peers there are, what they are given, and what is made of their times."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.benchmarks import against, engines
from fastattn.benchmarks.engines import Measured
from fastattn.models.loader.safetensors_source import SafetensorsSource
from tests.cli.conftest import Invoke
from tests.cli.test_commands import one_line_error
from tests.engine.tiny import CONFIG, TinySource

LATENCY = (
    "bench",
    "latency",
    "-m",
    "tiny",
    "--device",
    "cpu",
    "--input-len",
    "6",
    "--output-len",
    "3",
    "--batch-size",
    "2",
)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_peer_reads_the_weights_that_we_have(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Gemma as GGUF has it: norms with the 1 that checkpoints leave out."""
    monkeypatch.setattr(against, "_SHARD_BYTES", 10_000)
    source = TinySource(config=replace(CONFIG, architecture=architecture))
    with against.hf_folder(source, torch.float32) as folder:
        assert len(list(folder.glob("*.safetensors"))) > 2
        written = SafetensorsSource(folder)
        assert set(written.tensors()) == set(source.tensors())
        for name, info in source.tensors().items():
            ours, theirs = torch.empty(info.shape), torch.empty(info.shape)
            source.read(name, ours)
            written.read(name, theirs)
            missing = float(architecture == "gemma3" and name.endswith("norm.weight"))
            torch.testing.assert_close(theirs + missing, ours, msg=name)
        with against.hf_folder(written, torch.float32) as same:
            assert same == folder
    assert not folder.exists()


@pytest.mark.skipif(engines.missing("transformers") != "", reason="transformers comes with fastattn[compress]")
def test_latency_beside_transformers(invoke: Invoke, tmp_path: Path) -> None:
    """For real: transformers reads the tiny model and answers the same prompts."""
    pytest.importorskip("matplotlib", reason="matplotlib comes with fastattn[bench]")
    path = tmp_path / "latency.json"
    page = tmp_path / "latency.html"
    counts = ("--num-iters-warmup", "1", "--num-iters", "2", "--output-json", str(path), "--plot", str(page))
    result = invoke(*LATENCY, *counts, "--against", "hf")
    assert result.exit_code == 0, result.output
    saved = json.loads(path.read_text())
    theirs = saved["against"]["hf"]
    assert set(theirs) == {"version", "startup_seconds", "avg_latency", "latencies", "percentiles", "ratio"}
    assert theirs["ratio"] == pytest.approx(theirs["avg_latency"] / saved["avg_latency"])
    text = page.read_text()
    assert "<h1>tiny: latency</h1>" in text and f"<td>{theirs['ratio']:.4g}</td>" in text
    assert text.count("data:image/png;base64,") == 1 and "http" not in text
    assert f"hf {theirs['version']}: avg_latency {theirs['avg_latency']:.4f}; ours is" in result.stdout


def test_throughput_beside_peers(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both get the prompts that ours gets, in token ids; one that fails is in the result, and the exit code is 1."""
    jobs: list[tuple[str, dict[str, Any], engines.Load]] = []

    def fake(start: str, model: str, options: dict[str, Any], loads: list[engines.Load]) -> Measured:
        assert json.loads(Path(model, "config.json").read_text())["num_hidden_layers"] == CONFIG.num_layers
        jobs.append((start, options, loads[0]))
        return Measured("1", 2.0, {"throughput": [4.0]}) if start.endswith("hf") else Measured(error="no GPU")

    monkeypatch.setattr(against, "measure", fake)
    monkeypatch.setattr(against, "missing", lambda package: "")
    path, prompts = tmp_path / "out.json", tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "abc", "output_tokens": 2}\n')
    result = invoke(
        "bench", "throughput", "-m", "tiny", "--device", "cpu", "--dataset-name", "custom", "--dataset-path", str(prompts),
        "--num-prompts", "2", "--num-warmups", "3", "--max-model-len", "64", "--against", "vllm, hf", "--output-json", str(path),
    )  # fmt: skip
    assert result.exit_code == 1, result.output
    ids = TinySource().tokenizer().encode("abc")
    assert [job[0] for job in jobs] == ["fastattn.benchmarks.engines:vllm", "fastattn.benchmarks.engines:hf"]
    theirs = {"tensor_parallel_size": 1, "max_model_len": 64, "gpu_memory_utilization": 0.9}
    assert jobs[0][1] == {"dtype": "float32", "temperature": 1.0, **theirs}
    assert jobs[1][1] == {"dtype": "float32", "temperature": 1.0, "device": "cpu"}
    assert jobs[0][2].requests == [(ids, 2)] * 2 and jobs[0][2].warm_ups == 1
    saved = json.loads(path.read_text())
    assert saved["against"]["vllm"] == {"version": "", "startup_seconds": 0.0, "error": "no GPU"}
    theirs = saved["against"]["hf"]
    assert (theirs["tokens_per_second"], theirs["total_output_tokens"]) == (saved["total_num_tokens"] / 4, 4)
    assert theirs["ratio"] == pytest.approx(4 / saved["elapsed_time"])
    assert "vllm: failed: no GPU" in result.stdout


def test_start_beside_peers(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer's time is that from its process's start to the first token of a prompt as long as ours, not that of the request."""

    def fake(start: str, model: str, options: dict[str, Any], loads: list[engines.Load]) -> Measured:
        ((ids, new),) = loads[0].requests
        assert (len(ids), new) == (32, 1)
        return Measured("1", 30.0, {"startup": [0.1]}) if start.endswith("hf") else Measured(error="no GPU")

    monkeypatch.setattr(against, "measure", fake)
    monkeypatch.setattr(against, "missing", lambda package: "")
    ours = {"avg_warm_startup_time": 1.0, "avg_warm_first_token_time": 2.0, "warm_phases": [{"weights": 0.5}]}
    monkeypatch.setattr("fastattn.benchmarks.startup.startup", lambda *_, **__: dict(ours))
    path = tmp_path / "startup.json"
    command = ("bench", "startup", "-m", "tiny", "--device", "cpu", "--num-iters-cold", "0", "--against", "hf,vllm")
    result = invoke(*command, "--output-json", str(path))
    assert result.exit_code == 1, result.output
    saved = json.loads(path.read_text())
    about = {"version": "1", "startup_seconds": 30.0}
    assert saved["against"]["hf"] == about | {"avg_warm_first_token_time": 30.0, "ratio": 15.0}
    assert "hf 1: avg_warm_first_token_time 30.0000; ours is 15.00 times as fast" in result.stdout
    assert "vllm: failed: no GPU" in result.stdout
    said = one_line_error(invoke(*command, "--num-iters-cold", "1", "--num-iters-warm", "0"))
    assert "--num-iters-warm is 0, allowed is at least 1 with --against" in said


def test_peers_that_cannot_be(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against, "missing", lambda package: "")
    said = one_line_error(invoke(*LATENCY, "--against", "hf", "-tp", "2"))
    assert "--tensor-parallel-size is 2, allowed is 1 with --against hf" in said
    monkeypatch.undo()
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    assert "--against has 'sglang', allowed are vllm, hf" in one_line_error(invoke(*LATENCY, "--against", "sglang"))
    said = one_line_error(invoke(*LATENCY, "--against", "vllm"))
    assert "--against vllm: vllm is not installed: pip install vllm" in said
    monkeypatch.setattr(against, "missing", lambda package: "")
    assert "--n is 2, allowed is 1 with --against" in one_line_error(invoke(*LATENCY, "--n", "2", "--against", "hf"))
