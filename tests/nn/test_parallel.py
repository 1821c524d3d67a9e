"""How a group is given up: NCCL ends what runs at once, and then waits for the graphs that its kernels are in."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from fastattn.nn import TensorParallel
from fastattn.nn.parallel import CollectiveError


class CapturedGroup:
    """As NCCL with a graph: ``abort`` returns when the graph is gone, and no sooner."""

    def __init__(self) -> None:
        self.began, self.dropped = threading.Event(), threading.Event()

    def abort(self) -> None:
        self.began.set()
        assert self.dropped.wait(10)

    def allreduce(self, _: torch.Tensor) -> Any:
        raise RuntimeError("the group was aborted")

    def gather(self, *_: Any) -> Any:
        raise AssertionError

    def drop(self) -> None:
        assert self.began.is_set()  # a graph that still runs may wait for a rank that is gone
        self.dropped.set()


@pytest.mark.timeout(30)
def test_graphs_go_before_the_group() -> None:
    group = CapturedGroup()
    tp = TensorParallel(0, 2, group)
    tp.captured(group.drop)
    tp.abort()
    assert group.dropped.is_set()
    with pytest.raises(CollectiveError, match="rank 0: the group was aborted"):
        tp.all_reduce(torch.zeros(1))


@pytest.mark.timeout(30)
def test_graphs_go_before_the_group_when_python_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    group = CapturedGroup()
    tp = TensorParallel(0, 2, group)
    tp.captured(group.dropped.set)
    monkeypatch.setattr(threading.Thread, "start", refuses)
    tp.abort()
    assert group.began.is_set()


def test_one_rank_alone_holds_no_graphs() -> None:
    """It is shared by all models of the process."""
    tp = TensorParallel()
    tp.captured(lambda: pytest.fail("not captured with an exchange"))
    tp.abort()
