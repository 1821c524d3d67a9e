"""Who is let in next. Knows no clock: the same arrivals give the same order."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol

from fastattn.engine.request import Request, Status

# What a token costs its tenant: one of output keeps the machine busy longer than one of a prompt (VTC, section 5).
PROMPT_COST, OUTPUT_COST = 1, 2
_FIRST_OF_ALL = -(2**63)  # below every priority that a user can give
_MAX_TENANTS = 10_000


class WaitingQueue(Protocol):
    """Requests that ended while they waited are left out, and kept until `forget_ended`. `first` does not take away,
    `pop_first` does."""

    def push(self, request: Request) -> None: ...

    def first(self) -> Request | None: ...

    def pop_first(self) -> Request: ...

    def put_back(self, request: Request) -> None:
        """What `pop_first` gave in this step, and was not let in: as if it had never left."""

    def forget_ended(self) -> None: ...

    def next_step(self) -> None:
        """A step begins."""

    def charge(self, request: Request, cost: int) -> None:
        """A request was served so much."""


class _Heap:
    """Requests by `sort_key`. Entries that are out of date stay until they come to the top."""

    def __init__(self) -> None:
        self._entries: list[tuple[tuple[int, int, int], Request]] = []

    def push(self, request: Request) -> None:
        heapq.heappush(self._entries, (request.sort_key, request))

    def first(self) -> Request | None:
        while self._entries and not _is_current(*self._entries[0]):
            heapq.heappop(self._entries)
        return self._entries[0][1] if self._entries else None

    def pop_first(self) -> Request:
        return heapq.heappop(self._entries)[1]

    def forget_ended(self) -> None:
        self._entries = [entry for entry in self._entries if _is_current(*entry)]
        heapq.heapify(self._entries)


def _is_current(key: tuple[int, int, int], request: Request) -> bool:
    return request.status is Status.WAITING and key == request.sort_key


class OrderedQueue:
    """By priority, then by arrival. Who waited for ``max_steps`` goes before all others, so nobody waits for ever."""

    def __init__(self, max_steps: int) -> None:
        self._heap = _Heap()
        self._max_steps, self._step = max_steps, 0
        self._since: OrderedDict[Request, int] = OrderedDict()  # the step in which each came, oldest first

    def push(self, request: Request) -> None:
        self._heap.push(request)
        self._since.setdefault(request, self._step)

    def first(self) -> Request | None:
        return self._heap.first()

    def pop_first(self) -> Request:
        return self._heap.pop_first()

    def put_back(self, request: Request) -> None:
        self._heap.push(request)

    def forget_ended(self) -> None:
        self._heap.forget_ended()
        self._since = OrderedDict((r, s) for r, s in self._since.items() if r.status is not Status.FINISHED)

    def next_step(self) -> None:
        self._step += 1
        while self._since:
            request, since = next(iter(self._since.items()))
            if request.status is Status.WAITING:
                if self._step - since < self._max_steps:
                    break
                # For good: it must not be the first to give way again once it runs.
                request.priority = _FIRST_OF_ALL
                self._heap.push(request)
            del self._since[request]

    def charge(self, request: Request, cost: int) -> None:
        pass


class FairQueue:
    """Virtual token counters (Sheng et al., OSDI 2024): the tenant that was served least goes first, in order of arrival
    within it. A tenant that comes back starts level with those that wait, so that nobody saves up service by staying away."""

    def __init__(self) -> None:
        self._heaps: dict[bytes, _Heap] = {}
        self._served: dict[bytes, int] = {}
        self._last: bytes | None = None  # the tenant whose last waiting request was let in last

    def push(self, request: Request) -> None:
        tenant = request.salt
        waiting = self._waiting()
        if tenant not in waiting:
            level = min((self._served[t] for t in waiting), default=self._served.get(self._last or b"", 0))
            self._served[tenant] = max(self._served.get(tenant, 0), level)
            self._heaps[tenant] = _Heap()
            self._forget(level)
        self._heaps[tenant].push(request)

    def first(self) -> Request | None:
        waiting = self._waiting()
        return min(waiting.values(), key=lambda r: (self._served[r.salt], r.sort_key)) if waiting else None

    def pop_first(self) -> Request:
        request = self.first()
        assert request is not None
        heap = self._heaps[request.salt]
        heap.pop_first()
        if heap.first() is None:
            self._last = request.salt
        return request

    def put_back(self, request: Request) -> None:
        self._heaps.setdefault(request.salt, _Heap()).push(request)

    def forget_ended(self) -> None:
        for heap in self._heaps.values():
            heap.forget_ended()

    def next_step(self) -> None:
        pass

    def charge(self, request: Request, cost: int) -> None:
        self._served[request.salt] = self._served.get(request.salt, 0) + cost

    def _waiting(self) -> dict[bytes, Request]:
        """The first request of each tenant that has one."""
        found: dict[bytes, Request] = {}
        for tenant, heap in list(self._heaps.items()):
            if (request := heap.first()) is None:
                del self._heaps[tenant]
            else:
                found[tenant] = request
        return found

    def _forget(self, level: int) -> None:
        """Tenants that would start at ``level`` anyway need no counter."""
        if len(self._served) > _MAX_TENANTS:
            kept: Iterable[bytes] = [t for t, cost in self._served.items() if cost > level or t in self._heaps]
            self._served = {t: self._served[t] for t in {*kept, self._last} if t is not None and t in self._served}
