"""Every operator at the sizes of one model, on the device at hand: its time, its speed, and its share of what the device reaches.

The repository's `bench` package measures beside peers and checks results; this is the quick look that the wheel carries.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn import ops

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


def cases(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """One case an operator; GEMM at its four places in a layer, attention once for prefill and once for decode."""
    s, size = shapes, dtype.itemsize
    rows, hidden = s.num_tokens, s.hidden_size

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def int32(*values: Any) -> Tensor:
        return torch.tensor(values, device=device, dtype=torch.int32)

    def rms_norm() -> Call:
        x, weight = rand(rows, hidden), rand(hidden)
        return lambda: ops.rms_norm(x, weight)

    def add_rms_norm() -> Call:
        x, residual, weight = rand(rows, hidden), torch.zeros(rows, hidden, device=device, dtype=dtype), rand(hidden)
        return lambda: ops.add_rms_norm(x, residual, weight)

    def layer_norm() -> Call:
        x, weight = rand(rows, hidden), rand(hidden)
        return lambda: ops.layer_norm(x, weight)

    def gated(op: Callable[[Tensor], Tensor]) -> Callable[[], Call]:
        def build() -> Call:
            x = rand(rows, 2 * s.intermediate_size)
            return lambda: op(x)

        return build

    def embedding() -> Call:
        token_ids = torch.randint(0, s.vocab_size, (rows,), device=device, dtype=torch.int32)
        weight = rand(s.vocab_size, hidden)
        return lambda: ops.embedding(token_ids, weight)

    for name, build, num_bytes in (
        ("rms_norm", rms_norm, 2 * rows * hidden),
        ("add_rms_norm", add_rms_norm, 4 * rows * hidden),
        ("layer_norm", layer_norm, 2 * rows * hidden),
    ):
        yield Case(name, f"{rows} × {hidden}", build, num_bytes * size)
    for name, op in (("swiglu", ops.swiglu), ("geglu", ops.geglu)):
        shape = f"{rows} × {2 * s.intermediate_size}"
        yield Case(name, shape, gated(op), 3 * rows * s.intermediate_size * size)
    yield Case("embedding", f"{rows} of {s.vocab_size} × {hidden}", embedding, 2 * rows * hidden * size)
    yield _rope(s, rand, device, size)
    yield from _linears(s, rand, size)
    yield from _attention(s, rand, int32, device, size)
    yield from _sampling(s, device)


def _rope(s: Shapes, rand: Callable[..., Tensor], device: torch.device, size: int) -> Case:
    rows, dim = s.num_tokens, s.head_dim

    def build() -> Call:
        q, k, v = rand(rows, s.num_heads, dim), rand(rows, s.num_kv_heads, dim), rand(rows, s.num_kv_heads, dim)
        positions = torch.arange(rows, device=device, dtype=torch.int32)
        cos_sin = torch.randn(rows, dim, device=device)
        keys, values = (rand(-(-rows // s.block_size), s.block_size, s.num_kv_heads, dim) for _ in range(2))
        return lambda: ops.rope_kv_write(q, k, v, cos_sin, positions, positions, keys, values)

    elements = 2 * rows * dim * (s.num_heads + 2 * s.num_kv_heads)
    return Case("rope_kv_write", f"{rows} × ({s.num_heads} + 2·{s.num_kv_heads}) × {dim}", build, elements * size)


def _linears(s: Shapes, rand: Callable[..., Tensor], size: int) -> Iterator[Case]:
    q_dim = s.num_heads * s.head_dim
    for n, k in (
        (q_dim + 2 * s.num_kv_heads * s.head_dim, s.hidden_size),
        (s.hidden_size, q_dim),
        (2 * s.intermediate_size, s.hidden_size),
        (s.hidden_size, s.intermediate_size),
    ):

        def build(n: int = n, k: int = k) -> Call:
            x, weight = rand(s.num_tokens, k), rand(n, k)
            return lambda: ops.linear(x, weight)

        m = s.num_tokens
        yield Case("linear", f"{m} × {k} → {n}", build, (m * k + n * k + m * n) * size, 2 * m * n * k)


def _attention(
    s: Shapes, rand: Callable[..., Tensor], int32: Callable[..., Tensor], device: torch.device, size: int
) -> Iterator[Case]:
    rows, heads, kv_heads, dim = s.num_tokens, s.num_heads, s.num_kv_heads, s.head_dim
    blocks_per_seq = -(-s.context_len // s.block_size)

    def prefill() -> Call:
        q, k, v = rand(rows, heads, dim), rand(rows, kv_heads, dim), rand(rows, kv_heads, dim)
        offsets = int32(0, rows)
        return lambda: ops.varlen_attention(q, k, v, offsets, offsets, rows, rows, causal=True)

    def decode() -> Call:
        q = rand(rows, heads, dim)
        keys, values = (rand(rows * blocks_per_seq, s.block_size, kv_heads, dim) for _ in range(2))
        table = torch.randperm(rows * blocks_per_seq, device=device).to(torch.int32).view(rows, blocks_per_seq)
        offsets = torch.arange(rows + 1, device=device, dtype=torch.int32)
        lengths = torch.full((rows,), s.context_len, device=device, dtype=torch.int32)
        return lambda: ops.paged_attention(q, keys, values, offsets, lengths, table, 1)

    kept = (2 * heads + 2 * kv_heads) * rows * dim
    # Half of the scores are masked, and not computed.
    yield Case("varlen_attention", f"prefill of {rows}", prefill, kept * size, 2 * rows * rows * heads * dim)
    read = 2 * rows * s.context_len * kv_heads * dim + 2 * rows * heads * dim
    flop = 4 * rows * s.context_len * heads * dim
    yield Case("paged_attention", f"decode, {rows} × {s.context_len} keys", decode, read * size, flop)


def _sampling(s: Shapes, device: torch.device) -> Iterator[Case]:
    rows, vocab = s.num_tokens, s.vocab_size

    def logits() -> Tensor:
        return torch.randn(rows, vocab, device=device)

    def full(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((rows,), value, device=device, dtype=dtype)

    def sample() -> Call:
        f, i, arguments = torch.float32, torch.int64, logits()
        rest = (full(0.8, f), full(50, torch.int32), full(0.95, f), full(0, f), full(7, i), full(3, i))
        return lambda: ops.sample(arguments, *rest)

    def token_logprobs() -> Call:
        x, token_ids = logits(), full(1, torch.int32)
        return lambda: ops.token_logprobs(x, token_ids, 5)

    yield Case("sample", f"{rows} × {vocab}, top-k 50, top-p 0.95", sample, rows * vocab * 4)
    yield Case("token_logprobs", f"{rows} × {vocab}, 5 best", token_logprobs, rows * vocab * 4)


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
