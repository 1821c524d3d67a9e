"""Rank 0's side of tensor parallelism: gives the other ranks each step, and says what went wrong when one is lost."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict
from typing import TypeVar

import torch

from fastattn.engine.batch import Step
from fastattn.engine.config import EngineConfig
from fastattn.engine.rank_link import Board, LinkClosedError, SharedMemory, connect
from fastattn.engine.rank_watch import Member, Watch
from fastattn.nn import CollectiveError, TensorParallel

T = TypeVar("T")

# Importing torch on a machine that has other work to do, and loading weights from a slow disk.
_START_SECONDS, _LOAD_SECONDS = 120.0, 1800.0


class RankError(RuntimeError):
    """A rank of a tensor-parallel group ended or is late. The group is gone, and the engine with it."""


class RankGroup:
    """The other ranks, as rank 0's set-up and runner see them.

    limit_seconds: how long a rank may keep the others waiting: on CPUs in an exchange, on GPUs in a step, since what waits
    there is a stream.
    """

    def __init__(
        self, size: int, device: torch.device, limit_seconds: float, sockets: Sequence[socket.socket] | None = None
    ) -> None:
        self.size, self.device, self._limit = size, device, limit_seconds
        self._board = Board.create(size)
        self._store_fd = os.memfd_create("fastattn", os.MFD_CLOEXEC)
        self._fds = [self._board.fd, self._store_fd]  # until the other ranks have opened what they stand for
        self._watch = Watch(size, self._board, sockets)
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // size))
        # Also when nobody closes an engine that is no longer used, and when Python ends.
        self._finalizer = weakref.finalize(self, _finish, self._watch, threads, self._fds)

    @property
    def members(self) -> Sequence[Member]:
        return self._watch.members

    def set_up(self, source: str, dtype: torch.dtype, quantization: str | None = None) -> list[tuple[int, int]]:
        """Tells each rank who it is and what it will load. Returns free and total bytes of each one's device."""
        with self._guarded():
            for member in self.members:
                member.link.send_json(
                    (self._board.fd, self._store_fd),
                    rank=member.rank,
                    size=self.size,
                    source=source,
                    quantization=quantization,
                    device=self.device.type if self.device.type == "cpu" else f"{self.device.type}:{member.rank}",
                    dtype=str(dtype).removeprefix("torch."),
                    num_threads=torch.get_num_threads(),
                )
            answers = [member.link.receive_json(_START_SECONDS)[0] for member in self.members]
        return [(answer["free"], answer["total"]) for answer in answers]

    def load(self, config: EngineConfig, step_bytes: int) -> tuple[TensorParallel, torch.Tensor]:
        """Connects the ranks and has each load its part. Returns rank 0's place and the step memory that all ranks see."""
        memory = SharedMemory.create(step_bytes)
        self._fds.append(memory.fd)
        with self._guarded():
            for member in self.members:
                member.link.send_json((memory.fd,), config=asdict(config))
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # of this thread, which launches the steps
            limit = self._limit if self.device.type == "cpu" else None
            board = self._board
            tp = self._unless_it_falls(
                lambda: connect(self._store_fd, 0, self.size, self.device, lambda: board.begin(0), limit)
            )
            if self.device.type == "cuda":
                self._late = _LateStep(self._limit)
                self._watch.is_late, self._watch.abort = self._late.is_late, tp.abort
            return tp, memory.tensor(self.device)

    def _unless_it_falls(self, call: Callable[[], T]) -> T:
        """A call that waits for ranks, in a thread that is left behind if it waits for one that is gone or late: nothing
        frees it while NCCL makes its connections."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="fastattn-connect", daemon=True).start()
        deadline = time.monotonic() + _START_SECONDS
        while not wait([future], 0.1).done:
            if self._watch.cause is not None or time.monotonic() > deadline:
                raise TimeoutError("a rank does not answer")
        return future.result()

    def wait_until_loaded(self) -> None:
        with self._guarded():
            for member in self.members:
                member.link.receive(_LOAD_SECONDS)
        _close(self._fds)

    def run(self, step: Step, compute: Callable[[], T]) -> T:
        """Has every rank compute the step that lies in the step memory; ``compute`` is rank 0's part.

        Raises RankError if any rank cannot: the ranks are no longer at the same place then, so the group has ended.
        """
        with self._guarded():
            message = step.to_bytes()
            self._board.begin(0)
            for member in self.members:
                member.link.send(message, timeout=self._limit)
            with self._late if self.device.type == "cuda" else contextlib.nullcontext():
                result = compute()
            for member in self.members:  # each has read its inputs: the step memory may be written again
                member.link.receive(self._limit)
            return result

    def check(self) -> None:
        """Raises RankError if the group is gone."""
        if self._watch.cause is not None:
            raise RankError(self._message(self._watch.fall()))

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Work that needs all ranks: what goes wrong in it ends the group, with the first cause as the message."""
        try:
            yield
        except RankError:
            raise
        except (CollectiveError, LinkClosedError, TimeoutError) as error:
            raise RankError(self._message(self._watch.fall())) from error
        except BaseException as error:
            cause = self._watch.fall(f"rank 0 failed: {type(error).__name__}: {error}".removesuffix(": "))
            if not isinstance(error, Exception):  # Ctrl-C, after which rank 0 is no longer where the others are
                raise
            raise RankError(self._message(cause)) from error

    def _message(self, cause: str) -> str:
        return f"tensor parallelism over {self.size} ranks has ended: {cause}"

    def close(self) -> None:
        """Ends the other ranks. May be called again."""
        self._finalizer()


class _LateStep:
    """Whether a step on the GPU has taken too long. As a context: around its launch."""

    def __init__(self, limit_seconds: float) -> None:
        self._limit, self._begun = limit_seconds, 0.0
        self._step: tuple[float, torch.cuda.Event | None] | None = (
            None  # when it began, its end; None when it has ended
        )

    def __enter__(self) -> None:
        self._begun = time.monotonic()
        self._step = self._begun, None

    def __exit__(self, *_: object) -> None:
        end = torch.cuda.Event()  # type: ignore[no-untyped-call]
        end.record()
        self._step = self._begun, end

    def is_late(self) -> bool:
        """Any thread may ask. What has ended is not asked again: a query would spoil a capture of the user's own."""
        step = self._step
        if step is None or time.monotonic() - step[0] <= self._limit:
            return False
        if step[1] is None or not step[1].query():  # type: ignore[no-untyped-call]
            return True
        if self._step is step:
            self._step = None
        return False


def _finish(watch: Watch, num_threads: int, fds: list[int]) -> None:
    watch.stop()
    _close(fds)
    torch.set_num_threads(num_threads)


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
