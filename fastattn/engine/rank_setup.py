"""Who is rank 0, and how the other ranks come to it: as its children, or as processes that torchrun started beside it."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import torch
from torch._C._distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from fastattn import config
from fastattn.engine.ranks import RankGroup
from fastattn.models.loader import ModelSource

_SOCKET_KEY = "fastattn/tensor_parallel/socket"
_START_SECONDS = 120.0


def start_ranks(size: int, source: ModelSource, device: torch.device, limit_seconds: float) -> RankGroup:
    """The group of ``size`` ranks, with this process as rank 0. On another rank of torchrun's this does not return: it serves
    rank 0 until that is done, and ends the process.

    Raises ValueError for what cannot work, RankError for a rank that does not start.
    """
    _check(size, source, device)
    device = torch.device("cuda", 0) if device.type == "cuda" else device  # NCCL wants to know which
    place = config.torchrun_place()
    if place is None or place[1] == 1:
        return RankGroup(size, device, limit_seconds)
    rank, world_size = place
    if world_size != size:
        raise ValueError(
            f"tensor_parallel_size is {size}, but torchrun started WORLD_SIZE = {world_size} processes: they must be equal"
        )
    store, _, _ = next(iter(rendezvous("env://", rank=rank, world_size=size)))
    if rank == 0:
        return RankGroup(size, device, limit_seconds, _accept(store, size))
    raise SystemExit(_join(store, rank))


def _check(size: int, source: ModelSource, device: torch.device) -> None:
    if device.type == "cuda":
        if ":" in str(device):
            raise ValueError(
                f"device is '{device}' with tensor_parallel_size {size}, allowed is 'cuda': one GPU a rank"
            )
        if size > torch.cuda.device_count():
            raise ValueError(f"tensor_parallel_size is {size}, but there are {torch.cuda.device_count()} CUDA devices")
    if not Path(source.name).exists():
        raise ValueError(
            f"tensor_parallel_size is {size}: each rank opens the model by its path, and {source.name!r} is none"
        )


def _accept(store: Store, size: int) -> list[socket.socket]:
    """Sockets to ranks 1 and up. The socket's name lives until they have come, in a folder that only this user may enter."""
    with (
        tempfile.TemporaryDirectory(prefix="fastattn-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door,
    ):
        path = str(Path(folder, "ranks"))
        door.bind(path)
        door.listen(size)
        door.settimeout(_START_SECONDS)
        store.set(_SOCKET_KEY, path)
        found: dict[int, socket.socket] = {}
        while len(found) < size - 1:
            sock, _ = door.accept()
            sock.settimeout(None)
            found[int.from_bytes(sock.recv(8), "little")] = sock
    return [found[rank] for rank in range(1, size)]


def _join(store: Store, rank: int) -> int:
    """Serves rank 0; returns the exit code of this process."""
    from fastattn.engine.rank import follow

    path = store.get(_SOCKET_KEY).decode()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(path)
    except FileNotFoundError:
        raise ValueError(f"rank {rank} is not on rank 0's machine: tensor parallelism runs on one") from None
    sock.send(rank.to_bytes(8, "little"))
    return follow(sock)
