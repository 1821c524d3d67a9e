"""The engine for servers: asyncio in front, the step loop in one thread of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastattn.engine.engine import Engine, EngineStats, Prompt
from fastattn.engine.outputs import RequestOutput
from fastattn.engine.sampling_params import SamplingParams

logger = logging.getLogger("fastattn.engine")


class EngineDeadError(RuntimeError):
    """The step loop ended with an error; this engine answers nobody any more."""


class AsyncEngine:
    """Only the loop's thread touches the engine: requests and aborts reach it as calls in a list, outputs leave through
    asyncio. When there is nothing to do the thread sleeps."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._wake = threading.Condition()
        self._calls: list[Callable[[], None]] = []
        self._streams: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[RequestOutput | BaseException]]] = {}
        self._closing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="fastattn-engine", daemon=True)
        self._thread.start()

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None, request_id: str, *, priority: int = 0, tenant: str = ""
    ) -> AsyncIterator[RequestOutput]:
        """Yields the request's outputs as they come. Leaving early, or a cancelled task, aborts the request.

        Raises what Engine.add_request raises, and EngineDeadError.
        """
        queue: asyncio.Queue[RequestOutput | BaseException] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def add() -> None:
            # Registered by the loop's thread only once the engine took it, so a refused id cannot take over another's stream.
            try:
                self._engine.add_request(request_id, prompt, params, priority=priority, tenant=tenant)
            except Exception as error:  # the caller's mistake, told to the caller
                loop.call_soon_threadsafe(queue.put_nowait, error)
            else:
                self._streams[request_id] = (loop, queue)
                accepted.append(request_id)

        accepted: list[str] = []
        self._call(add)
        finished = False
        try:
            while not finished:
                item = await queue.get()
                if isinstance(item, BaseException):
                    finished = True
                    raise item
                finished = item.finished
                yield item
        finally:
            if not finished:
                self._call(lambda: self._abort(request_id) if accepted else None)

    async def stats(self) -> EngineStats:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[EngineStats] = loop.create_future()
        self._call(lambda: _set_result(loop, future, self._engine.stats()))
        return await future

    def close(self, timeout_seconds: float = 10.0) -> None:
        """Ends the loop after the step that is running; unfinished streams get EngineDeadError."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_seconds)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self._failure is None

    def _call(self, call: Callable[[], None]) -> None:
        with self._wake:
            if self._failure is not None or self._closing:
                raise EngineDeadError(f"the engine is not running: {self._failure or 'closed'}")
            self._calls.append(call)
            self._wake.notify()

    def _abort(self, request_id: str) -> None:
        self._streams.pop(request_id, None)
        self._engine.abort_request(request_id)

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (self._calls or self._closing or self._engine.has_unfinished_requests()):
                        self._wake.wait()
                    calls, self._calls = self._calls, []
                    if self._closing:
                        break
                for call in calls:
                    call()
                for output in self._engine.step():
                    self._deliver(output)
        except BaseException as error:
            # An error in a step leaves the cache in an unknown state, and a CUDA error cannot be recovered from at all.
            logger.exception("the engine's step loop failed")
            self._failure = error
        finally:
            with self._wake:
                self._closing = True
            dead = EngineDeadError(f"the engine is not running: {self._failure or 'closed'}")
            for loop, queue in self._streams.values():
                _post(loop, queue.put_nowait, dead)

    def _deliver(self, output: RequestOutput) -> None:
        entry = self._streams.get(output.request_id)
        if entry is None:
            return
        if output.finished:
            del self._streams[output.request_id]
        loop, queue = entry
        _post(loop, queue.put_nowait, output)


def _post(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: Any) -> None:
    """Calls a function in an event loop; a loop that its owner has closed meanwhile has nobody left to tell."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *args)


def _set_result(loop: asyncio.AbstractEventLoop, future: asyncio.Future[EngineStats], value: EngineStats) -> None:
    def deliver() -> None:
        if not future.done():
            future.set_result(value)

    _post(loop, deliver)
