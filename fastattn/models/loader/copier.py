"""How stored numbers get from the pages of a file to where they belong."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from queue import SimpleQueue

import numpy as np
import torch

# What is converted on the device at a time: its memory as stored.
_CONVERTED_BYTES = 64 << 20


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
    """To a GPU, by several threads: a chunk is read into a pinned buffer, and fetched by the GPU while others are read.

    One thread reads the page cache at a fifth of what the bus takes. Host memory is that of the buffers, whatever the tensors'
    size. ``copy`` returns before the numbers are there; `wait` waits for them. What goes wrong in a thread is raised by a later
    call, and ends all.
    """

    def __init__(
        self, device: torch.device, num_threads: int = 8, num_buffers: int = 16, buffer_bytes: int = 4 << 20
    ) -> None:
        on_gpu = device.type == "cuda"
        self._device = torch.empty(0, device=device).device  # with its number, as tensors have it
        self._buffer_bytes = buffer_bytes
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._free: SimpleQueue[_Buffer] = SimpleQueue()
        for memory in torch.empty(num_buffers, buffer_bytes, dtype=torch.uint8, pin_memory=on_gpu):
            self._free.put(_Buffer(memory, self._stream))
        self._pool = ThreadPoolExecutor(num_threads, "fastattn-load")
        self._jobs: deque[Future[None]] = deque()
        self._most_jobs = 2 * num_buffers  # more would only make the progress bar lie

    def copy(self, out: torch.Tensor, stored: torch.Tensor) -> None:
        if out.device != self._device or not stored.numel():
            out.copy_(stored)
        elif out.dtype == stored.dtype and out.is_contiguous():
            self._start(out, stored)
        else:  # converted there, a part at a time
            out, stored = (
                out.reshape(-1) if out.dim() == 0 else out,
                stored.reshape(-1) if stored.dim() == 0 else stored,
            )
            step = max(1, _CONVERTED_BYTES // stored[0].nbytes)
            for own, part in zip(torch.split(out, step), torch.split(stored, step), strict=True):
                own.copy_(self.bring(part, self._device))

    def bring(self, stored: torch.Tensor, device: torch.device) -> torch.Tensor:
        out = torch.empty(stored.shape, dtype=stored.dtype, device=device)
        if device != self._device or not stored.numel():
            return out.copy_(stored)
        jobs = self._start(out, stored)
        for job in jobs:
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

    def _start(self, out: torch.Tensor, stored: torch.Tensor) -> list[Future[None]]:
        """Begins to copy, and returns what is to be waited for."""
        if self._stream is not None:  # the memory may have been another tensor's, whose work has not ended
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        jobs = []
        for target, chunk in _chunks(out, stored, self._buffer_bytes):
            while len(self._jobs) >= self._most_jobs:
                self._jobs.popleft().result()
            job = self._pool.submit(self._copy_chunk, target, chunk)
            self._jobs.append(job)
            jobs.append(job)
        return jobs

    def _copy_chunk(self, target: torch.Tensor, chunk: torch.Tensor) -> None:
        buffer = self._free.get()
        try:
            buffer.send(target, chunk)
        finally:
            self._free.put(buffer)

    def _order_after_copies(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


class _Buffer:
    """Pinned memory on the way to a GPU, and when it may be written again. Without a stream: host memory on the way to other."""

    def __init__(self, memory: torch.Tensor, stream: torch.cuda.Stream | None) -> None:
        self._memory, self._stream = memory, stream
        self._taken = torch.cuda.Event() if stream is not None else None  # type: ignore[no-untyped-call]

    def send(self, target: torch.Tensor, chunk: torch.Tensor) -> None:
        if self._taken is not None:
            self._taken.synchronize()
        memory = self._memory[: chunk.numel()].view(chunk.shape)
        # numpy's copy is this thread's alone and lets the others run; torch's would start threads of its own.
        np.copyto(memory.numpy(), chunk.numpy())
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            target.copy_(memory, non_blocking=True)
            if self._taken is not None:
                self._taken.record()


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
    yield from zip(torch.split(out, step), torch.split(stored, step), strict=True)


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
