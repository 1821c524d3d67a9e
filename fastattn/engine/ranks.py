"""Rank 0's side of tensor parallelism: starts the other ranks, gives them each step, and ends all when one ends."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch

from fastattn.engine.batch import Step
from fastattn.engine.config import EngineConfig
from fastattn.engine.rank_link import Board, Link, LinkClosedError, SharedMemory, connect
from fastattn.nn import CollectiveError, TensorParallel

T = TypeVar("T")

# How long the reasons of all who noticed are waited for, so that the first cause is named and not who suffered from it.
_GRACE_SECONDS = 0.5
# Importing torch on a machine that has other work to do, and loading weights from a slow disk.
_START_SECONDS, _LOAD_SECONDS = 120.0, 1800.0
# Ranks that are told to end have the first to do so; one that was killed has the second, in which the kernel frees its device.
_LEAVE_SECONDS, _DIE_SECONDS = 3.0, 1.0
_BOOT = "import sys; sys.path[:] = sys.argv[1].split('\\n'); from fastattn.engine.rank import main; main(*sys.argv[2:])"


class RankError(RuntimeError):
    """A rank of a tensor-parallel group ended or is late. The group is gone, and the engine with it."""


@dataclass(frozen=True)
class Member:
    """Another rank: its socket, and its process where it is our child."""

    rank: int
    pid: int
    link: Link
    process: subprocess.Popen[bytes] | None

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid})"

    def ending(self) -> str | None:
        """How it ended; None while it runs."""
        if self.process is None:  # torchrun's child: it alone is told the exit code
            return None if _exists(self.pid) else "ended"
        code = self.process.poll()
        if code is None:
            return None
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"was killed by signal {-code} ({signal.Signals(-code).name})"
        return f"ended with exit code {code}"


class Watch:
    """Starts ranks 1 and up, has an eye on them, and gives the exchange with them up, in a thread of its own: the kernel ends
    a child when the thread that started it ends, and rank 0's other threads may be waiting for a rank that is gone."""

    def __init__(self, size: int, board: Board, sockets: Sequence[socket.socket] | None) -> None:
        """sockets: to ranks that torchrun started; None starts them."""
        self.size, self.board = size, board
        self.members: list[Member] = []
        self.abort: Callable[[], None] = lambda: None  # frees a thread that waits for a GPU that waits for a rank
        self.is_late: Callable[[], bool] = lambda: False  # asked now and then
        self._cause: str | None = None
        self._lock = threading.RLock()  # the garbage collector may stop a group from within
        self._awake, self._wake = os.pipe()
        self._started, self._aborted = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(sockets,), name="fastattn-ranks", daemon=True)
        self._start_errors: list[BaseException] = []
        self._thread.start()
        self._started.wait()
        for error in self._start_errors:
            self.stop()
            raise error

    def _run(self, sockets: Sequence[socket.socket] | None) -> None:
        try:
            for rank in range(1, self.size):
                self.members.append(_start(rank) if sockets is None else _adopt(rank, sockets[rank - 1]))
        except BaseException as error:
            self._start_errors.append(error)
        poll = select.poll()
        poll.register(self._awake, select.POLLIN)
        for member in self.members:
            poll.register(member.link.socket, select.POLLRDHUP)
        self._started.set()
        while True:
            events = poll.poll(200)
            if any(fd == self._awake for fd, _ in events):
                break
            if events or self.is_late():
                self.fall()
                break
        # Nobody waits for this without a limit: a rank that is alone with it may take long.
        try:
            self.abort()
        finally:
            self._aborted.set()
        # Ends with the group: not before, since the children end with this thread.
        while os.read(self._awake, 8):
            pass

    @property
    def cause(self) -> str | None:
        """Why the group fell; None while it stands."""
        return self._cause

    def fall(self, own_failure: str | None = None) -> str:
        """Finds the cause, ends all ranks, and says what it was. own_failure: what happened in rank 0, if it was that."""
        with self._lock:
            if self._cause is None:
                self._cause = own_failure or self._find_cause()
                os.write(self._wake, b"!")
                self._kill()
            return self._cause

    def _find_cause(self) -> str:
        deadline = time.monotonic() + _GRACE_SECONDS
        victims = ""
        while time.monotonic() < deadline:
            for member in self.members:
                failure, ending = self.board.failure(member.rank), member.ending()
                if failure is not None and not failure[1]:
                    return f"{member} failed: {failure[0]}"
                if failure is None and ending is not None:
                    return f"{member} {ending}"
                if failure is not None:
                    victims = f"{member} failed: {failure[0]}"
            time.sleep(0.01)
        begun = [self.board.begun(rank) for rank in range(self.size)]
        late = [str(member) for member in self.members if begun[member.rank] < max(begun)]
        if late:
            return f"{' and '.join(late)} did not answer in time"
        return victims or "the ranks did not finish a step in time, though each had begun all of it"

    def _kill(self) -> None:
        for member in self.members:
            with contextlib.suppress(ProcessLookupError):
                if member.process is not None:
                    member.process.kill()
                elif _exists(member.pid):
                    os.kill(member.pid, signal.SIGKILL)
        self._wait_for_ends(time.monotonic() + _DIE_SECONDS)

    def _wait_for_ends(self, deadline: float) -> None:
        while time.monotonic() < deadline and any(member.ending() is None for member in self.members):
            time.sleep(0.005)

    def stop(self) -> None:
        """Lets the ranks end by themselves, and ends those that do not. May be called again."""
        with self._lock:
            if self._wake < 0:
                return
            wake, self._wake = self._wake, -1
            self._cause = self._cause or "the group was closed"
        for member in self.members:
            member.link.close()
        # All ranks give their connections up at the same time: one that is alone with it tries for long to reach the others.
        os.write(wake, b"!")
        deadline = time.monotonic() + _LEAVE_SECONDS
        self._wait_for_ends(deadline)
        self._kill()
        if self._thread is not threading.current_thread():  # the garbage collector runs in any
            self._aborted.wait(max(0.0, deadline - time.monotonic()))
        os.close(wake)
        if self._aborted.is_set() and self._thread is not threading.current_thread():
            self._thread.join()
            os.close(self._awake)


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

    def set_up(self, source: str, dtype: torch.dtype) -> list[tuple[int, int]]:
        """Tells each rank who it is and what it will load. Returns free and total bytes of each one's device."""
        with self._guarded():
            for member in self.members:
                member.link.send_json(
                    (self._board.fd, self._store_fd),
                    rank=member.rank,
                    size=self.size,
                    source=source,
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
                member.link.send(message)
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
        self._limit = limit_seconds
        self._since: float | None = None
        self._end: torch.cuda.Event | None = None

    def __enter__(self) -> None:
        self._end, self._since = None, time.monotonic()

    def __exit__(self, *_: object) -> None:
        end = torch.cuda.Event()  # type: ignore[no-untyped-call]
        end.record()
        self._end = end

    def is_late(self) -> bool:
        since, end = self._since, self._end
        return since is not None and time.monotonic() - since > self._limit and not (end is not None and end.query())  # type: ignore[no-untyped-call]


def _finish(watch: Watch, num_threads: int, fds: list[int]) -> None:
    watch.stop()
    _close(fds)
    torch.set_num_threads(num_threads)


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def _start(rank: int) -> Member:
    """A child with its end of a socket. It gets our module path, and imports nothing of the program that we are part of."""
    ours, theirs = Link.pair()
    fd = theirs.socket.fileno()
    path = "\n".join([str(Path(__file__).parents[2]), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", _BOOT, path, str(fd), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        pass_fds=(fd,),
        start_new_session=True,  # Ctrl-C is for rank 0
    )
    theirs.close()
    return Member(rank, process.pid, ours, process)


def _adopt(rank: int, sock: socket.socket) -> Member:
    """A process of torchrun's that has called us."""
    pid = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4), sys.byteorder)
    return Member(rank, pid, Link(sock), None)


def _exists(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")
