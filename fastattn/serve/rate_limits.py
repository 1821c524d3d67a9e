"""Requests and tokens a minute, for each tenant or key, in a sliding window; and OpenAI's headers that tell of them.

What a request will cost is not known when it comes: an estimate is reserved while it runs, and what it really took is
counted at its end.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from fastattn.serve.auth import ApiKey
from fastattn.serve.contract import APIError


class Ticket:
    """A request that was let in. headers: for its answer."""

    def __init__(self, limits: RateLimits, bucket: tuple[str, str], tokens: RateLimitItemPerMinute | None) -> None:
        self._limits, self._bucket, self._tokens = limits, bucket, tokens
        self._reserved: int | None = None
        self.headers: dict[str, str] = {}

    def reserve(self, estimate: int) -> None:
        """estimate: tokens that the request will take, about. Once. Raises APIError 429."""
        if self._tokens is not None:
            self.headers |= self._limits.reserve(self._tokens, self._bucket, estimate)
            self._reserved = estimate

    def forfeit(self) -> None:
        """The request is over, and if nobody said what it took, what was reserved counts."""
        self.settle(self._reserved or 0)

    def settle(self, num_tokens: int) -> None:
        """The request is over and took so many tokens. Once only; more calls change nothing."""
        reserved, self._reserved = self._reserved, None
        if reserved is not None and self._tokens is not None:
            self._limits.count_tokens(self._tokens, self._bucket, num_tokens, reserved)


class RateLimits:
    """on_refusal: called for each request that is refused."""

    def __init__(
        self,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        on_refusal: Callable[[], None] = lambda: None,
    ) -> None:
        self._requests, self._tokens, self._on_refusal = requests_per_minute, tokens_per_minute, on_refusal
        self._window = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._reserved: Counter[tuple[str, str]] = Counter()

    def admit(self, key: ApiKey) -> Ticket:
        """Before anything is done for it, so that one that is wrong counts too. Raises APIError 429 with Retry-After."""
        requests = _item(key.requests_per_minute or self._requests)
        if requests is not None and not self._window.hit(requests, "requests", *key.bucket):
            text = f"the limit of {requests.amount} requests a minute is reached"
            raise self._refusal(text, requests, "requests", key.bucket)
        ticket = Ticket(self, key.bucket, _item(key.tokens_per_minute or self._tokens))
        if requests is not None:
            ticket.headers |= self._headers(requests, "requests", key.bucket)
        return ticket

    def reserve(self, tokens: RateLimitItemPerMinute, bucket: tuple[str, str], estimate: int) -> dict[str, str]:
        if estimate > tokens.amount:
            self._on_refusal()
            text = f"the request may take {estimate} tokens, allowed are {tokens.amount} a minute: lower max_tokens"
            raise APIError(429, text, "rate_limit_error", code="rate_limit_exceeded")
        left = self._left(tokens, "tokens", bucket) - self._reserved[bucket]
        if estimate > left:
            text = f"the limit of {tokens.amount} tokens a minute is reached: {max(0, left)} are left, this needs {estimate}"
            raise self._refusal(text, tokens, "tokens", bucket)
        self._reserved[bucket] += estimate
        return self._headers(tokens, "tokens", bucket)

    def count_tokens(self, item: RateLimitItemPerMinute, bucket: tuple[str, str], taken: int, reserved: int) -> None:
        self._reserved[bucket] -= reserved
        if not self._reserved[bucket]:
            del self._reserved[bucket]
        cost = min(taken, self._left(item, "tokens", bucket))
        if cost > 0:
            self._window.hit(item, "tokens", *bucket, cost=cost)

    def _left(self, item: RateLimitItemPerMinute, kind: str, bucket: tuple[str, str]) -> int:
        return self._window.get_window_stats(item, kind, *bucket).remaining

    def _headers(self, item: RateLimitItemPerMinute, kind: str, bucket: tuple[str, str]) -> dict[str, str]:
        stats = self._window.get_window_stats(item, kind, *bucket)
        left = stats.remaining - (self._reserved[bucket] if kind == "tokens" else 0)
        return {
            f"x-ratelimit-limit-{kind}": str(item.amount),
            f"x-ratelimit-remaining-{kind}": str(max(0, left)),
            f"x-ratelimit-reset-{kind}": f"{_seconds_until(stats.reset_time)}s",
        }

    def _refusal(self, text: str, item: RateLimitItemPerMinute, kind: str, bucket: tuple[str, str]) -> APIError:
        self._on_refusal()
        stats = self._window.get_window_stats(item, kind, *bucket)
        headers = self._headers(item, kind, bucket) | {"Retry-After": str(_seconds_until(stats.reset_time))}
        return APIError(429, text, "rate_limit_error", code="rate_limit_exceeded", headers=headers)


def _item(per_minute: int | None) -> RateLimitItemPerMinute | None:
    return None if per_minute is None else RateLimitItemPerMinute(per_minute)


def _seconds_until(moment: float) -> int:
    return max(1, math.ceil(moment - time.time()))
