"""How stored numbers get from the pages of a file to where they belong."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch

# What is converted on the device at a time: its memory as stored.
_CONVERTED_BYTES = 128 << 20
# Handing a thread its work, and hearing that it is done, take it longer than copying a megabyte.
_PIECES_A_JOB = 4


class Copier:
    """At once, in the caller's thread. Tensors ``stored`` are on the host, and may be views of a mapped file."""

    def copy(self, out: torch.Tensor, stored: torch.Tensor) -> None:
        """Gives ``out``, of the same shape and of any dtype and device, the numbers of ``stored``."""
        out.copy_(stored)

    def bring(self, stored: torch.Tensor, device: torch.device) -> torch.Tensor:
        """``stored`` on a device, to be worked on there; itself where it is there already."""
        return stored.to(device)

    def wait(self) -> None:
        """Returns when everything is where it belongs, as far as work of the current stream can see."""


class ThreadedCopier(Copier):
    """To a GPU, by several threads: each reads into a pinned buffer of its own, which the GPU fetches while it fills another.

    One thread reads the page cache at a tenth of what the bus takes. Host memory is that of the buffers, two a thread, whatever the
    tensors' size. ``copy`` returns before the numbers are there; `wait` waits for them. What goes wrong in a thread is raised by a
    later call, and ends all.
    """

    def __init__(self, device: torch.device, num_threads: int = 8, buffer_bytes: int = 16 << 20) -> None:
        on_gpu = device.type == "cuda"
        self._device = torch.empty(0, device=device).device  # with its number, as tensors have it
        self._buffer_bytes = buffer_bytes
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        # One more, for the caller. The last that was given back is the first that is taken: few may be enough.
        self._free = [_Buffers(buffer_bytes, self._stream) for _ in range(num_threads + 1)]
        self._pool = ThreadPoolExecutor(num_threads, "fastattn-load")
        self._jobs: deque[Future[None]] = deque()
        self._most_jobs = 2 * num_threads  # more would only make the progress bar lie

    def copy(self, out: torch.Tensor, stored: torch.Tensor) -> None:
        if out.device != self._device or not stored.numel():
            out.copy_(stored)
        elif out.dtype == stored.dtype and out.is_contiguous():
            self._start(out, stored, _PIECES_A_JOB)
        else:  # converted there, a part at a time
            out, stored = (t.unsqueeze(0) if t.dim() == 0 else t for t in (out, stored))
            step = max(1, _CONVERTED_BYTES // stored[0].nbytes)
            for own, part in _split(out, stored, step):
                own.copy_(self.bring(part, self._device))

    def bring(self, stored: torch.Tensor, device: torch.device) -> torch.Tensor:
        out = torch.empty(stored.shape, dtype=stored.dtype, device=device)
        if device != self._device or not stored.numel():
            return out.copy_(stored)
        for job in self._start(out, stored, 1):  # it is waited for: as many threads as there are pieces
            job.result()
        self._order_after_copies()
        return out

    def wait(self) -> None:
        while self._jobs:
            self._jobs.popleft().result()
        self._order_after_copies()

    def close(self) -> None:
        """Ends the threads; what was not begun is dropped."""
        self._pool.shutdown(cancel_futures=True)
        self._order_after_copies()  # of those that are under way, even if their memory is given up now

    def _start(self, out: torch.Tensor, stored: torch.Tensor, pieces_a_job: int) -> list[Future[None]]:
        """Begins to copy, and returns what is to be waited for. What is small is copied at once, as another thread would take
        longer to wake up."""
        if self._stream is not None:  # the memory may have been another tensor's, whose work has not ended
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        pieces = list(_chunks(out, stored, self._buffer_bytes))
        if stored.nbytes <= self._buffer_bytes // 16:
            self._copy_pieces(pieces)
            return []
        jobs = []
        for first in range(0, len(pieces), pieces_a_job):
            while len(self._jobs) >= self._most_jobs:
                self._jobs.popleft().result()
            jobs.append(self._pool.submit(self._copy_pieces, pieces[first : first + pieces_a_job]))
            self._jobs.append(jobs[-1])
        return jobs

    def _copy_pieces(self, pieces: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        buffers = self._free.pop()
        try:
            for target, piece in pieces:
                buffers.send(target, piece)
        finally:
            self._free.append(buffers)

    def _order_after_copies(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


class _Buffers:
    """Pinned memory on the way to a GPU, in two halves, and when each may be written again. Without a stream: host memory on the
    way to other."""

    def __init__(self, nbytes: int, stream: torch.cuda.Stream | None) -> None:
        self._nbytes, self._stream = nbytes, stream
        self._halves: list[torch.Tensor] = []  # at the first use: pinning takes a while
        self._taken = [torch.cuda.Event() if stream is not None else None for _ in range(2)]  # type: ignore[no-untyped-call]

    def send(self, target: torch.Tensor, chunk: torch.Tensor) -> None:
        if not self._halves:
            self._halves += torch.empty(2, self._nbytes, dtype=torch.uint8, pin_memory=self._stream is not None)
        self._halves.reverse()
        self._taken.reverse()
        taken = self._taken[0]
        # Asked first: whoever waits lets other threads go on, and has to wait for them then.
        if taken is not None and not taken.query():  # type: ignore[no-untyped-call]
            taken.synchronize()
        memory = self._halves[0][: chunk.numel()].view(chunk.shape)
        # numpy's copy is this thread's alone and lets the others run; torch's would start threads of its own.
        np.copyto(memory.numpy(), chunk.numpy())
        if taken is None:
            target.copy_(memory)
            return
        with torch.cuda.stream(self._stream):
            target.copy_(memory, non_blocking=True)
            taken.record()


def _split(out: torch.Tensor, stored: torch.Tensor, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for first in range(0, stored.shape[0], step):
        yield out[first : first + step], stored[first : first + step]


def _chunks(out: torch.Tensor, stored: torch.Tensor, most_bytes: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both as bytes, cut into the same pieces of up to most_bytes: whole rows, or parts of them where they are longer."""
    if stored.is_contiguous():
        out, stored = out.reshape(-1), stored.reshape(-1)
    out, stored = out.view(torch.uint8), stored.view(torch.uint8)
    if (row_bytes := stored[0].numel()) > most_bytes:
        for own, row in zip(out, stored, strict=True):
            yield from _chunks(own, row, most_bytes)
        return
    step = most_bytes // row_bytes
    yield from _split(out, stored, step)


@contextmanager
def copier_to(device: torch.device) -> Iterator[Copier]:
    """What copies to a device fastest. When the block ends without an error, everything is there."""
    if device.type != "cuda":
        yield Copier()
        return
    copier = ThreadedCopier(device)
    try:
        yield copier
        copier.wait()
    finally:
        copier.close()
