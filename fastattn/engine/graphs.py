"""CUDA graphs of decode steps, captured when a batch size is first met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastattn.engine.batch import Batch


@dataclass(frozen=True)
class DecodeGraph:
    """One captured step of sequences with the same number of tokens; reads the step buffers, writes ``logits``."""

    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor  # (num_tokens, vocab_size) fp32, overwritten by each replay

    def replay(self) -> torch.Tensor:
        self.graph.replay()
        return self.logits


class DecodeGraphs:
    """Graphs by (number of sequences, tokens of each: one, and drafts to verify). Numbers of sequences go up in powers of two and then in steps of 32, so that padding costs little and few graphs exist.

    All share one memory pool: they run one after another and each step's intermediates die with it.
    """

    def __init__(self, forward: Callable[[Batch], torch.Tensor], max_num_seqs: int) -> None:
        self._forward = forward
        powers = [1, 2, 4, 8, 16]
        self.sizes = [s for s in powers + list(range(32, max_num_seqs, 32)) if s < max_num_seqs] + [max_num_seqs]
        self.captured: dict[tuple[int, int], DecodeGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def size_for(self, num_seqs: int) -> int:
        """The smallest number of sequences, of those that there are graphs for, that holds ``num_seqs``."""
        return next(s for s in self.sizes if s >= num_seqs)

    def __contains__(self, shape: tuple[int, int]) -> bool:
        return shape in self.captured

    def get(self, shape: tuple[int, int]) -> DecodeGraph:
        return self.captured[shape]

    def capture(self, batch: Batch) -> DecodeGraph:
        """Records a step of ``batch.num_seqs`` sequences of ``batch.attention.max_seqlen_q`` tokens. The batch may hold anything that is harmless to run."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward(batch)  # first calls load modules and libraries, which a capture must not
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread's CUDA call must not break our capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._forward(batch)
        shape = (batch.num_seqs, batch.attention.max_seqlen_q)
        self.captured[shape] = DecodeGraph(graph, logits)
        return self.captured[shape]
