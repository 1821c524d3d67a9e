"""A guard with what its operator wants of it: when it speaks, when it fails, when it is too slow."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram

from fastattn.serve.guardrails.config import Action, GuardConfig
from fastattn.serve.guardrails.guard import Finding, Guard, Scan

logger = logging.getLogger("fastattn.serve.guardrails")

_ON_THE_SPOT = 4096  # characters that a linear guard may scan in the event loop: well under a millisecond or two
_MAX_LABEL = 64


class GuardMetrics:
    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        self.findings = Counter(
            "fastattn:guardrail_findings", "What guards found, by what was done.", ["guard", "direction", "action"],
            registry=registry,
        )  # fmt: skip
        self.failures = Counter(
            "fastattn:guardrail_failures", "Times that a guard failed itself.", ["guard", "kind"], registry=registry
        )
        self.seconds = Histogram(
            "fastattn:guardrail_seconds", "Time in guards on the way in, a request.", registry=registry,
            buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0),
        )  # fmt: skip


class GuardFailedError(Exception):
    """A guard that fails closed did not come to a verdict."""


class Act(NamedTuple):
    """A finding with what is to be done about it."""

    start: int
    end: int
    label: str | None
    action: Action
    guard: str


@dataclass
class Policy:
    config: GuardConfig
    guard: Guard
    metrics: GuardMetrics
    _threads: ThreadPoolExecutor | None = field(default=None, repr=False)

    async def scan(self, text: str, start: int, final: bool) -> tuple[list[Act], int]:
        """(findings, settled) as of Guard.scan. Raises GuardFailedError if the guard fails and that closes."""
        most = self.guard.most_per_second
        if most is not None and len(text) > most * self.config.time_budget:
            why = f"cannot look at {len(text)} characters in {self.config.time_budget} s"
            return self._failed("slow", why, len(text))
        try:
            scan = await self._scan(text, start, final)
            acts = [self._act(finding, len(text)) for finding in scan.findings]
        except asyncio.TimeoutError:
            return self._failed("slow", f"took more than {self.config.time_budget} s", len(text))
        except Exception as error:  # whatever a guard does, its operator has said what follows
            return self._failed("error", f"{type(error).__name__}: {error}", len(text))
        return acts, scan.settled

    def count(self, act: Act, direction: str, request_id: str) -> None:
        self.metrics.findings.labels(self.config.name, direction, act.action).inc()
        logger.info("request %s: guard %s: %s in the %s: %s", request_id, act.guard, act.label, direction, act.action)

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def _scan(self, text: str, start: int, final: bool) -> Scan:
        if self.guard.is_linear and len(text) <= _ON_THE_SPOT:
            return self.guard.scan(text, start, final)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(2, thread_name_prefix=f"fastattn-guard-{self.config.name}")
        loop, call = asyncio.get_running_loop(), self.guard.scan
        future = loop.run_in_executor(self._threads, call, text, start, final)
        return await asyncio.wait_for(future, self.config.time_budget)

    def _act(self, finding: Finding, length: int) -> Act:
        start, end, label = finding
        if not 0 <= start <= end <= length:
            raise ValueError(f"a finding from {start} to {end} in a text of {length}")
        return Act(start, end, None if label is None else label[:_MAX_LABEL], self.config.action, self.config.name)

    def _failed(self, kind: str, why: str, length: int) -> tuple[list[Act], int]:
        self.metrics.failures.labels(self.config.name, kind).inc()
        logger.warning("guard %s %s; it fails %s", self.config.name, why, self.config.fail)
        if self.config.fail == "closed":
            raise GuardFailedError(self.config.name)
        return [], length


def redact(text: str, acts: list[Act]) -> str:
    """The text with [LABEL] for each finding; of those that overlap the longest names what they cover together."""
    parts, position, i = [], 0, 0
    acts = sorted(
        (act for act in acts if act.action == "redact" and act.label is not None), key=lambda a: (a.start, -a.end)
    )
    while i < len(acts):
        start, end, widest = acts[i].start, acts[i].end, acts[i]
        while i + 1 < len(acts) and acts[i + 1].start < end:
            i += 1
            end = max(end, acts[i].end)
            if acts[i].end - acts[i].start > widest.end - widest.start:
                widest = acts[i]
        parts += [text[position:start], f"[{(widest.label or '').upper()}]"]
        position, i = end, i + 1
    return "".join(parts) + text[position:]
