"""The time line of a start."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from fastattn.engine.llm import LLM
from fastattn.engine.sampling_params import SamplingParams
from fastattn.engine.startup import Startup, process_seconds
from tests.engine.tiny import TinySource


def test_phases_add_up_to_the_first_token(caplog: pytest.LogCaptureFixture) -> None:
    start = time.perf_counter()
    with caplog.at_level(logging.INFO, "fastattn.engine"):
        llm = LLM(TinySource(), quiet=True, device="cpu", dtype="float32", max_model_len=64, num_kv_blocks=12)
        ready = time.perf_counter() - start
        startup = llm.engine.startup
        assert startup is not None
        assert list(startup.seconds) == ["process", "open", "device", "tokenizer", "weights", "kv_cache"]
        assert 0 < startup.engine_seconds <= ready
        assert startup.weight_bytes == sum(info.nbytes for info in TinySource().tensors().values())
        time.sleep(0.2)  # nobody asks for a while, which is not the engine's time
        asked = time.perf_counter()
        llm.generate({"prompt_token_ids": [5, 6]}, SamplingParams(max_tokens=3), use_tqdm=False)
        answered = time.perf_counter() - asked
    assert 0 < startup.seconds["first_token"] <= answered
    assert startup.total_seconds == pytest.approx(
        startup.seconds["process"] + startup.engine_seconds + startup.seconds["first_token"]
    )
    (line,) = [r.getMessage() for r in caplog.records if "first token" in r.getMessage()]
    assert line.startswith(f"first token {startup.total_seconds:.2f} s after the process began: process ")
    assert f"weights {startup.seconds['weights']:.2f} s ({startup.weight_rate / 1e9:.1f} GB/s), kv_cache " in line


def test_the_process_began_before_now(tmp_path: Path) -> None:
    first = process_seconds()
    time.sleep(0.05)
    assert 0.04 < process_seconds() - first < 5 and first > 0
    # A name may hold brackets and blanks; field 22 of a process that began with the machine.
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "stat").write_text("7 (a) b (c)) S " + " ".join(["1"] * 18) + " 0 1 1")
    assert process_seconds(tmp_path) == pytest.approx(time.clock_gettime(time.CLOCK_BOOTTIME), abs=1)
    (tmp_path / "self" / "stat").write_text("damaged")
    assert 0 < process_seconds(tmp_path) <= time.process_time()


def test_a_phase_begins_where_the_last_ended() -> None:
    start = time.perf_counter()
    startup = Startup()
    for phase in ("open", "weights"):
        time.sleep(0.02)
        startup.lap(phase)
    assert min(startup.seconds["open"], startup.seconds["weights"]) >= 0.02
    assert startup.engine_seconds <= time.perf_counter() - start  # no time counts twice
