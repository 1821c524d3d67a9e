"""What ties the ranks of a group together on one machine. Nothing of it has a name that could be left behind.

    rank 0 ──socket── rank 1     a socket each: set-up as JSON, then one `Step` a step, answered when its inputs were read
       │  └──socket── rank 2     the end of a process ends its socket, whatever the process died of
       ├── memory: step buffer   written by rank 0, read by all
       └── memory: board         a record for each rank: steps and exchanges begun so far, and why it failed

Memory is Linux' memfd, passed over the sockets; torch's rendezvous is a file in a third one. Messages are fixed structs, bytes
and JSON: nothing that is received is ever run.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import mmap
import os
import resource
import socket
import struct
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch._C._distributed_c10d import FileStore

from fastattn.engine.host_memory import pin
from fastattn.nn import TensorParallel

# Below what any socket takes at a time (212,992 bytes, if nobody set another limit). A step has 16 bytes for each block that is copied,
# and a long prompt that comes back from the host's memory has tens of thousands.
_PACKET = 1 << 16
_RECORD = struct.Struct("<qB1015s")
_FAILED, _FAILED_IN_EXCHANGE = 1, 2
_HIGH_FD, _HIGH_FDS = 4096, 64  # descriptors below this and the process's limit, the last of them for stores
_CONNECT, _FOREVER = timedelta(seconds=60), timedelta(days=365)
# torch's threads beside NCCL would end this process, minutes after an error or when giving NCCL up takes long. It is the
# user's; who is lost is ours to find and to say.
_NCCL_ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
    "TORCH_NCCL_BLOCKING_WAIT": "0",  # its waits cannot be captured
}


class LinkClosedError(ConnectionError):
    """The process at the other end has ended."""


class Link:
    """One end of the socket between rank 0 and another rank. A message arrives whole or not at all: in packets, each with a byte in
    front that says whether it is the last."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock

    @classmethod
    def pair(cls) -> tuple[Link, Link]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), cls(theirs)

    def send(self, message: bytes, fds: tuple[int, ...] = (), timeout: float | None = None) -> None:
        """fds: file descriptors that go with the message. timeout: for each packet of one that is longer than what the socket holds,
        and so waits for its reader. Raises LinkClosedError, TimeoutError."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.settimeout(timeout)
        try:
            for start in range(0, len(message), _PACKET):
                packet = message[start : start + _PACKET]
                is_last = start + _PACKET >= len(message)
                self.socket.sendmsg([bytes([is_last]), packet], rights if start == 0 else [], socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise LinkClosedError("the process at the other end has ended") from error
        finally:
            self.socket.settimeout(None)

    def receive(self, timeout: float | None = None, max_fds: int = 0) -> tuple[bytes, list[int]]:
        """The next message and the file descriptors that came with it. Raises LinkClosedError, TimeoutError."""
        packets: list[bytes] = []
        fds = array.array("i")
        self.socket.settimeout(timeout)
        try:
            while not packets or not packets[-1][0]:
                packet, ancillary, _, _ = self.socket.recvmsg(1 + _PACKET, socket.CMSG_SPACE(4 * max_fds))
                if not packet:
                    raise LinkClosedError("the process at the other end has ended")
                packets.append(packet)
                for _, _, data in ancillary:
                    fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        except ConnectionResetError as error:
            raise LinkClosedError("the process at the other end has ended") from error
        finally:
            self.socket.settimeout(None)
        return b"".join(packet[1:] for packet in packets), list(fds)

    def send_json(self, fds: tuple[int, ...] = (), **values: Any) -> None:
        self.send(json.dumps(values).encode(), fds)

    def receive_json(self, timeout: float | None = None, max_fds: int = 0) -> tuple[dict[str, Any], list[int]]:
        message, fds = self.receive(timeout, max_fds)
        return json.loads(message), fds

    def shut_down(self) -> None:
        """Tells the other end that this one has ended, also while another thread waits for the socket."""
        with contextlib.suppress(OSError):  # the other end was first
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.socket.close()


class SharedMemory:
    """Memory without a name: it is gone with the last process that has it open."""

    def __init__(self, fd: int, num_bytes: int | None = None) -> None:
        """num_bytes: of new memory; None opens what is there."""
        self.fd = fd
        if num_bytes is not None:
            os.ftruncate(fd, num_bytes)
        self.map = mmap.mmap(fd, 0)

    @classmethod
    def create(cls, num_bytes: int) -> SharedMemory:
        return cls(os.memfd_create("fastattn", os.MFD_CLOEXEC), num_bytes)

    def tensor(self, device: torch.device) -> torch.Tensor:
        """All of it, as bytes; for a CUDA device pinned, so that copies to it need no detour."""
        whole = torch.frombuffer(self.map, dtype=torch.uint8)
        if device.type == "cuda":
            pin(whole)
        return whole


class Board:
    """A record for each rank in shared memory; each writes its own, and rank 0 reads all, whatever state they are in."""

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory

    @classmethod
    def create(cls, num_ranks: int) -> Board:
        return cls(SharedMemory.create(_RECORD.size * num_ranks))

    @property
    def fd(self) -> int:
        return self._memory.fd

    def begin(self, rank: int) -> None:
        (count,) = struct.unpack_from("<q", self._memory.map, rank * _RECORD.size)
        struct.pack_into("<q", self._memory.map, rank * _RECORD.size, count + 1)

    def fail(self, rank: int, text: str, in_exchange: bool) -> None:
        """in_exchange: only because another rank ended or is late."""
        kind = _FAILED_IN_EXCHANGE if in_exchange else _FAILED
        _RECORD.pack_into(self._memory.map, rank * _RECORD.size, self.begun(rank), kind, text.encode()[:1015])

    def begun(self, rank: int) -> int:
        count: int = _RECORD.unpack_from(self._memory.map, rank * _RECORD.size)[0]
        return count

    def failure(self, rank: int) -> tuple[str, bool] | None:
        """(text, in_exchange) of a rank that failed."""
        _, kind, text = _RECORD.unpack_from(self._memory.map, rank * _RECORD.size)
        return (text.rstrip(b"\0").decode(errors="replace"), kind == _FAILED_IN_EXCHANGE) if kind else None


def connect(
    store_fd: int,
    rank: int,
    size: int,
    device: torch.device,
    on_exchange: Callable[[], None],
    limit_seconds: float | None = None,
) -> TensorParallel:
    """This rank's exchange with the others: NCCL between GPUs, gloo over loopback between CPUs. Waits for all of them.

    store_fd: an empty memfd that all of them have open, where they find each other's addresses.
    limit_seconds: how long an exchange on the CPU may wait for a rank. None: for ever; rank 0 watches for all.
    """
    # When the store goes it opens its path again, and would never come back from a file that is not its own. So its number
    # is one that no other file gets (the kernel gives the lowest that is free), and it is closed just before the group goes.
    top = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], _HIGH_FD) - _HIGH_FDS
    own_fd = fcntl.fcntl(store_fd, fcntl.F_DUPFD_CLOEXEC, max(top, 3))
    store = FileStore(f"/proc/self/fd/{own_fd}", size)
    torch_groups: Any = distributed  # whose type stubs differ from what is there
    if device.type == "cuda":
        torch.cuda.set_device(device)
        nccl = torch_groups.ProcessGroupNCCL.Options()
        nccl._timeout = _FOREVER  # torch's own watchdog would end this process; ours ends the group with a message
        with _environment(_NCCL_ENVIRONMENT):  # read when a group is made
            group = torch_groups.ProcessGroupNCCL(store, rank, size, nccl)
    else:
        gloo = torch_groups.ProcessGroupGloo._Options()
        gloo._devices = [torch_groups.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        gloo._timeout = _CONNECT
        group = torch_groups.ProcessGroupGloo(store, rank, size, gloo)
    weakref.finalize(group, os.close, own_fd)
    tp = TensorParallel(rank, size, group, on_exchange)
    tp.all_reduce(torch.zeros(1, device=device))  # the first one makes the connections
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    else:
        group.set_timeout(_FOREVER if limit_seconds is None else timedelta(seconds=limit_seconds))
    return tp


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
