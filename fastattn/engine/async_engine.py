"""The engine for servers: asyncio in front, the step loop in one thread of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from fastattn.engine.engine import Engine
from fastattn.engine.intake import Params, Prepared, Prompt, TokenLists
from fastattn.engine.outputs import RequestOutput
from fastattn.engine.sampling_params import SamplingParams
from fastattn.engine.stats import EngineStats

logger = logging.getLogger("fastattn.engine")

# How often an engine without work looks whether its other ranks are there.
_CHECK_SECONDS = 1.0


class EngineDeadError(RuntimeError):
    """The step loop ended with an error; this engine answers nobody any more."""


_LONG_PROMPT = 2000  # characters; about a millisecond of tokenizing

Tell = Callable[[Any], None]  # gives an output or an exception to a task, from any thread


class AsyncEngine:
    """Only the loop's thread touches the engine: requests and aborts reach it as calls in a list, outputs leave through
    asyncio. When there is nothing to do the thread sleeps."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._wake = threading.Condition()
        # What the loop shall do, and whom to tell if it ends before it has done so.
        self._calls: deque[tuple[Callable[[], None], Tell]] = deque()
        self._streams: dict[str, Tell] = {}  # the loop's thread alone touches it
        self._closing = False
        self._failure: BaseException | None = None
        self.num_steps = 0
        self.last_step_time: float | None = None  # on the monotonic clock
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="fastattn-engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt: Prompt,
        params: Params | None,
        request_id: str,
        *,
        priority: int = 0,
        tenant: str = "",
        resume_token_ids: TokenLists | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Yields the request's outputs as they come. Leaving early, or a cancelled task, aborts the request.

        Raises what Engine.add_request raises, and EngineDeadError.
        """
        prepared = await self._prepare(prompt, params, resume_token_ids)
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def tell(item: Any) -> None:
            _post(loop, queue.put_nowait, item)

        def add() -> None:
            # A stream only once the engine took the request, so a refused id cannot take over another's outputs.
            try:
                self._engine.add_prepared(request_id, prepared, priority=priority, tenant=tenant)
            except Exception as error:  # the caller's mistake, told to the caller
                tell(error)
            else:
                self._streams[request_id] = tell

        def abort() -> None:
            if self._streams.get(request_id) is tell:  # the id may be another's by now
                del self._streams[request_id]
                self._engine.abort_request(request_id)

        self._call(add, tell)
        finished = False
        try:
            while not finished:
                item = await queue.get()
                finished = isinstance(item, BaseException) or item.finished
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            if not finished:
                with suppress(EngineDeadError):  # then nothing is left to abort
                    self._call(abort, lambda _: None)

    async def _prepare(self, prompt: Prompt, params: Params | None, resume_token_ids: TokenLists | None) -> Prepared:
        """In the caller's thread, or in another if that may take longer than an event loop should wait."""
        compiles = isinstance(params, SamplingParams) and params.structured_output is not None
        if compiles or (isinstance(prompt, str) and len(prompt) > _LONG_PROMPT):
            return await asyncio.to_thread(self._engine.prepare, prompt, params, resume_token_ids)
        return self._engine.prepare(prompt, params, resume_token_ids)

    async def stats(self) -> EngineStats:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[EngineStats] = loop.create_future()

        def answer(value: Any) -> None:
            if not future.done():
                future.set_exception(value) if isinstance(value, BaseException) else future.set_result(value)

        def tell(value: Any) -> None:
            _post(loop, answer, value)

        self._call(lambda: tell(self._engine.stats()), tell)
        return await future

    def close(self, timeout_seconds: float = 10.0) -> None:
        """Ends the loop after the step that is running; unfinished streams get EngineDeadError."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_seconds)
        self._engine.close()

    @property
    def seconds_without_step(self) -> float:
        """How long there has been something to do and no step was finished; 0 when idle. Any thread may ask: a health check
        calls an engine ill whose step takes longer than a step can take."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def _call(self, call: Callable[[], None], if_dead: Tell) -> None:
        with self._wake:
            if self._closing:
                raise self._dead()
            self._calls.append((call, if_dead))
            self._wake.notify()

    def _dead(self) -> EngineDeadError:
        error = EngineDeadError(f"the engine is not running: {self._failure or 'it was closed'}")
        error.__cause__ = self._failure
        return error

    def _run(self) -> None:
        try:
            while self._wait():
                while self._calls:
                    self._calls[0][0]()
                    self._calls.popleft()
                for output in self._engine.step():
                    self._deliver(output)
                self.num_steps += 1
                self.last_step_time = self._busy_since = time.monotonic()
        except BaseException as error:
            # What one step's requests can get over, the engine has told them; this is a lost device, or a bug of ours.
            logger.exception("the engine's step loop failed")
            self._failure = error
        with self._wake:
            self._closing = True
        for tell in [*self._streams.values(), *(if_dead for _, if_dead in self._calls)]:
            tell(self._dead())
        if self._failure is None:
            for request_id in self._streams:
                self._engine.abort_request(request_id)

    def _wait(self) -> bool:
        """Sleeps until there is something to do; False when it is to end."""
        with self._wake:
            while not (self._calls or self._closing or self._engine.has_unfinished_requests()):
                self._busy_since = None
                self._wake.wait(_CHECK_SECONDS)
                self._engine.check()
            if self._busy_since is None:
                self._busy_since = time.monotonic()
            return not self._closing

    def _deliver(self, output: RequestOutput) -> None:
        tell = self._streams.get(output.request_id)
        if tell is None:
            return
        if output.finished:
            del self._streams[output.request_id]
        tell(output)


def _post(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: Any) -> None:
    """Calls a function in an event loop; a loop that its owner has closed meanwhile has nobody left to tell."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        if not loop.is_closed():
            raise
