"""What a step computes."""

from __future__ import annotations

from functools import cached_property

from fastattn._runtime import ScheduledBatch
from fastattn.engine.request import Request


class Scheduled(dict[Request, int]):
    """{request: number of tokens}, in the order of the step; complete when it is first asked for more."""

    @cached_property
    def batch(self) -> ScheduledBatch:
        """The same for the runtime, which does to all of them in one call what is done in every step."""
        return ScheduledBatch([request.seq for request in self], list(self.values()))

    @cached_property
    def requests(self) -> list[Request]:
        return list(self)

    @cached_property
    def num_drafted(self) -> dict[Request, int]:
        """Whose next token the step draws, and how many drafts it verifies of each."""
        requests, batch = self.requests, self.batch
        if len(draws := batch.draws) == len(requests):
            return dict(zip(requests, batch.num_drafted, strict=True))
        return {requests[i]: count for i, count in zip(draws, batch.num_drafted, strict=True)}

    @cached_property
    def num_rows(self) -> int:
        """Rows whose next token is drawn: of each of `num_drafted` one, and one for each draft."""
        return len(self.num_drafted) + sum(self.num_drafted.values())
