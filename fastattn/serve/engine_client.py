"""The front's side of the engine: requests go in, outputs come out, and an engine that dies is replaced unnoticed.

What is needed to go on with a request stays here until it ends: the prompt, the seed, the tokens so far. A new engine
process gets all that is unfinished and continues exactly where the old one was.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import zmq

from fastattn.serve import messages as m
from fastattn.serve.contract import APIError
from fastattn.serve.engine_link import EngineLink
from fastattn.serve.engine_sleep import EngineSleep, SleepMode
from fastattn.serve.metrics import Metrics
from fastattn.serve.work import Work, merged

logger = logging.getLogger("fastattn.serve")

MAX_FAILURES = 5  # engine processes in a row that did nothing before they died
_MAX_STUCK = 3  # engine processes that died with a request that made no progress in any of them: it may be the reason
_BACK_OFF = (0.0, 1.0, 2.0, 4.0, 8.0)  # seconds before a restart, by failures so far

State = Literal["starting", "ready", "restarting", "dead"]


@dataclass(frozen=True)
class EngineTimes:
    """Seconds. step: silence after which an engine is taken for hung. start: the same while it loads the model."""

    step: float = 60.0
    start: float = 1800.0
    health: float = 20.0
    heartbeat: float = 1.0


class EngineClient:
    def __init__(
        self,
        name: str,
        model: str,
        options: dict[str, Any],
        metrics: Metrics,
        times: EngineTimes,
        max_num_waiting: int,
    ) -> None:
        self._model, self._options, self._metrics, self._times = model, options, metrics, times
        self._max_num_waiting = max_num_waiting
        self._own_metrics = metrics.of(name)
        self._works: dict[str, Work] = {}
        self._num_sequences = 0
        self._link: EngineLink | None = None  # to a process that is ready
        self._last_heard = time.monotonic()
        self._failures = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.rest = EngineSleep(self._own_metrics.numbers)
        self.state: State = "starting"
        self.info: m.Ready | None = None
        self.stats: dict[str, float] = {}
        self.failure: tuple[str, int] | None = None  # why it is dead, and the exit code of the server
        self.changed = asyncio.Condition()

    # ---- life ----

    async def run(self) -> None:
        """Keeps an engine running until this task is cancelled, or no engine can be kept running."""
        folder = Path(tempfile.mkdtemp(prefix="fastattn-"))  # 0700
        try:
            while self.state != "dead":
                await self._one_life(folder)
                await self.rest.until_wanted()
        finally:
            if self.state != "dead":
                await self._die("the server is shutting down", 0)
            shutil.rmtree(folder, ignore_errors=True)

    async def _one_life(self, folder: Path) -> None:
        try:
            link = EngineLink(folder)
        except zmq.ZMQError as error:  # out of file descriptors, say; they come back
            await self._after_death(f"it could not be started: {error}")
            return
        why = None
        try:
            self._last_heard = time.monotonic()
            await link.start(self._model, self._options, self._times.heartbeat)
            reader = asyncio.create_task(self._read(link))
            watchdog = asyncio.create_task(self._watch())
            try:
                await asyncio.wait({reader, watchdog}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (reader, watchdog):
                    task.cancel()
            why = watchdog.result() if watchdog.done() and not watchdog.cancelled() else None
            if reader.done() and not reader.cancelled() and reader.exception():
                raise reader.exception() or AssertionError
        except asyncio.CancelledError:
            await link.stop()
            raise
        except OSError as error:
            why = f"it could not be started: {error}"
        finally:
            was_ready, self._link = self._link is not None, None
            how = await link.kill()
        if was_ready:
            self._drop_poison()
        await self._after_death(why or how)

    async def _after_death(self, why: str) -> None:
        if self.state == "dead":
            return
        self.rest.died(why)
        self._own_metrics.numbers.restarted()
        self._failures += 1
        if self._failures > MAX_FAILURES:
            await self._die(f"the engine died {self._failures} times in a row, last: {why}", 1)
            return
        self._metrics.restarts.inc()
        await self._set_state("restarting")
        delay = _BACK_OFF[self._failures - 1]
        logger.error(
            "the engine process ended (%s); %d requests wait for its successor, started in %g s",
            why,
            len(self._works),
            delay,
        )
        await asyncio.sleep(delay)

    def _drop_poison(self) -> None:
        """Gives up requests that may be what kills engines."""
        for request_id, work in list(self._works.items()):
            work.stuck = 0 if work.progress else work.stuck + 1
            work.progress = False
            if work.stuck >= _MAX_STUCK:
                self._forget(request_id)
                text = f"the engine died {work.stuck} times while it worked on this request"
                work.tell(APIError(500, text, "server_error"))

    async def _die(self, why: str, exit_code: int) -> None:
        self.failure = (why, exit_code)
        self.rest.given_up(why)
        for request_id, work in list(self._works.items()):
            self._forget(request_id)
            work.tell(APIError(503, why, "server_error"))
        await self._set_state("dead")

    async def _set_state(self, state: State) -> None:
        self.state = state
        async with self.changed:
            self.changed.notify_all()

    async def _read(self, link: EngineLink) -> None:
        async for message in link.messages():
            self._last_heard = time.monotonic()
            if link.num_invalid:
                self._metrics.invalid_messages.inc(link.num_invalid)
                link.num_invalid = 0
            if isinstance(message, m.Outputs):
                self._failures = 0
                for output in message.outputs:
                    self._deliver(output)
            elif isinstance(message, m.Stats):
                self.stats = message.values
                self._own_metrics.numbers.update(message.values)
            elif isinstance(message, m.Refused):
                self._refuse(message)
            elif isinstance(message, m.Ready):
                self.info, self._link = message, link
                self.rest.started()
                self._resume()
                await self._set_state("ready")
            elif isinstance(message, m.Switched):
                self.rest.switched(message)
                if self.rest.phase == "awake":
                    self._resume()
            elif self.info is None:  # it never ran: nothing would change
                await self._die(message.message, message.exit_code)
            else:
                logger.error("the engine cannot start again: %s", message.message)

    async def _watch(self) -> str:
        """Ends when the engine has been silent for too long."""
        tick = min(1.0, self._times.step / 4)
        before = time.monotonic()
        while True:
            await asyncio.sleep(tick)
            now = time.monotonic()
            if now - before > tick + 1:  # it was we who slept: a stopped process, a suspended machine
                self._last_heard = now
            before = now
            is_quick = self.state == "ready" and not self.rest.is_switching
            limit = self._times.step if is_quick else self._times.start
            if now - self._last_heard > limit:
                return f"no sign of life for {limit:g} s"

    @property
    def healthy(self) -> bool:
        """The engine made a step, or answered in idleness, a moment ago; or it sleeps, and nothing more is expected of it."""
        if self.rest.phase == "asleep" or self.rest.is_switching:
            return self.state != "dead"
        return self.state == "ready" and time.monotonic() - self._last_heard < self._times.health

    @property
    def condition(self) -> str:
        """In words, "ready" if requests can be worked on."""
        return self.state if self.rest.phase == "awake" else self.rest.phase

    @property
    def seconds_since_sign(self) -> float:
        return time.monotonic() - self._last_heard

    async def wait_idle(self) -> None:
        await self._idle.wait()

    # ---- sleep ----

    async def sleep(self, level: int, mode: SleepMode) -> None:
        """Refuses new requests, has those that there are ended ("abort"), finished ("wait") or put aside until it wakes up
        ("keep"), and the engine give its memory back. Nothing is done if it sleeps at this level already. Raises APIError; who
        is cancelled while requests finish has not asked for sleep."""
        async with self.rest.lock:
            await self.rest.settle()
            if self.rest.phase == "asleep" and self.rest.level == level:
                return
            if self.rest.phase == "asleep":
                raise APIError(409, f"the engine sleeps at level {self.rest.level} already: POST /wake_up comes first")
            self._check_ready()
            self.rest.phase, self.rest.level = "going to sleep", level
            try:
                if mode == "wait":
                    await self.wait_idle()
                    self._check_ready()
            except BaseException:
                self.rest.phase, self.rest.level = "awake", 0
                raise
            assert self._link is not None
            for request_id, work in list(self._works.items()):
                self._link.send(m.Abort(request_id))
                if mode == "abort":
                    self._forget(request_id)
                    work.tell(APIError(503, "the model was put to sleep", "overloaded_error", code="engine_asleep"))
            answer = self.rest.begin("falling asleep")
            self._link.send(m.Sleep(level))
            await asyncio.shield(answer)

    async def wake_up(self, tags: list[str]) -> None:
        """Has the engine take its memory again, all of it or of these parts. Nothing is done if it is awake. Raises APIError, and
        it sleeps on."""
        async with self.rest.lock:
            await self.rest.settle()
            if self.rest.phase == "awake":
                return
            answer = self.rest.begin("waking up")
            if self._link is not None:
                self._link.send(m.WakeUp(tags))
            await asyncio.shield(answer)

    def _check_ready(self) -> None:
        if self.state != "ready" or self._link is None:
            raise APIError(
                503,
                f"the engine is {self.state if self._link else 'restarting'}",
                "overloaded_error",
                headers={"Retry-After": "5"},
            )

    def _resume(self) -> None:
        """The engine has forgotten all requests, or is another."""
        assert self._link is not None
        for work in self._works.values():
            self._link.send(work.continued)

    # ---- requests ----

    async def generate(self, messages: Sequence[m.Generate | m.Embed]) -> AsyncIterator[tuple[int, m.Output]]:
        """(position in ``messages``, what is new), as it comes, until all are finished. Leaving early aborts them.

        A reader that is slow gets more at a time, not more often. Raises APIError.
        """
        self._admit(messages)
        inbox: asyncio.Queue[tuple[int, m.Output] | APIError] = asyncio.Queue()
        for position, message in enumerate(messages):
            n = message.sampling.n if isinstance(message, m.Generate) else 1
            work = Work(message, position, inbox.put_nowait, [[] for _ in range(n)], [False] * n)
            self._works[message.id] = work
            self._num_sequences += n
            self._idle.clear()
            if self._link is not None:
                self._link.send(message)
        left = len(messages)
        try:
            while left:
                items = [await inbox.get()]
                while not inbox.empty():
                    items.append(inbox.get_nowait())
                for position, output in merged(items):
                    left -= output.finished
                    yield position, output
        finally:
            for message in messages:
                if self._forget(message.id) and self._link is not None:
                    self._link.send(m.Abort(message.id))

    def _admit(self, messages: Sequence[m.Generate | m.Embed]) -> None:
        if self.state == "dead":
            assert self.failure is not None
            raise APIError(503, self.failure[0], "server_error")
        if self.info is None:
            raise APIError(503, "the model is still loading", "overloaded_error", headers={"Retry-After": "5"})
        try:
            self.rest.check_awake()
        except APIError:
            self._metrics.rejections.labels("asleep").inc()
            raise
        wanted = sum(w.sampling.n if isinstance(w, m.Generate) else 1 for w in messages)
        limit = self.info.max_num_seqs + self._max_num_waiting
        if wanted > limit:  # later would be no better
            raise APIError(400, f"the request has {wanted} sequences, allowed are {limit}: see --max-num-waiting")
        if self._num_sequences + wanted > limit:
            self._metrics.rejections.labels("queue").inc()
            raise APIError(
                503,
                f"{self._num_sequences} sequences run or wait, and {wanted} more would be above the limit of {limit}",
                "overloaded_error",
                headers={"Retry-After": str(self._retry_after())},
            )

    def _retry_after(self) -> int:
        """Seconds until a place may be free: how long the oldest has been here, within reason."""
        oldest = min((work.arrival for work in self._works.values()), default=time.monotonic())
        return max(1, min(30, round(time.monotonic() - oldest)))

    def _deliver(self, output: m.Output) -> None:
        work = self._works.get(output.id)
        if work is None:  # aborted a moment ago
            return
        work.progress = True
        # A completion that was over before a restart is reported over once more.
        output.choices = [c for c in output.choices if not work.finished[c.index]]
        for choice in output.choices:
            work.tokens[choice.index] += choice.token_ids
            work.finished[choice.index] = choice.finish_reason is not None
            if choice.finish_reason == "error":
                self._broken(work, choice)
                return
        if work.has_prompt_logprobs:
            output.prompt_logprobs = None
        work.has_prompt_logprobs |= output.prompt_logprobs is not None
        if output.finished:
            self._forget(output.id)
        work.tell((work.position, output))

    def _broken(self, work: Work, choice: m.Choice) -> None:
        self._own_metrics.success["error"].inc()
        message = work.message
        if self._forget(message.id) and self._link is not None:
            self._link.send(m.Abort(message.id))
        text = f"the engine could not go on with this request: {choice.stop_reason}"
        if isinstance(message, m.Generate) and message.sampling.structured_output is not None:
            work.tell(
                APIError(400, text, code="structured_output_failed")
            )  # a grammar too large for a step, or a dead end
        else:
            self._metrics.corrupted.inc()
            work.tell(APIError(500, text, "server_error"))

    def _refuse(self, message: m.Refused) -> None:
        work = self._works.get(message.id)
        if work is None:
            return
        self._forget(message.id)
        if message.kind == "busy":
            self._metrics.rejections.labels("queue").inc()
            headers = {"Retry-After": str(self._retry_after())}
            work.tell(APIError(503, message.message, "overloaded_error", headers=headers))
        else:
            work.tell(APIError(400, message.message))

    def _forget(self, request_id: str) -> bool:
        work = self._works.pop(request_id, None)
        if work is not None:
            self._num_sequences -= len(work.tokens)
            if not self._works:
                self._idle.set()
        return work is not None


async def cancel(task: asyncio.Task[Any]) -> None:
    """Ends a task and waits until it has ended."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
