"""What only a GPU can show of an operator: graph capture, streams, offsets beyond 2³¹, poisoned results."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.harness.compare import bits
from tests.harness.generators import Gen
from tests.harness.opspec import Call, OpSpec, fresh
from tests.harness.specs import SPECS

pytestmark = pytest.mark.gpu
each_op = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def calls_of(spec: OpSpec, seed: int) -> Iterator[tuple[str, Call]]:
    for dtype in spec.cuda_dtypes:
        for name, call in spec.calls(Gen("cuda", seed=seed), dtype):
            yield f"{spec.name} {dtype} {name}", call


def refill(call: Call, values: Call) -> None:
    """Writes the tensors of `values` into those of `call`, on the current stream."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            call[name].copy_(value)


def assert_same_bits(results: list[Tensor], expected: list[Tensor], what: str) -> None:
    for i, (a, b) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(bits(a), bits(b)), f"{what}, result {i}"


def poison(call: Call) -> Call:
    """The same call with values that no result may come from; integers stay, for they are addresses."""
    return fresh(call, lambda t: torch.full_like(t, math.nan) if t.is_floating_point() else t.clone())


@each_op
def test_graph_capture(spec: OpSpec) -> None:
    """A replay computes with what the arguments hold then, not with what they held at the capture."""
    for what, call in calls_of(spec, seed=21):
        expected = spec.run(fresh(call))
        static = poison(call)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            spec.run(static)  # loads the module, which a capture must not
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = spec.run(static)
        for _ in range(2):
            refill(static, call)
            graph.replay()
            assert_same_bits(results, expected, what)


@each_op
def test_runs_on_the_current_stream(spec: OpSpec) -> None:
    """The arguments are written on a side stream that is kept busy: a kernel on another stream would read too early."""
    stream = torch.cuda.Stream()
    for index, (what, call) in enumerate(calls_of(spec, seed=22)):
        if index % 4:
            continue
        expected = spec.run(fresh(call))
        late = poison(call)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # about 10 ms
            refill(late, call)
            results = spec.run(late)
        stream.synchronize()
        assert_same_bits(results, expected, what)


def far(t: Tensor) -> Tensor:
    """The same values, with the last row of the first dimension more than 2³¹ elements behind the first."""
    if t.dim() < 2 or t.shape[0] < 2 or t.numel() == 0:
        return t
    step = max(math.ceil(2**31 / (t.shape[0] - 1) / 64) * 64, t[0].numel())
    inner = t.contiguous().stride()[1:]
    memory = torch.empty(step * (t.shape[0] - 1) + t[0].numel(), dtype=t.dtype, device=t.device)
    return memory.as_strided(t.shape, (step, *inner)).copy_(t)


@each_op
def test_offsets_beyond_two_to_the_31(spec: OpSpec) -> None:
    """One argument after the other is laid over more than 2³¹ elements, in the first calls of each kernel, and of prompts."""
    seen: Counter[object] = Counter()
    for name, call in spec.calls(Gen("cuda", seed=23), spec.cuda_dtypes[0]):
        kind = call.get("kernel"), "prefill" in name
        seen[kind] += 1
        if seen[kind] > 4:
            continue
        expected = spec.run(fresh(call))
        for key, value in call.items():
            if isinstance(value, Tensor) and (spread := far(value)) is not value:
                results = spec.run(fresh(call) | {key: spread})
                assert_same_bits(results, expected, f"{spec.name} {name}, {key} far apart")
                del results, spread
                torch.cuda.empty_cache()


@each_op
def test_every_element_of_a_result_is_written(spec: OpSpec) -> None:
    """Results come from memory that held NaN, and are the same as those from memory that held zeros."""
    for what, call in calls_of(spec, seed=24):
        first = spec.run(fresh(call))
        expected = [t.clone() for t in first]
        for t in first[: len(first) - len(spec.mutates)]:
            t.fill_(math.nan if t.is_floating_point() else torch.iinfo(t.dtype).max)
        first = t = None  # the allocator gives the same memory out again
        assert_same_bits(spec.run(fresh(call)), expected, what)


@each_op
def test_a_bad_call_leaves_the_device_alive(spec: OpSpec) -> None:
    """After a refused call the same call, corrected, gives what it always gave."""
    name, call = next(iter(spec.calls(Gen("cuda", seed=25), spec.cuda_dtypes[0])))
    expected = spec.run(fresh(call))
    first = next(key for key, value in call.items() if isinstance(value, Tensor))
    with pytest.raises((ValueError, TypeError), match=first):
        spec.fn(**fresh(call) | {first: call[first].double()})
    assert_same_bits(spec.run(fresh(call)), expected, f"{spec.name} {name}")
