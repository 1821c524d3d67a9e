"""One computation that several identical requests read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import msgspec

from fastattn.serve.contract import APIError, Backend, Chunk, RequestContext

_encode = msgspec.msgpack.Encoder().encode
decode_chunk = msgspec.msgpack.Decoder(dict[str, Any]).decode
# An answer with another end, or with none, is not kept.
_GOOD_ENDS = frozenset({"stop", "length", "tool_calls"})


class Flight:
    """Runs in a task of its own: the request that started it may leave while others read on. When nobody reads any more,
    the work is aborted. Readers get copies, so that none sees what another does to its chunks."""

    def __init__(
        self, backend: Backend, request: Any, context: RequestContext, at_end: Callable[[Flight], None]
    ) -> None:
        # Its own context: the headers that the parts below set are every reader's.
        self.context = RequestContext(
            context.request_id,
            context.tenant,
            context.priority,
            context.cache_control,
            context.request_headers,
            trace=context.trace,
        )
        self.chunks: list[msgspec.Raw] = []
        self.num_bytes = 0
        self.refused = False
        self.is_over = False  # nobody can join it any more
        self._error: BaseException | None = None
        self._changed = asyncio.Event()
        self._num_readers = 0
        self._ends: dict[int, str | None] = {}
        self._at_end = at_end
        self._task = asyncio.create_task(self._run(backend, request))

    async def _run(self, backend: Backend, request: Any) -> None:
        try:
            async with aclosing(backend.stream(request, self.context)) as stream:  # type: ignore[type-var]
                async for chunk in stream:
                    self._add(chunk)
        except Exception as error:  # told to every reader
            self._error = error
        except asyncio.CancelledError as error:
            self._error = error
            raise
        finally:
            self.is_over = True
            self._at_end(self)
            self._wake()

    def _add(self, chunk: Chunk) -> None:
        for choice in chunk["choices"]:
            index = choice.get("index", 0)
            self._ends[index] = choice.get("finish_reason") or self._ends.get(index)
        data = _encode(chunk)
        self.num_bytes += len(data)
        self.chunks.append(msgspec.Raw(data))
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def is_complete(self) -> bool:
        """Whether every choice came to an end of its own, by the model that was meant."""
        ends = self._ends.values()
        if self._error is not None or self.refused or not self.context.cacheable:
            return False
        return bool(ends) and all(end in _GOOD_ENDS for end in ends)

    async def read(self, headers: dict[str, str]) -> AsyncIterator[Chunk]:
        """The answer from its beginning, as it comes. headers: gets those of the parts below with the first chunk."""
        self._num_readers += 1
        position = 0
        try:
            while True:
                changed = self._changed
                while position < len(self.chunks):
                    if position == 0:
                        headers.update({k: v for k, v in self.context.headers.items() if k not in headers})
                    position += 1
                    yield decode_chunk(self.chunks[position - 1])
                if self.is_over:
                    if isinstance(self._error, Exception):
                        raise self._error
                    if self._error is not None:
                        raise APIError(503, "the server is going down", "overloaded_error")
                    return
                if changed is self._changed:
                    await changed.wait()
        finally:
            self._num_readers -= 1
            if self._num_readers == 0 and not self.is_over:
                self.is_over = True
                self._task.cancel()

    async def cancel(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
