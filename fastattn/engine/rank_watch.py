"""The processes of a group of ranks, as rank 0 sees them: started or adopted, watched, and ended together."""

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastattn.engine.rank_link import Board, Link

# How long the reasons of all who noticed are waited for, so that the first cause is named and not who suffered from it.
_GRACE_SECONDS = 0.5
# Ranks that are told to end have the first to do so; one that was killed has the second, in which the kernel frees its device.
_LEAVE_SECONDS, _DIE_SECONDS = 3.0, 1.0
_BOOT = "import sys; sys.path[:] = sys.argv[1].split('\\n'); from fastattn.engine.rank import main; main(*sys.argv[2:])"


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
