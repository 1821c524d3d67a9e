"""Requests and tokens a minute, for each tenant or key, in a sliding window; and OpenAI's headers that tell of them.

What a request will cost is not known when it comes: an estimate is reserved while it runs, and what it really took is
counted at its end.
"""

from __future__ import annotations

import math
import time
from collections import Counter

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from fastattn.serve.auth import ApiKey
from fastattn.serve.contract import APIError


class Ticket:
    """A request that was let in. headers: for its answer."""

    def __init__(self, limits: RateLimits, bucket: tuple[str, str], item: RateLimitItemPerMinute | None, reserved: int) -> None:  # fmt: skip
        self._limits, self._bucket, self._item, self._reserved = limits, bucket, item, reserved
        self.headers: dict[str, str] = {}

    def forfeit(self) -> None:
        """The request is over, and if nobody said what it took, what was reserved counts."""
        self.settle(self._reserved)

    def settle(self, num_tokens: int) -> None:
        """The request is over and took so many tokens. Once only; more calls change nothing."""
        item, self._item = self._item, None
        if item is not None:
            self._limits.count_tokens(item, self._bucket, num_tokens, self._reserved)


class RateLimits:
    def __init__(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        self._requests, self._tokens = requests_per_minute, tokens_per_minute
        self._window = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._reserved: Counter[tuple[str, str]] = Counter()

    def admit(self, key: ApiKey, estimate: int) -> Ticket:
        """Raises APIError 429 with Retry-After. estimate: tokens that the request will take, about."""
        requests = _item(key.requests_per_minute or self._requests)
        tokens = _item(key.tokens_per_minute or self._tokens)
        bucket = key.bucket
        if tokens is not None:
            if estimate > tokens.amount:
                text = f"the request may take {estimate} tokens, allowed are {tokens.amount} a minute: lower max_tokens"
                raise APIError(429, text, "rate_limit_error", code="rate_limit_exceeded")
            left = self._left(tokens, "tokens", bucket) - self._reserved[bucket]
            if estimate > left:
                text = f"the limit of {tokens.amount} tokens a minute is reached: {max(0, left)} are left, this needs {estimate}"  # fmt: skip
                raise self._refusal(text, tokens, "tokens", bucket)
        if requests is not None and not self._window.hit(requests, "requests", *bucket):
            text = f"the limit of {requests.amount} requests a minute is reached"
            raise self._refusal(text, requests, "requests", bucket)
        if tokens is not None:
            self._reserved[bucket] += estimate
        ticket = Ticket(self, bucket, tokens, estimate)
        for kind, item in (("requests", requests), ("tokens", tokens)):
            if item is not None:
                ticket.headers |= self._headers(item, kind, bucket)
        return ticket

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
        stats = self._window.get_window_stats(item, kind, *bucket)
        headers = self._headers(item, kind, bucket) | {"Retry-After": str(_seconds_until(stats.reset_time))}
        return APIError(429, text, "rate_limit_error", code="rate_limit_exceeded", headers=headers)


def _item(per_minute: int | None) -> RateLimitItemPerMinute | None:
    return None if per_minute is None else RateLimitItemPerMinute(per_minute)


def _seconds_until(moment: float) -> int:
    return max(1, math.ceil(moment - time.time()))
