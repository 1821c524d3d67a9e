"""CUDA graphs of decode steps, captured when a batch size is first met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastattn.engine.batch import Batch


@dataclass(frozen=True)
class DecodeGraph:
    """One captured step for ``num_seqs`` sequences of one token each; reads the step buffers, writes ``logits``."""

    num_seqs: int
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor  # (num_seqs, vocab_size) fp32, overwritten by each replay

    def replay(self) -> torch.Tensor:
        self.graph.replay()
        return self.logits


class DecodeGraphs:
    """Sizes go up in powers of two and then in steps of 32, so that padding costs little and few graphs exist.

    All share one memory pool: they run one after another and each step's intermediates die with it.
    """

    def __init__(self, forward: Callable[[Batch], torch.Tensor], max_num_seqs: int) -> None:
        self._forward = forward
        powers = [1, 2, 4, 8, 16]
        self.sizes = [s for s in powers + list(range(32, max_num_seqs, 32)) if s < max_num_seqs] + [max_num_seqs]
        self._graphs: dict[int, DecodeGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def size_for(self, num_seqs: int) -> int:
        """The smallest size that holds ``num_seqs`` sequences of one token each."""
        return next(s for s in self.sizes if s >= num_seqs)

    def __contains__(self, size: int) -> bool:
        return size in self._graphs

    def get(self, size: int) -> DecodeGraph:
        return self._graphs[size]

    def capture(self, batch: Batch) -> DecodeGraph:
        """Records a step of ``batch.num_seqs`` sequences. The batch may hold anything that is harmless to run."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward(batch)  # first calls load modules and libraries, which a capture must not
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread's CUDA call must not break our capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._forward(batch)
        self._graphs[batch.num_seqs] = DecodeGraph(batch.num_seqs, graph, logits)
        return self._graphs[batch.num_seqs]
