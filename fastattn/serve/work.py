"""A request as the front keeps it until it ends: enough for another engine to go on with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from fastattn.serve import messages as m
from fastattn.serve.contract import APIError


@dataclass
class Work:
    """stuck: engine processes that died with it and in which it got nowhere. progress: since the last (re)start."""

    message: m.Generate | m.Embed
    position: int
    tell: Callable[[tuple[int, m.Output] | APIError], None]
    tokens: list[list[int]]
    finished: list[bool]
    has_prompt_logprobs: bool = False
    progress: bool = False
    stuck: int = 0
    arrival: float = field(default_factory=time.monotonic)

    @property
    def continued(self) -> m.Generate | m.Embed:
        """The request as a new engine process needs it."""
        message = self.message
        if isinstance(message, m.Embed):
            return message
        sampling = message.sampling
        if self.has_prompt_logprobs:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        return msgspec.structs.replace(message, sampling=sampling, resume=self.tokens if any(self.tokens) else None)


def merged(items: list[tuple[int, m.Output] | APIError]) -> list[tuple[int, m.Output]]:
    """What came for each request since the reader last looked, as one; an error if there is one."""
    found: dict[int, m.Output] = {}
    for item in items:
        if isinstance(item, APIError):
            raise item
        position, new = item
        old = found.setdefault(position, new)
        if old is new:
            continue
        choices = {choice.index: choice for choice in old.choices}
        for choice in new.choices:
            before = choices.get(choice.index)
            if before is None:
                old.choices.append(choice)
                continue
            before.text += choice.text
            before.token_ids = before.token_ids + choice.token_ids
            if choice.logprobs is not None:
                before.logprobs = (before.logprobs or []) + choice.logprobs
            before.finish_reason, before.stop_reason = choice.finish_reason, choice.stop_reason
        old.finished = new.finished
        old.num_cached_tokens = new.num_cached_tokens
        old.prompt_logprobs = old.prompt_logprobs or new.prompt_logprobs
        old.embedding = new.embedding
    return list(found.items())
