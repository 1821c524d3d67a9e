"""An engine's memory given back while nobody needs it, and taken again."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastattn.engine.runner import Runner
from fastattn.models.decoder import DecoderModel
from fastattn.models.registry import build_meta


class AsleepError(RuntimeError):
    """The engine sleeps, and takes no request until `wake_up`."""


class Bed:
    """Puts a runner to sleep, and wakes it.

    Level 1: weights go from a GPU into pinned host memory, and come back at the bus's speed; those of a CPU are where they would go,
    and stay. Level 2: weights are given up, and read from the model's files again. At both the KV cache is given up with what it
    holds, and CUDA graphs, which know addresses, are dropped and recorded anew when they are next needed.

    Memory is taken from under the tensors: a storage of 0 bytes is what the allocator gets back, and every parameter, view and
    slice of it stays the object that it was, in a new place after `wake_up`. Level 2 makes another model.
    """

    def __init__(self, runner: Runner, reload: Callable[[], DecoderModel] | None = None) -> None:
        """reload: reads the weights again, for level 2."""
        self._runner, self._reload = runner, reload
        self._parked: list[tuple[torch.UntypedStorage, torch.Tensor]] = []
        self.level = 0  # awake

    def sleep(self, level: int) -> None:
        """Raises ValueError for a level that there is not, AsleepError if it sleeps already."""
        allowed = (1, 2) if self._reload is not None else (1,)
        if isinstance(level, bool) or level not in allowed:
            raise ValueError(f"sleep: level is {level!r}, allowed is {' or '.join(map(str, allowed))}")
        if self.level:
            raise AsleepError(f"sleep: the engine sleeps already, at level {self.level}")
        runner, on_gpu = self._runner, self._runner.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(runner.device)  # a step may still be under way
        if runner.graphs is not None:
            runner.graphs.drop()
        runner.kv_memory.release()
        if level == 2:
            runner.model = build_meta(runner.model.config, 1)
        elif on_gpu:
            self._park()
        if on_gpu:
            torch.cuda.empty_cache()
        self.level = level

    def wake_up(self) -> None:
        """Raises ValueError if it does not sleep."""
        if not self.level:
            raise ValueError("wake_up: the engine does not sleep")
        if self.level == 2:
            assert self._reload is not None
            self._runner.model = self._reload()
        for storage, host in self._parked:
            storage.resize_(host.numel())
            _bytes(storage).copy_(host, non_blocking=True)
        if self._parked:
            torch.cuda.synchronize(self._runner.device)  # before the host's memory is given up
        self._parked = []
        self._runner.kv_memory.restore()
        self.level = 0

    def _park(self) -> None:
        model = self._runner.model
        storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers()) if t.numel()]
        for storage in {s.data_ptr(): s for s in storages}.values():
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=True)
            self._parked.append((storage, host.copy_(_bytes(storage), non_blocking=True)))
        torch.cuda.synchronize(self._runner.device)
        for storage, _ in self._parked:
            storage.resize_(0)


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
