"""The engines of the `engine` family with a tiny shape on a CPU: that each does all loads once, in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import plot
from bench.families import engine
from bench.harness.case import Context
from bench.harness.ceilings import Work
from bench.harness.report import Report
from bench.harness.runner import UnavailableError, run_family
from bench.harness.timing import Recorded, RecordedTimer
from fastattn.benchmarks.engines import Load, check_lengths, measure

TINY = engine.SHAPE | {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.mark.parametrize(
    ("at_third", "limit", "why"),
    [("raise", 60.0, "ValueError: out of tokens"), ("hang", 5.0, "its process was ended after 5 s")],
)
def test_what_was_measured_before_an_error_counts(at_third: str, limit: float, why: str) -> None:
    loads = [
        Load("pair", [([1, 2], 3)] * 2, repeats=2, warm_ups=1),
        Load("one", [([1], 5)], repeats=9),
        Load("no", [([1], 1)]),
    ]
    found = measure("tests.bench.fake_engine:fake", "", {"at_third": at_third}, loads, timeout_seconds=limit)
    assert found.seconds == {"pair": [0.02, 0.02], "one": [0.01, 0.01]}
    assert (found.version, found.notes, found.error) == ("1.2", {"pair": "estimated: half"}, why)
    assert 0 < found.startup_seconds < limit


def test_an_engine_that_does_not_start_says_why() -> None:
    found = measure("tests.bench.nothing:at_all", "", {}, [Load("one", [([1], 5)])])
    assert (found.seconds, found.error) == ({}, "ModuleNotFoundError: No module named 'tests.bench.nothing'")


def test_other_numbers_of_tokens_are_no_result() -> None:
    check_lengths([3, 4], [([1], 3), ([2], 4)])
    with pytest.raises(RuntimeError, match="request 1 got 5 tokens, expected 4"):
        check_lengths([3, 5], [([1], 3), ([2], 4)])


def test_workloads_are_those_of_the_anchors() -> None:
    mixed = engine.LOADS["mixed512"]
    assert (len(mixed), sum(i for i, _ in mixed), sum(o for _, o in mixed)) == (512, 184_910, 98_764)
    num_bytes, num_weights = engine.weight_bytes("bf16")
    assert (num_bytes, num_weights) == (15_009_849_344, 15_009_849_344 // 2)
    assert engine.weight_bytes("int8")[0] < 0.54 * num_bytes  # the head stays as it is
    one = engine.work("bf16", engine.LOADS["b1_512_128"])
    assert (one.num_bytes, one.items) == (128 * num_bytes, 128)
    assert engine.work("bf16", [(1, 1)] * 300).num_bytes == 2 * num_bytes  # 256 at a time


def test_all_engines_on_a_tiny_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours for real, transformers' place taken by a fake; vLLM is absent and a note says so; each is started once."""
    monkeypatch.setattr(engine, "SHAPE", TINY)
    monkeypatch.setattr(engine, "WARM_UP", [(4, 2)])
    loads = {"b1_512_128": [(9, 4)], "mixed512": [(3, 5), (8, 2), (5, 6)], "b8_512_128": [(2, 3)] * 8}
    monkeypatch.setattr(engine, "LOADS", loads)
    monkeypatch.setattr(engine, "missing", lambda module: "vllm is not installed" if module == "vllm" else "")
    started: list[tuple[str, list[str]]] = []

    def counted(start: str, model: str, options: Any, jobs: Sequence[Load], **rest: Any) -> Any:
        started.append((start.partition(":")[2], [load.name for load in jobs]))
        return measure("tests.bench.fake_engine:fake" if start.endswith("hf") else start, model, options, jobs, **rest)

    monkeypatch.setattr(engine, "measure", counted)
    engine.weight_bytes.cache_clear()
    wanted = {"bf16_b1_512_128", "bf16_mixed512", "hf_mixed512", "startup"}
    specs = [spec for spec in engine.FAMILY.specs if spec.id in wanted]
    context = Context(torch.device("cpu"), True, tuple(spec.id for spec in specs))
    family = replace(engine.FAMILY, device="cpu")
    report = run_family(family, specs, context, tmp_path, {"commit": "a"})
    engine.weight_bytes.cache_clear()
    assert report.failed == []
    assert started == [("ours", ["warm_up", "b1_512_128", "mixed512"]), ("hf", ["mixed512"])]
    rows = {row["id"]: row for row in json.loads((tmp_path / "engine.json").read_text())["cases"]}
    assert set(rows) == wanted
    assert rows["hf_mixed512"]["peers_us"]["hf"] == 30_000
    assert rows["hf_mixed512"]["ours_us"] == rows["bf16_mixed512"]["ours_us"]
    assert rows["bf16_mixed512"]["notes"] == {"vllm": "vllm is not installed"}
    assert rows["startup"]["ours_us"] > 1e5 and rows["startup"]["ceiling"] is None
    assert 0 < rows["bf16_b1_512_128"]["ceiling"] < 1


def test_a_report_takes_the_cases_of_an_earlier_run() -> None:
    meta = {"gpu": None, "commit": "a", "command": "one"}
    earlier = Report("engine", meta, {}, [{"id": "x", "ours_us": 1.0}, {"id": "y", "ours_us": 2.0}])
    report = Report("engine", meta | {"command": "two"}, {}, [])
    report.take(earlier, {"y"})
    assert (report.cases, report.meta["command"]) == ([{"id": "x", "ours_us": 1.0}], "one; two")
    with pytest.raises(ValueError, match="--add: the report is of commit a, this run of b"):
        Report("engine", meta | {"commit": "b"}, {}, []).take(earlier, set())


def test_added_cases_of_another_commit_are_refused(tmp_path: Path) -> None:
    about = {"gpu": None, "commit": "a", "command": "one"}
    with pytest.raises(UnavailableError, match="the report is of commit a, this run of b"):
        run_family(
            replace(engine.FAMILY, device="cpu"), [], Context(torch.device("cpu"), True), tmp_path, {"commit": "b"},
            Report("engine", about, {}),
        )  # fmt: skip


def test_recorded_times_are_given_on_with_their_notes() -> None:
    def broken() -> Recorded:
        raise RuntimeError("lost")

    calls = {
        "ours": lambda: Recorded([0.3, 0.1, 0.2]),
        "hf": lambda: Recorded([4.0], "estimated: a part"),
        "vllm": broken,
    }
    found = RecordedTimer().measure(calls)
    report = Report("engine", {}, {})
    row = report.add("x", found, {}, Work(items=10, unit="tok"), "", 0.0)
    assert (row["ours_us"], row["ratio"], row["achieved"]) == (200_000.0, 20.0, "50 tok/s")
    assert row["notes"] == {"hf": "estimated: a part", "vllm": "RuntimeError: lost"}


def test_results_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib comes with fastattn[bench]")
    results = plot.RESULTS / "engine_gpu.json"
    assert plot.main([str(results), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "engine_gpu.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "report.html").read_text()
    for case in json.loads(results.read_text())["cases"]:
        assert f"<tr><td>{case['id']}</td><td>{case['ours_us']:.4g}</td>" in page
    (tmp_path / "other.json").write_text("[]")
    assert plot.main([str(tmp_path / "other.json"), "--out", str(tmp_path)]) == 2
    assert "other.json has no cases, expected what" in capsys.readouterr().err
