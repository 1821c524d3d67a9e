"""When to stop asking who does not answer: a circuit breaker for each deployment, a budget of retries for all."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]  # seconds, monotonic


class Breaker:
    """closed → (allowed_fails failures in a row) → open for cooldown seconds → half open: one request tries → closed or
    open again."""

    def __init__(self, allowed_fails: int, cooldown: float, clock: Clock = time.monotonic) -> None:
        self._allowed_fails, self._cooldown, self._clock = allowed_fails, cooldown, clock
        self._num_fails = 0
        self._open_until: float | None = None
        self._is_tried = False

    def acquire(self) -> bool:
        """Whether a request may go there now. In the half-open state the first that asks may, and must tell the end."""
        if self._open_until is None:
            return True
        if self._clock() < self._open_until or self._is_tried:
            return False
        self._is_tried = True
        return True

    def alive(self) -> None:
        """It has begun to answer. A rest is over, but the next failure begins another."""
        if self._open_until is not None:
            self._open_until, self._is_tried, self._num_fails = None, False, self._allowed_fails - 1

    def succeeded(self) -> None:
        self._num_fails, self._open_until, self._is_tried = 0, None, False

    def failed(self, retry_after: float | None = None) -> None:
        """retry_after: it asked for so many seconds of rest, so it gets them at once."""
        self._num_fails += 1
        was_trial, self._is_tried = self._is_tried, False
        if retry_after is not None:
            self._open(retry_after)
        elif was_trial or self._num_fails >= self._allowed_fails:
            self._open(self._cooldown)

    def left(self) -> None:
        """The request ended without telling anything of the deployment: the client left, or asked for nonsense."""
        self._is_tried = False

    @property
    def seconds_left(self) -> float:
        """Until a request may try; 0 if one may now."""
        if self._open_until is None:
            return 0.0
        return max(0.0, self._open_until - self._clock())

    @property
    def state(self) -> str:
        if self._open_until is None:
            return "closed"
        return "open" if self._clock() < self._open_until else "half_open"

    def _open(self, seconds: float) -> None:
        self._open_until = max(self._open_until or 0.0, self._clock() + seconds)


class RetryBudget:
    """Attempts after the first are at most `share` of all requests, and a few at the start: when everything fails, retries
    would else multiply the load by their number."""

    def __init__(self, share: float, reserve: float = 10.0) -> None:
        self._share, self._reserve = share, reserve
        self._tokens = reserve if share else 0.0

    def request(self) -> None:
        self._tokens = min(self._reserve, self._tokens + self._share)

    def spend(self) -> bool:
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
