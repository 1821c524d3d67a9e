"""A trace of an engine for Perfetto (ui.perfetto.dev) or chrome://tracing, in the JSON trace event format.

Tracks: the host's phases of each step; what the device computes; requests from their arrival to their end, as asynchronous
spans; counters. Times are on the monotonic clock, in microseconds since the trace began.

    host      schedule │ build │ launch │ sample │ wait ────────────│ outputs
    device                          │ step ────────────────│
    request   queued ──│ prefill ──────────────────────────────────│ decode ──────

Events are written as they come, so that a trace takes no memory that grows; one whose process was killed lacks its end, which
both viewers put up with. One that cannot be written any more, as on a full disk, ends; the engine goes on.
"""

from __future__ import annotations

import gzip
import json
import logging
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fastattn.engine.output_processor import RequestGroup
    from fastattn.engine.request import Request
    from fastattn.engine.scheduler import Scheduler

logger = logging.getLogger("fastattn.engine")

_PID, _HOST, _DEVICE = 1, 1, 2  # the process and its tracks
_BUFFERED_EVENTS = 1024
_NOTHING: AbstractContextManager[None] = nullcontext()


def check_trace_path(path: str | None) -> None:
    """Raises ValueError for what cannot be the file of a trace."""
    if path is None:
        return
    if not isinstance(path, str) or Path(path).is_dir() or not Path(path).parent.is_dir():
        raise ValueError(f"trace is {path!r}, expected a file in a folder that is there")


class NoTrace:
    """Tracing is off: what an engine calls then, and what there is to call."""

    def phase(self, name: str) -> None:
        """The host begins this phase of a step, which ends another that it was in."""

    def end(self) -> None:
        """The host's phase ends, and with it the step."""

    def device_span(self, name: str, **args: Any) -> AbstractContextManager[None]:
        """What is queued in this block is a span of the device's track."""
        return _NOTHING

    def counters(self, scheduler: Scheduler, scheduled: Mapping[Request, int]) -> None:
        """What a step finds, for a viewer to draw as curves: how many requests run and wait, KV blocks in use, tokens."""

    def request(self, group: RequestGroup) -> None:
        """A request that has ended: when it waited, was computed, and got its tokens."""

    def close(self) -> None:
        """Writes what is left. Nothing more can be traced."""


NO_TRACE = NoTrace()


@dataclass(frozen=True)
class _DeviceSpan:
    """launched: when the host queued it, in µs."""

    name: str
    start: torch.cuda.Event
    end: torch.cuda.Event
    launched: float
    args: dict[str, Any]


