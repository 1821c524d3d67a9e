"""CUDA graphs of decode steps, captured when their shape is first met."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastattn.engine.batch import Batch
from fastattn.engine.decode_shapes import DecodeShape, DecodeShapes

logger = logging.getLogger("fastattn.engine")


@dataclass(frozen=True)
class DecodeGraph:
    """One captured step; reads the step buffers, writes ``result``."""

    graph: torch.cuda.CUDAGraph
    # Logits (num_tokens, vocab_size), of a greedy shape token ids (num_tokens) int32. Each replay of any graph may overwrite
    # them, as all share memory; what copies them is queued before the next one.
    result: torch.Tensor

    def replay(self) -> torch.Tensor:
        self.graph.replay()
        return self.result


class DecodeGraphs:
    """A graph for each shape of `DecodeShapes` that was met.

    All share one memory pool and one memory of logits: they run one after another and each step's results die with it.
    """

    def __init__(
        self, forward: Callable[[Batch, bool, torch.Tensor | None], torch.Tensor], shapes: DecodeShapes
    ) -> None:
        """forward: of a batch its token ids, if it is greedy, or its logits, in the given memory if there is one."""
        self._forward, self.shapes = forward, shapes
        self._graphs: dict[DecodeShape, DecodeGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._logits: torch.Tensor | None = None

    def __contains__(self, shape: DecodeShape) -> bool:
        return shape in self._graphs

    def get(self, shape: DecodeShape) -> DecodeGraph:
        return self._graphs[shape]

    @property
    def drop(self) -> Callable[[], None]:
        """Drops all graphs; holds them and nothing else of this object."""
        return self._graphs.clear

    def capture(self, shape: DecodeShape, batch: Batch) -> DecodeGraph:
        """Records a step of that shape. The batch may hold anything that is harmless to run."""
        start = time.perf_counter()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = self._forward(batch, shape.greedy, None)  # loads modules and libraries, which a capture must not
        torch.cuda.current_stream().wait_stream(stream)
        if self._logits is None and not shape.greedy:
            self._logits = result.new_empty((self.shapes.max_num_tokens, result.shape[1]))
        memory = None if shape.greedy or self._logits is None else self._logits[: shape.num_tokens]
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread's CUDA call must not break our capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = self._forward(batch, shape.greedy, memory)
        self._graphs[shape] = DecodeGraph(graph, result)
        logger.info("recorded a graph of %s in %.2f s", shape, time.perf_counter() - start)
        return self._graphs[shape]
