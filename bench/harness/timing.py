"""Timers. Each measures several calls side by side, so that a drift of clocks or load meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
# What is written between two calls, at least: it must push the last call's data out of every L2 there is.
_FLUSH_BYTES = 256 << 20

Sampler = Callable[[], list[float]]  # one round: microseconds of each timed call


@dataclass(frozen=True)
class Timing:
    """us: median microseconds of a call. spread: (90 % − 10 % quantile) / median. how: which clock and launch were used."""

    us: float
    spread: float
    num_samples: int
    how: str


def summarize(samples: Sequence[float], how: str) -> Timing:
    median = statistics.median(samples)
    ranked = sorted(samples)
    low, high = ranked[len(ranked) // 10], ranked[-1 - len(ranked) // 10]
    return Timing(median, (high - low) / median if median > 0 else 0.0, len(ranked), how)


class Timer(Protocol):
    method: str

    def measure(self, calls: Mapping[str, Call]) -> dict[str, Timing | Exception]:
        """Times every call; a call that raises gets its exception and the others go on."""
        ...


class WallTimer:
    """Host clock, for the CPU and for whole engines. Calls take turns for `rounds` rounds; calls that are shorter than
    `min_seconds` are repeated until a sample is at least that long."""

    def __init__(
        self,
        rounds: int = 5,
        min_seconds: float = 0.002,
        warm_up: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.rounds, self.min_seconds, self.warm_up, self.clock = rounds, min_seconds, warm_up, clock
        self.method = (
            f"{'time of the calling thread' if clock is time.thread_time else 'host clock'}, {warm_up or 'no'} warm-up, {rounds} round(s) in which all calls take turns, median"
            + (f" of samples of at least {min_seconds * 1e3:g} ms" if min_seconds else "")
        )

    def measure(self, calls: Mapping[str, Call]) -> dict[str, Timing | Exception]:
        failed: dict[str, Timing | Exception] = {}
        repeats: dict[str, int] = {}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for name, call in calls.items():
            try:
                for _ in range(self.warm_up):
                    call()
                # Without a minimum (whole engines) no time is spent on finding out how long a call takes.
                repeats[name] = self._repeats(call) if self.min_seconds > 0 else 1
            except Exception as error:
                failed[name] = error
        for _ in range(self.rounds):
            for name, call in calls.items():
                if name in failed:
                    continue
                try:
                    samples[name].append(self._once(call, repeats[name]) / repeats[name] * 1e6)
                except Exception as error:
                    failed[name] = error
        return {name: failed[name] if name in failed else summarize(samples[name], "wall") for name in calls}

    def _once(self, call: Call, repeats: int) -> float:
        start = self.clock()
        for _ in range(repeats):
            call()
        return self.clock() - start

    def _repeats(self, call: Call) -> int:
        repeats = 1
        while (seconds := self._once(call, repeats)) < self.min_seconds and repeats < 1 << 20:
            repeats = max(repeats * 2, int(repeats * self.min_seconds / max(seconds, 1e-9) * 1.2))
        return repeats


@dataclass(frozen=True)
class Recorded:
    """What a call of `RecordedTimer` gives: seconds of each run. note: what there is to say of them, or ""."""

    seconds: Sequence[float]
    note: str = ""


class RecordedTimer:
    """For engines that were timed in processes of their own: a call runs nothing, it gives its `Recorded`."""

    method = (
        "host clock in each engine's own process, one engine after the other; warm-up of every number of sequences in a step; "
        "median of the runs"
    )

    def measure(self, calls: Mapping[str, Call]) -> dict[str, Timing | Exception]:
        results: dict[str, Timing | Exception] = {}
        for name, call in calls.items():
            try:
                found: Recorded = call()
                results[name] = summarize([s * 1e6 for s in found.seconds], found.note or "recorded")
            except Exception as error:
                results[name] = error
        return results


class GraphTimer:
    """Device time of a call with a cold L2.

    A CUDA graph holds `n` times [write a buffer of 4 × L2, event, call, event]: launches cost the same as in an engine that
    replays graphs, and no host work comes between the events. What cannot be captured is launched on the stream behind the
    same flush, which hides the launch; its `how` says so.

    The calls' graphs are replayed in turns, every other round backwards, and the first half of a replay is not counted: a GPU
    at its power limit gives a call the clocks that the one before has left it. cuBLAS's 8192 x 28672 x 4096 in bf16 took 2,438 us
    behind a kernel that draws little power, and 2,638 and 2,870 behind two that draw much (an H200).
    """

    def __init__(
        self, device: torch.device, rounds: int = 2, budget_us: float = 60_000.0, warm_up: int = 3, max_calls: int = 100
    ) -> None:
        self.device, self.rounds, self.budget_us, self.warm_up, self.max_calls = (
            device,
            rounds,
            budget_us,
            warm_up,
            max_calls,
        )
        l2_bytes = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
        self._flush_buffer = torch.empty(max(4 * l2_bytes, _FLUSH_BYTES) // 4, dtype=torch.int32, device=device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._events_inside = self._can_record_inside()
        self.method = (
            f"CUDA graph of up to {max_calls} × [write {self._flush_buffer.nbytes >> 20} MiB to flush L2, event, call, event]"
            + ("" if self._events_inside else " (events around one-call graphs: this torch records none inside)")
            + f", {warm_up} warm-up calls and one unmeasured replay, {rounds} round(s) of {budget_us / 1e3:g} ms a call in which "
            "all calls take turns, median of the device time between the events"
        )

    def measure(self, calls: Mapping[str, Call]) -> dict[str, Timing | Exception]:
        results: dict[str, Timing | Exception] = {}
        samplers: dict[str, tuple[Sampler, str]] = {}
        samples: dict[str, list[float]] = {}
        for name, call in calls.items():
            try:
                samplers[name] = self._prepare(call)
                samplers[name][0]()
                samples[name] = []
            except Exception as error:
                results[name] = error
        for index in range(self.rounds):
            names = list(samples)
            for name in reversed(names) if index % 2 else names:
                try:
                    times = samplers[name][0]()
                    samples[name] += times[len(times) // 2 :]
                except Exception as error:
                    results[name] = error
                    del samples[name]
        for name, times in samples.items():
            results[name] = summarize(times, samplers[name][1])
        return {name: results[name] for name in calls}

    def warm_clocks(self, seconds: float = 0.3) -> None:
        """Keeps the matrix units busy until the clocks are where a loaded GPU has them."""
        a = torch.randn(4096, 4096, device=self.device, dtype=torch.bfloat16)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for _ in range(10):
                a @ a
            torch.cuda.synchronize(self.device)

    def _prepare(self, call: Call) -> tuple[Sampler, str]:
        """A round of the call, and how it is launched."""
        with torch.cuda.stream(self._stream):
            for _ in range(self.warm_up):
                call()
            torch.cuda.synchronize(self.device)
            once = statistics.median(self._on_stream(call, 3)())
            flush = statistics.median(self._on_stream(self._flush, 3)())
        n = max(5, min(self.max_calls, int(self.budget_us / max(once + flush, 1.0))))
        try:
            return (
                (self._inside(call, n), "graph") if self._events_inside else (self._around(call, n), "one-call graph")
            )
        except Exception as error:
            torch.cuda.synchronize(self.device)  # raises if the context itself is lost
            first_line = (str(error).splitlines() or [""])[0]
            return self._on_stream(call, n), f"stream (not captured: {type(error).__name__}: {first_line[:120]})"

    def _flush(self) -> None:
        self._flush_buffer.zero_()

    def _capture(self, body: Call) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            body()
        return graph

    def _inside(self, call: Call, n: int) -> Sampler:
        pairs = _event_pairs(n, external=True)

        def body() -> None:
            for start, end in pairs:
                self._flush()
                start.record()
                call()
                end.record()

        graph = self._capture(body)

        def sample() -> list[float]:
            graph.replay()
            torch.cuda.synchronize(self.device)
            return _elapsed(pairs)

        return sample

    def _around(self, call: Call, n: int) -> Sampler:
        return self._on_stream(self._capture(call).replay, n)

    def _on_stream(self, call: Call, n: int) -> Sampler:
        def sample() -> list[float]:
            pairs = _event_pairs(n)
            with torch.cuda.stream(self._stream):
                for start, end in pairs:
                    self._flush()
                    start.record()
                    call()
                    end.record()
            torch.cuda.synchronize(self.device)
            return _elapsed(pairs)

        return sample

    def _can_record_inside(self) -> bool:
        """Whether events recorded by a graph give times, and plausible ones: beside the stream's for the same write."""
        try:
            with torch.cuda.stream(self._stream):
                self._flush()
            inside, outside = self._inside(self._flush, 5), self._on_stream(self._flush, 5)
            inside()
            ratio = statistics.median(inside()) / statistics.median(outside())
        except Exception:
            torch.cuda.synchronize(self.device)
            return False
        return 0.5 < ratio < 1.5


def _event_pairs(n: int, external: bool = False) -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
    def event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True, external=external)  # type: ignore[no-untyped-call]

    return [(event(), event()) for _ in range(n)]


def _elapsed(pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> list[float]:
    return [start.elapsed_time(end) * 1e3 for start, end in pairs]
