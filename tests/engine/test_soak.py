"""A minute of `python -m tests.harness.engine_soak` in seconds, and what it finds if something is wrong."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from fastattn.engine.output_processor import TextStream
from fastattn.engine.runner import Runner
from fastattn.engine.scheduler import Scheduler
from fastattn.speculative.costs import DraftBudget
from tests.harness.engine_soak import KINDS, Soak, SoakError

pytestmark = pytest.mark.usefixtures("one_thread", "quiet")


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """pytest keeps what is logged of the planted faults."""
    caplog.set_level(logging.CRITICAL, "fastattn.engine")


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_and_nothing_stays(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DraftBudget, "choose", lambda self, lengths: 3)  # whatever the clock says of what guesses cost
    counts = Soak(kind, calls_between_faults=97).run(900, between_checks=300, warm_checks=1)
    assert counts["ended"] == counts["taken"] == 900 and counts["checks"] == 3
    rare = ["stop", "length", "abort", "error", "refused", "resumed", "preemptions", "prefix hits"]
    rare += ["accepted"] if kind == "guessing" else []
    rare += ["host hits"] if "num_host_kv_blocks" in KINDS[kind] else []
    assert min(counts[what] for what in rare) > 0, counts


def test_what_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    finish, push = Scheduler.finish, TextStream.push

    def leaks(self: Scheduler, request: Any, *how: Any) -> None:
        kept.append((request, object()))
        finish(self, request, *how)

    def loses(self: Scheduler, request: Any, *how: Any) -> None:
        finish(self, request, *how)
        if request.arrival == 200:
            self.kv.pool.allocate(1)

    planted: list[tuple[type, str, Any, str | None]] = [
        (Runner, "_copy_blocks", lambda self, copies: None, r"request \d+, completion"),
        (TextStream, "push", lambda self, token, may_stop=True: push(self, token, False), r"request \d+, completion"),
        (Scheduler, "finish", leaks, "Python holds .* more blocks"),
        (Scheduler, "finish", loses, None),
    ]
    for owner, name, value, message in planted:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            with pytest.raises((SoakError, AssertionError), match=message):
                Soak("overlapped").run(800, between_checks=300, warm_checks=1)
