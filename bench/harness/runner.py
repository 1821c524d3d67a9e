"""Runs a family: build, check, prepare the peers, time all of them, write; one case after the other."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness import accuracy, environment
from bench.harness.case import Case, CaseSpec, Checked, Context, Family
from bench.harness.ceilings import measure_ceilings
from bench.harness.peers import PeerAbsentError
from bench.harness.report import FAILED_US, Report, one_line, verdict
from bench.harness.timing import Call, GraphTimer, RecordedTimer, Timer, WallTimer


class UnavailableError(Exception):
    """The family cannot run on this machine; the message says why and what would help."""


class ContextLostError(Exception):
    """The CUDA context is broken: nothing more can run in this process."""


def device_for(family: Family) -> torch.device:
    if family.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UnavailableError(f"{family.name} needs an NVIDIA GPU, and torch {torch.__version__} sees none here")
    from fastattn.ops import has_cuda_kernels

    if not has_cuda_kernels():
        raise UnavailableError(f"{family.name} needs the CUDA kernels: FASTATTN_CUDA=on pip install .")
    return torch.device("cuda", torch.cuda.current_device())


def make_timer(family: Family, device: torch.device, quick: bool) -> Timer:
    if family.timer == "recorded":
        return RecordedTimer()
    if family.timer == "thread":
        return WallTimer(rounds=3 if quick else 9, min_seconds=0.02, clock=time.thread_time)
    if family.timer == "wall":
        return WallTimer(1 if quick else family.rounds, min_seconds=0.0, warm_up=0)  # check and peers have run once
    if device.type == "cpu":
        return WallTimer(rounds=3 if quick else 9)
    return GraphTimer(device, rounds=1 if quick else family.rounds, budget_us=20_000.0 if quick else 60_000.0)


def run_family(
    family: Family,
    specs: Sequence[CaseSpec],
    context: Context,
    out: Path,
    meta: dict[str, Any],
    earlier: Report | None = None,
) -> Report:
    """Runs `specs` of the family and writes the report after each case. meta is added to the report's own. earlier: what an
    earlier run on the same machine found of the other cases; the report is of both."""
    start = time.perf_counter()
    timer = make_timer(family, context.device, context.quick)
    ceiling_timer: Timer = WallTimer(rounds=3)
    if context.device.type == "cuda":  # by the device's clock, also where whole engines are timed by the host's
        ceiling_timer = graphs = timer if isinstance(timer, GraphTimer) else GraphTimer(context.device, rounds=1)
        graphs.warm_clocks()
    ceilings = measure_ceilings(ceiling_timer, context.device, context.quick)
    report = Report(family.name, environment.meta(context.device, timer.method) | {"complete": False} | meta, ceilings)
    _say(f"{family.name}: " + ", ".join(f"{name} {value:g}" for name, value in ceilings.items() if value))
    if earlier is not None:
        try:
            report.take(earlier, {spec.id for spec in specs})
        except ValueError as error:
            raise UnavailableError(str(error)) from None
    lost = ""
    for spec in specs:
        if lost:
            row = report.fail(spec.id, lost)
        else:
            try:
                row = _run_case(spec, context, timer, report)
            except ContextLostError as error:
                lost = f"not run: {error} in {spec.id}"
                row = report.fail(spec.id, str(error))
            gc.collect()
        _say(_progress(row))
        report.write(out)
    report.meta |= {"complete": True, "seconds": round(time.perf_counter() - start, 1)}
    path = report.write(out)
    _say(f"{family.name}: {len(report.cases)} cases, {len(report.failed)} failed, {report.meta['seconds']} s, {path}")
    return report


def _run_case(spec: CaseSpec, context: Context, timer: Timer, report: Report) -> dict[str, Any]:
    try:
        case = spec.build(context)
        checked = case.check()
        _synchronize(context.device)
    except ContextLostError:
        raise
    except Exception as error:
        _raise_if_lost(context.device, error)
        return report.fail(spec.id, one_line(error))
    calls, notes = _prepare_peers(case, checked, context.device)
    try:
        timings = timer.measure(calls)
    except Exception as error:
        _raise_if_lost(context.device, error)
        return report.fail(spec.id, one_line(error), case.config, case.work)
    for timing in timings.values():
        if isinstance(timing, Exception):
            _raise_if_lost(context.device, timing)
    return report.add(spec.id, timings, notes, case.work, case.config, checked.share, case.target)


def _prepare_peers(case: Case, checked: Checked, device: torch.device) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls to time, ours first, and why the others are not among them. A peer with another result is not a peer."""
    calls: dict[str, Call] = {"ours": case.ours}
    notes: dict[str, str] = {}
    for name, build in case.peers.items():
        try:
            call = build()
            result = call()
            _synchronize(device)
            if checked.exact is not None and isinstance(result, torch.Tensor):
                accuracy.check_peer(name, result, checked.exact)
            calls[name] = call
        except PeerAbsentError as error:
            notes[name] = str(error)
        except Exception as error:
            _raise_if_lost(device, error)
            notes[name] = one_line(error)
    return calls, notes


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _raise_if_lost(device: torch.device, cause: BaseException) -> None:
    """After an error: does the context still answer?"""
    try:
        _synchronize(device)
    except Exception as error:
        raise ContextLostError(f"the CUDA context is lost ({one_line(error)}) after {one_line(cause)}") from cause


def _progress(row: dict[str, Any]) -> str:
    if row["ours_us"] >= FAILED_US:
        return f"  {row['id']:32} FAILED {row['failed']}"
    peers = "  ".join(f"{name} {us:.1f}" if us else f"{name} -" for name, us in row["peers_us"].items())
    share = f"{row['ceiling']:.2f} of {row['bound']}" if row["ceiling"] else ""
    return (
        f"  {row['id']:32} {row['ours_us']:12.1f} µs  {row['achieved']:>13}  {share:15} ratio {verdict(row)}  [{peers}]"
    )


def _say(line: str) -> None:
    """Line by line, also into a pipe: a run that is stopped at its limit has said what it knows."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
