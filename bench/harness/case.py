"""One line of a report: our call, what it must give, and the calls that it is measured beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from bench.harness import accuracy
from bench.harness.ceilings import Work
from bench.harness.timing import Call
from tests.harness.opspec import fresh

T = TypeVar("T")
PeerBuilder = Callable[
    [], Call
]  # prepares a peer on inputs of its own; its call returns what `Checked.exact` is, or None


@dataclass(frozen=True)
class Checked:
    """share: our worst error over what is allowed. exact: what a peer's result must be near to; None: not comparable."""

    share: float
    exact: Tensor | None = None


@dataclass(frozen=True)
class Case:
    """ours: one call on inputs that are on the device already. check: raises WrongResultError. target: the ratio to the best
    peer that the issue asks for, where targets.toml has no such family."""

    ours: Call
    check: Callable[[], Checked]
    peers: Mapping[str, PeerBuilder]
    work: Work
    config: str
    target: float | None = None


@dataclass
class Context:
    """One run of a family. ids: its cases. `shared` holds what several of them use: a loaded model, say."""

    device: torch.device
    quick: bool = False
    ids: tuple[str, ...] = ()
    shared: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], T]) -> T:
        if name not in self.shared:
            self.shared[name] = make()
        made: T = self.shared[name]
        return made

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)


@dataclass(frozen=True)
class CaseSpec:
    """A case that is not built yet: building allocates its inputs. quick: belongs to the short run too."""

    id: str
    build: Callable[[Context], Case]
    quick: bool = False


@dataclass(frozen=True)
class Family:
    """timer: device time of one call; host time of a whole workload (`rounds` of them, quick: one); the calling
    thread's own time, which other programs do not count in; or what calls say that they
    took in a process of their own."""

    name: str
    device: Literal["cpu", "cuda"]
    about: str
    specs: tuple[CaseSpec, ...]
    timer: Literal["graph", "wall", "thread", "recorded"] = "graph"
    rounds: int = 2


def op_case(
    op: Callable[..., Any],
    call: dict[str, Any],
    formula: Callable[..., list[Tensor]],
    *,
    peers: Mapping[str, PeerBuilder],
    work: Work,
    config: str,
    mutates: tuple[str, ...] = (),
    judge: Callable[[dict[str, Any], list[Tensor]], Checked] | None = None,
) -> Case:
    """A case of an operator.

    call: argument name → value. formula(dtype to compute in, **call): the results, then the arguments in `mutates`.
    judge: instead of the formula, where many answers are right.
    """
    timed = fresh(call)

    def check() -> Checked:
        results = _results(op, fresh(call), mutates)
        for t in results[: len(results) - len(mutates)]:
            # The allocator hands this memory out again: what the second call does not write stays poison.
            t.fill_(float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max)
        del results
        results = _results(op, fresh(call), mutates)
        if judge is not None:
            return judge(call, results)
        dtype = next(v.dtype for v in call.values() if isinstance(v, Tensor) and v.is_floating_point())
        on_gpu = results[0].device.type == "cuda"
        # fp64 on large inputs costs a GPU seconds, and fp32 is exact enough to judge 16-bit results.
        exact = formula(torch.float32 if on_gpu and dtype.itemsize < 4 else torch.float64, **fresh(call))
        return Checked(accuracy.check_results(op.__name__, results, exact, formula(dtype, **fresh(call))), exact[0])

    return Case(lambda: op(**timed), check, peers, work, config)


def _results(op: Callable[..., Any], call: dict[str, Any], mutates: tuple[str, ...]) -> list[Tensor]:
    out = op(**call)
    results = [] if out is None else [out] if isinstance(out, Tensor) else list(out)
    if results and results[0].device.type == "cuda":
        torch.cuda.synchronize(results[0].device)  # an error in the kernel is this case's, not the next one's
    return results + [call[name] for name in mutates]
