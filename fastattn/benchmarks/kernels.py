"""Every operator at the sizes of one model, on the device at hand: its time, its speed, and its share of what the device reaches.

The repository's `bench` package measures beside peers and checks results; this is the quick look that the wheel carries.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Call = Callable[[], object]
_FLUSH_BYTES = 256 << 20  # written between two calls: pushes the last call's data out of every L2 there is


@dataclass(frozen=True)
class Shapes:
    """Sizes of a decoder; the defaults are of an 8B-class model. num_tokens: rows in a step. context_len: keys that each
    decoding sequence attends to. block_size: tokens a KV page."""

    num_tokens: int = 128
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 128256
    context_len: int = 2048
    block_size: int = 16

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}, allowed is at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}, allowed are divisors of num_heads = {self.num_heads}"
            )


@dataclass(frozen=True)
class Case:
    """num_bytes: each input read once, each result written once. num_flop: multiplications and additions of the matrix units;
    0 for what moves memory only."""

    operator: str
    shape: str
    build: Callable[[], Call]
    num_bytes: int
    num_flop: int = 0


@dataclass(frozen=True)
class Row:
    """rate: TFLOP/s where bound is "matrix", TB/s where it is "memory". share: of the ceiling measured in the same run."""

    operator: str
    shape: str
    us: float
    rate: float
    bound: str
    share: float


def ceilings(timer: Timer, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What torch reaches here: {"memory": TB/s of a copy, read and write counted, "matrix": TFLOP/s of a square product}."""
    on_gpu = device.type == "cuda"
    num_bytes, n = (1 << 30, 8192) if on_gpu else (128 << 20, 1024)
    return {
        "memory": 2 * num_bytes / timer.us(_copy(num_bytes, device)) / 1e6,
        "matrix": 2 * n**3 / timer.us(_product(n, device, dtype)) / 1e6,
    }


def _copy(num_bytes: int, device: torch.device) -> Call:
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _product(n: int, device: torch.device, dtype: torch.dtype) -> Call:
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return lambda: F.linear(a, b)


def measure(case: Case, timer: Timer, limits: dict[str, float]) -> Row:
    """Builds the case's inputs, times it, and sets it beside the ceiling that bounds it."""
    us = timer.us(case.build())
    floors = {"memory": case.num_bytes / limits["memory"] / 1e6, "matrix": case.num_flop / limits["matrix"] / 1e6}
    bound = max(floors, key=floors.__getitem__)
    work = case.num_flop if bound == "matrix" else case.num_bytes
    return Row(case.operator, case.shape, us, work / us / 1e6, bound, floors[bound] / us)


class Timer:
    """Median microseconds of a call. On a GPU by events, from a cold L2; on a CPU by the host's clock, in samples of at least
    a millisecond."""

    def __init__(self, device: torch.device, min_seconds: float = 0.2) -> None:
        self.device, self.min_seconds = device, min_seconds
        self._flush: Tensor | None = None
        if device.type == "cuda":
            self._flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)
            self.method = "CUDA events around each call, 256 MiB written before it to empty the L2, median"
        else:
            self.method = f"host clock, samples of at least 1 ms, {torch.get_num_threads()} threads, median"

    def us(self, call: Call) -> float:
        return self._cpu(call) if self._flush is None else self._cuda(call, self._flush)

    def _cpu(self, call: Call) -> float:
        from torch.utils.benchmark import Timer as TorchTimer

        call()
        timer = TorchTimer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        return float(timer.blocked_autorange(min_run_time=self.min_seconds).median) * 1e6

    def _cuda(self, call: Call, flush: Tensor) -> float:
        for _ in range(3):
            call()
        torch.cuda.synchronize(self.device)
        samples: list[float] = []
        end = time.perf_counter() + self.min_seconds
        while len(samples) < 20 or time.perf_counter() < end:
            pairs = [(_event(), _event()) for _ in range(10)]
            for before, after in pairs:
                flush.zero_()  # takes longer than a launch, so the call is queued before the flush has ended
                before.record()
                call()
                after.record()
            torch.cuda.synchronize(self.device)
            samples += [before.elapsed_time(after) * 1e3 for before, after in pairs]
        return statistics.median(samples)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def choose(found: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """The cases of these operators, all if none is named."""
    known = sorted({case.operator for case in found})
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"operator is {unknown[0]!r}, allowed are {', '.join(known)}")
    return [case for case in found if not names or case.operator in names]
