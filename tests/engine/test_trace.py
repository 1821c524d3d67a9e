"""The trace of an engine: what its viewers read, and that nothing of a GPU is waited for."""

from __future__ import annotations

import gzip
import json
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastattn import LLM, SamplingParams
from fastattn.engine import trace
from fastattn.engine.trace import Trace
from tests.engine.tiny import TinySource

Event = dict[str, Any]


def events(path: Path) -> list[Event]:
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    found: list[Event] = json.loads(text)
    return found


def track(found: list[Event], name: str) -> list[Event]:
    tid = next(e["tid"] for e in found if e["name"] == "thread_name" and e["args"]["name"] == name)
    return sorted((e for e in found if e["ph"] == "X" and e["tid"] == tid), key=lambda e: float(e["ts"]))


@pytest.mark.parametrize(("name", "overlap"), [("trace.json", False), ("trace.json.gz", True)])
def test_a_trace_of_an_engine(name: str, overlap: bool, tmp_path: Path) -> None:
    path = tmp_path / name
    prompts = [{"prompt_token_ids": [5 + i, 6, 7]} for i in range(3)]
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    plain = LLM(TinySource(), device="cpu", quiet=True, max_num_seqs=2)
    llm = LLM(TinySource(), device="cpu", quiet=True, max_num_seqs=2, async_scheduling=overlap, trace=str(path))
    assert [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)] == [
        o.outputs[0].token_ids for o in plain.generate(prompts, params, use_tqdm=False)
    ]
    llm.engine.add_request("gone", prompts[0], params)
    llm.engine.step()
    llm.engine.abort_request("gone")
    num_steps = llm.engine.stats().num_steps
    llm.close()

    found = events(path)
    host = track(found, "engine (host)")
    names = " ".join(e["name"] for e in host) + " "
    queued = "schedule build launch sample "
    if overlap:  # what a step drew is waited for when the next one is queued
        assert re.fullmatch(f"{queued}outputs (({queued}|schedule )wait outputs ({queued}outputs )?)+", names)
    else:
        assert names == f"{queued}wait outputs " * num_steps
    assert names.count("wait") == num_steps
    assert all(a["ts"] + a["dur"] <= b["ts"] + 0.002 for a, b in pairwise(host))
    launches = [e for e in host if e["name"] == "launch"]
    device = track(found, "cpu")
    assert len(device) == num_steps + overlap  # the last one drew for a request that was gone
    assert all(a["ts"] <= b["ts"] and b["dur"] <= a["dur"] for a, b in zip(launches, device, strict=True))
    assert device[0]["args"] == {"tokens": 6, "sequences": 2, "graph": False, "cascade": False}

    curves = {e["name"]: [x["args"]["value"] for x in found if x["name"] == e["name"]] for e in found if e["ph"] == "C"}
    assert set(curves) == {"requests running", "requests waiting", "KV blocks in use", "tokens in step"}
    assert curves["tokens in step"][:2] == [6, 2]
    assert curves["requests waiting"][0] == 1
    assert max(curves["KV blocks in use"]) == 2

    spans = {(e["id"], e["name"], e["ph"]): e for e in found if e.get("cat") == "request"}
    whole = spans["2", "request", "b"]
    assert whole["args"] == {
        "finish_reason": "length", "prompt_tokens": 3, "cached_tokens": 0, "output_tokens": 4, "preemptions": 0
    }  # fmt: skip
    moments = [
        whole,
        *(spans["2", n, p] for n in ("queued", "prefill", "decode") for p in "be"),
        spans["2", "request", "e"],
    ]
    assert all(a["ts"] <= b["ts"] for a, b in pairwise(moments))
    assert spans["2", "queued", "e"]["ts"] > spans["0", "decode", "b"]["ts"]  # it waited for a place
    assert spans["gone", "request", "b"]["args"]["finish_reason"] == "abort"


def test_a_trace_is_whole_when_its_engine_is_gone(tmp_path: Path) -> None:
    """Nobody closed it; and one that was closed takes nothing more."""
    trace = Trace(str(tmp_path / "a.json"), torch.device("cpu"))
    trace.phase("schedule")
    trace.end()
    del trace
    assert [e["name"] for e in track(events(tmp_path / "a.json"), "engine (host)")] == ["schedule"]
    trace = Trace(str(tmp_path / "b.json"), torch.device("cpu"))
    trace.close()
    trace.phase("schedule")
    trace.close()
    assert track(events(tmp_path / "b.json"), "engine (host)") == []


def test_many_events_are_on_disk_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    trace = Trace(str(path), torch.device("cpu"))
    for _ in range(1500):
        trace.phase("schedule")
        trace.phase("schedule")  # goes on
        trace.phase("build")
    trace.end()
    cut = path.read_text()
    assert cut.count("schedule") == 1500 and not cut.rstrip().endswith("]")
    trace.close()
    assert len(track(events(path), "engine (host)")) == 3000


def test_a_full_disk_ends_the_trace_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    for buffered in (32, 10_000):  # while it runs, and when it is closed
        monkeypatch.setattr(trace, "_BUFFERED_EVENTS", buffered)
        llm = LLM(TinySource(), device="cpu", quiet=True, trace="/dev/full")
        (output,) = llm.generate({"prompt_token_ids": [5, 6, 7]}, params, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 20
        llm.close()
        assert "the trace /dev/full ends here: " in caplog.text and "No space left" in caplog.text
        caplog.clear()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trace is '.*nowhere/a\.json', expected a file in a folder that is there"):
        LLM(TinySource(), device="cpu", quiet=True, trace=str(tmp_path / "nowhere" / "a.json"))


def test_events_of_a_gpu_are_read_when_they_have_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose clock is ours: spans begin where they ran, are held to what is certain, and nothing is waited for."""
    clock = SimpleNamespace(host=0.0, device=0.0)  # ms

    class FakeEvent:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock.device

        def query(self) -> bool:
            return bool(self.at <= clock.host)

        def elapsed_time(self, end: FakeEvent) -> float:
            return float(end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr("fastattn.engine.trace.time", SimpleNamespace(monotonic_ns=lambda: int(clock.host * 1e6)))
    trace = Trace(str(tmp_path / "a.json"), torch.device("cuda"))

    def step(queued: float, begins: float, ends: float) -> None:
        clock.host, clock.device = queued, begins
        with trace.device_span("step"):
            clock.device = ends

    step(1.0, 1.0, 4.0)
    step(2.0, 4.0, 6.0)  # queued behind the first, which still runs
    assert len(trace._pending) == 2
    step(7.0, 6.5, 9.0)  # the device's clock says that it began before it was queued
    assert len(trace._pending) == 1
    clock.host = 10.0
    trace.close()
    spans = [(e["ts"], e["dur"]) for e in track(events(tmp_path / "a.json"), "cuda")]
    assert spans == [(1000.0, 3000.0), (4000.0, 2000.0), (7000.0, 2500.0)]
