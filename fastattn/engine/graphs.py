"""CUDA graphs of decode steps, captured when a batch size is first met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastattn.engine.batch import Batch, BatchBuffers


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

    def __init__(self, forward: Callable[[Batch], torch.Tensor], buffers: BatchBuffers, max_num_seqs: int) -> None:
        self._forward, self._buffers = forward, buffers
        powers = [1, 2, 4, 8, 16]
        self.sizes = [s for s in powers + list(range(32, max_num_seqs, 32)) if s < max_num_seqs] + [max_num_seqs]
        self._graphs: dict[int, DecodeGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def find(self, num_seqs: int) -> DecodeGraph:
        """The smallest graph that holds ``num_seqs`` sequences of one token each."""
        size = next(s for s in self.sizes if s >= num_seqs)
        if size not in self._graphs:
            self._graphs[size] = self._capture(size)
        return self._graphs[size]

    def _capture(self, size: int) -> DecodeGraph:
        # The buffers may hold anything; a step of padding rows alone is harmless to run and to record.
        batch = self._buffers.fill([], [], pad_num_seqs=size)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward(batch)  # first calls load modules and libraries, which a capture must not
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread's CUDA call must not break our capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._forward(batch)
        return DecodeGraph(size, graph, logits)
