"""One engine process, from its start to its end, and the socket to it."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from fastattn.serve import messages as m

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[m.FromEngine] = msgspec.msgpack.Decoder(m.FromEngine)


class EngineLink:
    """The folder of the socket is ours alone (0700). What comes on it from anybody but our engine is counted and dropped."""

    def __init__(self, folder: Path) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._identity = secrets.token_hex(16)
        self.address = f"ipc://{folder}/{secrets.token_hex(4)}.sock"
        self._socket.bind(self.address)
        self._process: asyncio.subprocess.Process | None = None
        self.num_invalid = 0

    async def start(self, model: str, options: dict[str, Any], heartbeat: float) -> None:
        spec = m.EngineSpec(self.address, self._identity, model, options, heartbeat)
        # A session of its own: Ctrl-C at a terminal is for the front, which lets the engine finish; and its workers are in
        # one group with it, so that nothing of it outlives it.
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "fastattn.serve.engine_process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(spec) + b"\n")
        with suppress(ConnectionError):  # it died already, and wait() says so
            await self._process.stdin.drain()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def send(self, message: m.ToEngine) -> None:
        """In order, and never waits: the socket's queue has no limit but that of the requests that are admitted."""
        future: Any = self._socket.send_multipart([self._identity.encode(), _ENCODER.encode(message)])
        if not future.done():
            future.add_done_callback(_swallow_cancelled)

    async def messages(self) -> AsyncIterator[m.FromEngine]:
        """What the engine says, until it ends; then what it still had said."""
        assert self._process is not None
        exited = asyncio.ensure_future(self._process.wait())
        try:
            while True:
                received = asyncio.ensure_future(self._socket.recv_multipart())
                await asyncio.wait({exited, received}, return_when=asyncio.FIRST_COMPLETED)
                if not received.done() and not await self._socket.poll(50):
                    received.cancel()
                    return
                message = self._decode(await received)
                if message is not None:
                    yield message
        finally:
            exited.cancel()

    def _decode(self, frames: list[bytes]) -> m.FromEngine | None:
        if len(frames) == 2 and frames[0] == self._identity.encode():
            with suppress(msgspec.DecodeError):
                return _DECODER.decode(frames[1])
        self.num_invalid += 1
        return None

    async def stop(self, seconds: float = 5.0) -> None:
        """Asks the engine to end, and makes it end."""
        if self._process is not None and self._process.returncode is None:
            self.send(m.Stop())
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._process.wait(), seconds)
        await self.kill()

    async def kill(self) -> str:
        """Ends the process and all that it started, if they still run, and says how it ended."""
        process = self._process
        self._socket.close()
        self._context.term()
        if process is None:
            return "it did not start"
        by_us = process.returncode is None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = await process.wait()
        if by_us:
            return "it was ended"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _swallow_cancelled(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()  # a closed socket; the engine behind it is gone, and its requests will be sent again
