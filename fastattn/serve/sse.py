"""Server-sent events, and work that ends when its client leaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastattn.serve.contract import APIError, Chunk

logger = logging.getLogger("fastattn.serve")
T = TypeVar("T")

END = b"data: [DONE]\n\n"
_COMMENT = b": keep-alive\n\n"  # clients skip it, and proxies see that the stream lives


class _SlowClientError(Exception):
    """The client took nothing for too long."""


class ClientGoneError(Exception):
    """The client has closed the connection: there is nobody to answer."""


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """What the work gives; if the client leaves first, the work is cancelled and ClientGoneError raised."""
    task: asyncio.Task[T] = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for one in (task, gone):
            one.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await one


async def up_to(seconds: float, task: asyncio.Future[T]) -> None:
    """Waits so long for the task, which then goes on. Raises what it raised; ends it if the wait is cancelled."""
    try:
        await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task})
        raise
    if task.done():
        task.result()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class EventStream(Response):
    """Chunks as events, then [DONE]; an error on the way is an event too. on_end is called once, however it ends.

    encode, end: another form of event, and of what comes behind the last one. write_timeout: seconds that the client may take nothing. keep_alive: seconds of silence until a comment.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncIterator[Chunk],
        headers: Mapping[str, str],
        write_timeout: float,
        keep_alive: float,
        on_end: Callable[[bool], None],
        encode: Callable[[Any], bytes] = event,
        end: bytes = END,
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._write_timeout, self._on_end = chunks, write_timeout, on_end
        self._keep_alive, self._last_write = keep_alive, 0.0
        self._encode, self._end = encode, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        complete = False
        try:
            await unless_gone(receive, self._write(scope, send))
            complete = True
        except ClientGoneError:
            pass
        finally:
            self._on_end(complete)

    async def _write(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        # Beside the chunks, so that waiting for one costs no task and no timer of its own.
        comments = asyncio.ensure_future(self._comment(send))
        try:
            try:
                async for chunk in self._chunks:
                    await self._body(send, self._encode(chunk))
            except APIError as error:
                await self._body(send, self._encode(error.body()))
            except _SlowClientError:
                raise
            except Exception:
                logger.exception("a stream ended with an error of ours")
                await self._body(send, self._encode(APIError(500, "internal error", "server_error").body()))
            finally:
                comments.cancel()
                await asyncio.wait({comments})
                await self._chunks.aclose()  # type: ignore[attr-defined]
            await self._body(send, self._end, more=False)
        except _SlowClientError:
            logger.info("a client took nothing of its stream for %g s and is cut off", self._write_timeout)
            if abort := scope.get("fastattn.abort"):  # closing would wait for the client once more
                abort()
            raise ClientGoneError from None

    async def _comment(self, send: Send) -> None:
        now = asyncio.get_running_loop().time
        self._last_write = now()
        with suppress(_SlowClientError):  # the next chunk will find out
            while True:
                await asyncio.sleep(self._last_write + self._keep_alive - now())
                if now() - self._last_write >= self._keep_alive:
                    await self._body(send, _COMMENT)

    async def _body(self, send: Send, data: bytes, more: bool = True) -> None:
        # Waits while the connection's buffer is full.
        message = {"type": "http.response.body", "body": data, "more_body": more}
        task = asyncio.ensure_future(send(message))
        try:  # wait_for of Python below 3.12 swallows a cancellation that comes when the message has just been sent
            await asyncio.wait({task}, timeout=self._write_timeout)
        finally:
            sent = not task.cancel()
        if not sent:
            raise _SlowClientError
        task.result()
        self._last_write = asyncio.get_running_loop().time()
