"""The timers of the benchmark's harness, on clocks that move only when a call says so."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.harness import timing
from bench.harness.timing import GraphTimer, Timing, WallTimer, summarize

CPU = torch.device("cpu")


class Clock:
    """A clock that moves only when a call says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, *seconds: float) -> Callable[[], None]:
        left = list(seconds)

        def call() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_summarize_gives_median_and_spread() -> None:
    found = summarize([9.0, 1.0, 2.0, 3.0, 2.0], "wall")
    assert (found.us, found.num_samples, found.how) == (2.0, 5, "wall")
    assert found.spread == pytest.approx((9.0 - 1.0) / 2.0)
    assert summarize([5.0], "wall").spread == 0.0


def test_wall_timer_takes_the_median_after_warm_up() -> None:
    clock = Clock()
    timer = WallTimer(rounds=5, min_seconds=0.0, warm_up=2, clock=clock)
    found = timer.measure({"ours": clock.takes(50.0, 50.0, 1.0, 1.0, 3.0, 9.0, 2.0)})["ours"]
    assert isinstance(found, Timing)
    assert found.us == pytest.approx(2e6)
    assert found.num_samples == 5


def test_wall_timer_repeats_short_calls_and_takes_turns() -> None:
    clock, order = Clock(), []

    def call(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            clock.now += seconds

        return run

    timer = WallTimer(rounds=2, min_seconds=0.01, warm_up=1, clock=clock)
    found = timer.measure({"short": call("short", 1e-5), "long": call("long", 0.02)})
    assert {n: round(t.us, 3) for n, t in found.items() if isinstance(t, Timing)} == {"short": 10.0, "long": 20000.0}
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert turns == ["short", "long", "short", "long", "short", "long"]
    assert order.count("short") > 2000


def test_wall_timer_goes_on_when_one_call_raises() -> None:
    clock = Clock()

    def broken() -> None:
        raise ValueError("no")

    found = WallTimer(rounds=2, min_seconds=0.0, clock=clock).measure({"ours": clock.takes(1.0), "peer": broken})
    assert isinstance(found["ours"], Timing)
    assert isinstance(found["peer"], ValueError)


class FakeCuda:
    """torch.cuda as far as GraphTimer uses it, on a virtual clock: a graph's events keep the times of its capture."""

    def __init__(self, can_capture_events: bool = True) -> None:
        self.clock, self.capturing, self.replays, self.can_capture_events = Clock(), False, 0, can_capture_events

    def install(self, patch: pytest.MonkeyPatch) -> None:
        fake = self

        class Event:
            def __init__(self, enable_timing: bool, external: bool = False) -> None:
                assert enable_timing
                self.external = external

            def record(self) -> None:
                if fake.capturing and not (self.external and fake.can_capture_events):
                    raise RuntimeError("operation not permitted when stream is capturing")
                self.at = fake.clock.now

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1e3  # ms

        class Graph:
            def replay(self) -> None:
                fake.replays += 1
                fake.clock.now += 1e-6

        @contextlib.contextmanager
        def capture(graph: Graph, **options: Any) -> Iterator[None]:
            fake.capturing = True
            try:
                yield
            finally:
                fake.capturing = False

        properties = SimpleNamespace(L2_cache_size=1 << 10)
        patch.setattr(timing, "_FLUSH_BYTES", 1 << 12)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        patch.setattr(torch.cuda, "Stream", lambda device: None)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", capture)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(GraphTimer, "_flush", lambda timer: self.clock.takes(60e-6)())


def test_graph_timer_times_the_call_without_the_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    fake.install(monkeypatch)
    timer = GraphTimer(CPU, rounds=3, budget_us=1005.0)
    found = timer.measure({"ours": fake.clock.takes(5e-6), "peer": fake.clock.takes(40e-6)})
    for name, us, n in (("ours", 5.0, 15), ("peer", 40.0, 10)):
        timed = found[name]
        assert isinstance(timed, Timing)
        assert timed.us == pytest.approx(us)
        assert timed.num_samples == 3 * (n - n // 2)
        assert timed.how == "graph"
    assert "flush L2" in timer.method


def test_graph_timer_does_not_count_clocks_that_the_call_before_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first half of a replay has them; and who comes behind whom changes from round to round."""
    FakeCuda().install(monkeypatch)
    timer = GraphTimer(CPU, rounds=3)
    order: list[str] = []

    def prepare(call: timing.Call) -> tuple[timing.Sampler, str]:
        def sample() -> list[float]:
            before = order[-1] if order else "ours"
            order.append(call())
            return [3.0 if before == "heavy" else 1.0] * 2 + [2.0] * 3

        return sample, "graph"

    monkeypatch.setattr(timer, "_prepare", prepare)
    names = ("ours", "heavy", "light")
    found = timer.measure({name: lambda name=name: name for name in names})  # type: ignore[misc]
    assert [timed.us for timed in found.values() if isinstance(timed, Timing)] == [2.0] * 3
    assert order == [*names, *names, *names[::-1], *names]


def test_graph_timer_launches_what_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    fake.install(monkeypatch)

    def synchronizes() -> None:
        if fake.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        fake.clock.now += 7e-6

    def broken() -> None:
        raise RuntimeError("no kernel for this")

    timer = GraphTimer(CPU, rounds=1, budget_us=1000.0)
    found = timer.measure({"ours": synchronizes, "broken": broken, "peer": fake.clock.takes(40e-6)})
    ours, peer = found["ours"], found["peer"]
    assert isinstance(ours, Timing)
    assert ours.us == pytest.approx(7.0)
    assert ours.how.startswith("stream (not captured: RuntimeError: operation not permitted")
    assert isinstance(found["broken"], RuntimeError)
    assert isinstance(peer, Timing)
    assert peer.how == "graph"


def test_graph_timer_without_events_in_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(can_capture_events=False)
    fake.install(monkeypatch)
    timer = GraphTimer(CPU, rounds=1, budget_us=1000.0)
    found = timer.measure({"ours": fake.clock.takes(5e-6)})["ours"]
    assert isinstance(found, Timing)
    assert found.how == "one-call graph"
    assert fake.replays > 5
    assert "around one-call graphs" in timer.method