class Trace(NoTrace):
    """Writes to ``path``, compressed if that ends in .gz. Close it; what is not closed is at the end of its life.

    On a GPU the time of a span is that between two CUDA events, read when both have passed: nothing waits for them.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        check_trace_path(path)
        file = gzip.open(path, "wt", encoding="utf-8") if path.endswith(".gz") else open(path, "w", encoding="utf-8")  # noqa: SIM115
        self._events: list[dict[str, Any]] = []
        self._file, self._path = file, path
        self._finalizer = weakref.finalize(self, _finish, file, self._events)
        self._zero = time.monotonic_ns()
        self._phase: tuple[str, float] | None = None
        self._on_gpu = device.type == "cuda"
        self._pending: deque[_DeviceSpan] = deque()
        # A moment on both clocks: an event of the device, and when it was on the host's.
        self._anchor: tuple[torch.cuda.Event, float] | None = None
        file.write("[\n")
        for tid, name in ((_HOST, "engine (host)"), (_DEVICE, str(device))):
            self._write({"ph": "M", "name": "thread_name", "tid": tid, "args": {"name": name}})
        self._write({"ph": "M", "name": "process_name", "args": {"name": "fastattn"}})

    def phase(self, name: str) -> None:
        if self._phase is None or self._phase[0] != name:
            now = self._now()
            self._end_phase(now)
            self._phase = name, now

    def end(self) -> None:
        self._end_phase(self._now())
        if len(self._events) >= _BUFFERED_EVENTS:
            try:
                _flush(self._file, self._events)
            except OSError as error:
                self._give_up(error)

    def device_span(self, name: str, **args: Any) -> AbstractContextManager[None]:
        return self._gpu_span(name, args) if self._on_gpu else self._cpu_span(name, args)

    @contextmanager
    def _cpu_span(self, name: str, args: dict[str, Any]) -> Iterator[None]:
        start = self._now()
        yield
        self._span(name, _DEVICE, start, self._now() - start, args)

    @contextmanager
    def _gpu_span(self, name: str, args: dict[str, Any]) -> Iterator[None]:
        self._read_passed()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        launched = self._now()
        start.record()
        yield
        end.record()
        self._pending.append(_DeviceSpan(name, start, end, launched, args))

    def counters(self, scheduler: Scheduler, scheduled: Mapping[Request, int]) -> None:
        now = self._now()
        values = {
            "requests running": len(scheduler.running),
            "requests waiting": scheduler.num_waiting,
            "KV blocks in use": scheduler.config.num_kv_blocks - scheduler.kv.num_usable_blocks,
            "tokens in step": sum(scheduled.values()),
        }
        for name, value in values.items():
            self._write({"ph": "C", "name": name, "ts": now, "args": {"value": value}})

    def request(self, group: RequestGroup) -> None:
        m, requests = group.metrics, group.requests
        end = m.finished_time if m.finished_time is not None else time.monotonic()
        moments = [
            m.arrival_time,
            *(end if t is None else t for t in (m.first_scheduled_time, m.first_token_time)),
            end,
        ]
        about = {
            "finish_reason": ", ".join(str(request.finish_reason) for request in requests),
            "prompt_tokens": len(group.prompt_token_ids),
            "cached_tokens": requests[0].num_cached_tokens,
            "output_tokens": sum(request.num_output_tokens for request in requests),
            "preemptions": m.num_preemptions,
        }
        spans = [("request", moments[0], end, about)]
        names = ("queued", "prefill", "decode")
        spans += [(name, *both, {}) for name, both in zip(names, pairwise(moments), strict=True) if both[1] > both[0]]
        for name, begin, last, args in spans:
            event = {"cat": "request", "name": name, "id": group.request_id, "tid": _HOST}
            self._write(event | {"ph": "b", "ts": self._at(begin), "args": args})
            self._write(event | {"ph": "e", "ts": self._at(last)})

    def close(self) -> None:
        self.end()
        self._read_passed()
        try:
            self._finalizer()
        except OSError as error:
            self._give_up(error)

    def _now(self) -> float:
        return (time.monotonic_ns() - self._zero) / 1e3

    def _at(self, moment: float) -> float:
        """Of a moment on the monotonic clock, in seconds."""
        return max(0.0, round(moment * 1e6 - self._zero / 1e3, 3))

    def _end_phase(self, now: float) -> None:
        if self._phase is not None:
            name, start = self._phase
            self._span(name, _HOST, start, now - start, {})
            self._phase = None

    def _read_passed(self) -> None:
        """Writes the device's spans that have passed.

        Where on the host's clock one began is counted on from the one before it, and then held to what is certain: not before
        it was queued, and over by now. So neither the clocks' drift nor the events' resolution adds up.
        """
        while self._pending and self._pending[0].end.query():  # type: ignore[no-untyped-call]
            span = self._pending.popleft()
            duration = span.start.elapsed_time(span.end) * 1e3
            start = span.launched
            if self._anchor is not None:
                event, moment = self._anchor
                start = max(start, moment + event.elapsed_time(span.start) * 1e3)
            start = max(span.launched, min(start, self._now() - duration))
            self._anchor = span.start, start
            self._span(span.name, _DEVICE, start, duration, span.args)

    def _span(self, name: str, tid: int, start: float, duration: float, args: dict[str, Any]) -> None:
        self._write(
            {"ph": "X", "name": name, "tid": tid, "ts": round(start, 3), "dur": round(duration, 3), "args": args}
        )

    def _give_up(self, error: OSError) -> None:
        logger.error("the trace %s ends here: %s", self._path, error)
        self._finalizer.detach()
        self._events.clear()
        with suppress(OSError):  # it tries to write once more
            self._file.close()

    def _write(self, event: dict[str, Any]) -> None:
        if self._finalizer.alive:
            self._events.append(event)


def _flush(file: IO[str], events: list[dict[str, Any]]) -> None:
    file.write("".join(json.dumps(event | {"pid": _PID}) + ",\n" for event in events))
    file.flush()
    events.clear()


def _finish(file: IO[str], events: list[dict[str, Any]]) -> None:
    last = [event | {"pid": _PID} for event in events] or [{"ph": "M", "name": "trace_end", "pid": _PID}]
    with file:
        file.write(",\n".join(map(json.dumps, last)) + "\n]\n")
    events.clear()
