"""Ranks as threads of one process: the same messages, shared step memory and gloo, without the seconds that a process takes to
start. How processes are started and end is `test_ranks.py`'s."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed

from fastattn.engine.batch import Step, step_builder
from fastattn.engine.config import EngineConfig
from fastattn.engine.engine import Engine
from fastattn.engine.runner import Runner
from fastattn.models.decoder import DecoderModel
from fastattn.models.loader import ModelSource
from fastattn.models.registry import load_model
from fastattn.nn import TensorParallel
from tests.engine.tiny import PaddedDecodes, make_speculator

T = TypeVar("T")
CPU = torch.device("cpu")


class ThreadRanks:
    """In the place of `fastattn.engine.ranks.RankGroup`."""

    def __init__(self, source: ModelSource, size: int, padded: bool = False) -> None:
        """padded: decode steps are what they are with CUDA graphs."""
        self.size, self._padded = size, padded
        self._store = distributed.HashStore()
        self._source = source
        self._inbox: list[queue.Queue[bytes | None]] = [queue.Queue() for _ in range(size)]
        self._outbox: list[queue.Queue[BaseException | None]] = [queue.Queue() for _ in range(size)]
        self._threads: list[threading.Thread] = []
        self.runners: list[Runner] = []

    def start(self, config: EngineConfig, draft: DecoderModel | None = None) -> Engine:
        """draft: the draft model of speculation, which rank 0 has to itself."""
        memory = torch.zeros(step_builder(config).nbytes, dtype=torch.uint8)
        self._threads = [
            threading.Thread(target=self._follow, args=(rank, config, memory), daemon=True)
            for rank in range(1, self.size)
        ]
        for thread in self._threads:
            thread.start()
        runner = self._runner(0, config, memory)
        for rank in range(1, self.size):
            assert self._outbox[rank].get(timeout=60) is None
        speculator = make_speculator(config, runner.model, draft)
        return Engine(runner, config, self._source.tokenizer(), speculator)

    def _runner(self, rank: int, config: EngineConfig, memory: torch.Tensor) -> Runner:
        groups: Any = distributed
        options = groups.ProcessGroupGloo._Options()
        options._devices = [groups.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        tp = TensorParallel(rank, self.size, groups.ProcessGroupGloo(self._store, rank, self.size, options))
        network = load_model(self._source, CPU, torch.float32, config.max_model_len, tp=tp)
        ranks: Any = None if rank else self
        runner = Runner(network, config, CPU, torch.float32, step_memory=memory, ranks=ranks)
        if self._padded:
            runner.graphs = PaddedDecodes(runner)
        return runner

    def _follow(self, rank: int, config: EngineConfig, memory: torch.Tensor) -> None:
        try:
            runner = self._runner(rank, config, memory)
            self.runners.append(runner)
            self._outbox[rank].put(None)
            while (message := self._inbox[rank].get()) is not None:
                runner.follow(message)
                self._outbox[rank].put(None)
        except BaseException as error:
            self._outbox[rank].put(error)

    def run(self, step: Step, compute: Callable[[], T]) -> T:
        for inbox in self._inbox[1:]:
            inbox.put(step.to_bytes())
        result = compute()
        for outbox in self._outbox[1:]:
            if (error := outbox.get(timeout=60)) is not None:
                raise error
        return result

    def check(self) -> None:
        """As the group's; threads do not end by themselves."""

    def close(self) -> None:
        for inbox in self._inbox[1:]:
            inbox.put(None)
        for thread in self._threads:
            thread.join(10)
