"""Whether an engine sleeps, as the front knows it: what it was told, what it answered, and what its death makes of that."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Literal

from fastattn.serve import messages as m
from fastattn.serve.contract import APIError
from fastattn.serve.metrics import EngineNumbers

Phase = Literal["awake", "going to sleep", "falling asleep", "asleep", "waking up"]
SleepMode = Literal["abort", "wait", "keep"]  # vLLM's: what becomes of the requests that run or wait


class EngineSleep:
    """awake → going to sleep (no new requests; those there are end or are put aside) → falling asleep → asleep → waking up.

    An engine that dies while it falls asleep is awake again with its successor; for one that dies asleep there is none before it
    is to wake up: a start takes the memory that was given back. level: 0 is awake. asleep: the parts that sleep.
    """

    def __init__(self, metrics: EngineNumbers) -> None:
        self._metrics = metrics
        self.phase: Phase = "awake"
        self.level = 0
        self.asleep: list[str] = []
        self.lock = asyncio.Lock()  # of who tells it to sleep or wake up
        self._answer: asyncio.Future[None] | None = None
        self._wanted = asyncio.Event()  # is there to be an engine process?
        self._wanted.set()

    def check_awake(self) -> None:
        """Raises APIError for a request that comes while it is not."""
        if self.phase == "awake":
            return
        seconds = "5" if self.phase == "waking up" else "60"
        raise APIError(
            503,
            f"the model is {self.phase}: POST /wake_up wakes it",
            "overloaded_error",
            code="engine_asleep",
            headers={"Retry-After": seconds},
        )

    @property
    def is_switching(self) -> bool:
        """It may be silent for as long as weights take to be copied or read."""
        return self.phase in ("falling asleep", "waking up")

    def begin(self, phase: Phase) -> asyncio.Future[None]:
        """What is done when the engine has answered. It goes on when nobody waits for it any more."""
        self.phase = phase
        self._answer = asyncio.get_running_loop().create_future()
        self._wanted.set()
        return self._answer

    async def settle(self) -> None:
        """Waits for a switch whose caller has left."""
        if self._answer is not None:
            with suppress(APIError):
                await asyncio.shield(self._answer)

    async def until_wanted(self) -> None:
        """Returns when an engine process is needed."""
        await self._wanted.wait()

    # ---- what comes of it ----

    def switched(self, message: m.Switched) -> None:
        self.asleep = message.asleep
        self._is(bool(message.asleep))
        self._tell(None if message.error is None else APIError(500, message.error, "server_error"))

    def started(self) -> None:
        """A new engine is ready: it has all of its memory."""
        if self.phase != "going to sleep":
            self.asleep = []
            self._is(False)
        self._tell(None)

    def died(self, why: str) -> None:
        if self.phase == "falling asleep":
            self._is(False)
            self._tell(
                APIError(500, f"the engine died while it fell asleep ({why}); another is started", "server_error")
            )
        elif self.phase == "asleep":
            self._wanted.clear()

    def given_up(self, why: str) -> None:
        """There will be no engine any more."""
        self._wanted.set()
        self._tell(APIError(503, why, "server_error"))

    def _is(self, asleep: bool) -> None:
        self.phase = "asleep" if asleep else "awake"
        self.level = self._metrics.sleep_level = self.level if asleep else 0

    def _tell(self, error: APIError | None) -> None:
        answer, self._answer = self._answer, None
        if answer is None or answer.done():
            return
        if error is None:
            answer.set_result(None)
        else:
            answer.set_exception(error)
            answer.exception()  # told, whether or not somebody still waits
