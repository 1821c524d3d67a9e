"""An engine's memory given back while nobody needs it, and taken again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fastattn.engine.runner import Runner
from fastattn.models.decoder import DecoderModel
from fastattn.models.registry import build_meta

TAGS = ("weights", "kv_cache")  # vLLM's names of what sleeps


class AsleepError(RuntimeError):
    """The engine sleeps, and takes no request until `wake_up`."""


class Bed:
    """Puts a runner to sleep, and wakes it.

    Level 1: weights go from a GPU into pinned host memory, and come back at the bus's speed; those of a CPU are where they would go,
    and stay. Level 2: weights are given up, and read from the model's files again. At both the KV cache is given up with what it
    holds, and CUDA graphs, which know addresses, are dropped and recorded anew when they are next needed.

    Memory is taken from under the tensors: a storage of 0 bytes is what the allocator gets back, and every parameter, view and
    slice of it stays the object that it was, in a new place after `wake_up`. Level 2 makes another model.

    level: 0 is awake. asleep: those of `TAGS` that are not there; who cannot wake up, for want of memory, sleeps on and may try
    again.
    """

    def __init__(self, runner: Runner, reload: Callable[[], DecoderModel] | None = None) -> None:
        """reload: reads the weights again, for level 2."""
        self._runner, self._reload = runner, reload
        self._parked: list[tuple[torch.UntypedStorage, torch.Tensor]] = []
        self.level = 0
        self.asleep: tuple[str, ...] = ()

    def check(self, level: int) -> None:
        """Raises ValueError for a level that there is not, AsleepError if it sleeps already."""
        allowed = (1, 2) if self._reload is not None else (1,)
        if isinstance(level, bool) or level not in allowed:
            raise ValueError(f"sleep: level is {level!r}, allowed is {' or '.join(map(str, allowed))}")
        if self.level:
            raise AsleepError(f"sleep: the engine sleeps already, at level {self.level}")

    def sleep(self, level: int) -> None:
        """Raises what `check` does, and RuntimeError, awake, if the host has too little memory."""
        self.check(level)
        runner, on_gpu = self._runner, self._runner.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(runner.device)  # a step may still be under way
        if runner.graphs is not None:
            runner.graphs.drop()
        if level == 1 and on_gpu:
            self._park()
        runner.kv_memory.release()
        if level == 2:
            runner.model = build_meta(runner.model.config, 1)
        if on_gpu:
            torch.cuda.empty_cache()
        self.level, self.asleep = level, TAGS

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """tags: which of `TAGS`; without any, all. Raises ValueError for another, and if it does not sleep."""
        wrong = next((tag for tag in tags or () if tag not in TAGS), None)
        if wrong is not None:
            raise ValueError(f"wake_up: tags has {wrong!r}, allowed are {' and '.join(map(repr, TAGS))}")
        if not self.level:
            raise ValueError("wake_up: the engine does not sleep")
        for tag in self.asleep:
            if not tags or tag in tags:
                self._restore_weights() if tag == "weights" else self._runner.kv_memory.restore()
                self.asleep = tuple(other for other in self.asleep if other != tag)
        if not self.asleep:
            self.level = 0

    def _restore_weights(self) -> None:
        if self.level == 2:
            assert self._reload is not None
            self._runner.model = self._reload()
        for storage, host in self._parked:
            storage.resize_(host.numel())
            _bytes(storage).copy_(host, non_blocking=True)
        if self._parked:
            torch.cuda.synchronize(self._runner.device)  # before the host's memory is given up
        self._parked = []

    def _park(self) -> None:
        model = self._runner.model
        storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers()) if t.numel()]
        parked: list[tuple[torch.UntypedStorage, torch.Tensor]] = []
        for storage in {s.data_ptr(): s for s in storages}.values():
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=True)
            parked.append((storage, host.copy_(_bytes(storage), non_blocking=True)))
        torch.cuda.synchronize(self._runner.device)
        self._parked = parked
        for storage, _ in parked:
            storage.resize_(0)


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
