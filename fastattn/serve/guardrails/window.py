"""A text that comes in pieces, let out piece by piece once no guard can still object to it."""

from __future__ import annotations

from typing import NamedTuple

from fastattn.serve.guardrails.policy import Act, Policy, redact

_CONTEXT = 64  # characters before what is held, for guards that look back over a border


class Released(NamedTuple):
    """text: may be sent. acts: what was found in it. blocked: the act that ends the text here."""

    text: str
    acts: list[Act]
    blocked: Act | None


class Window:
    """The cut between what is sent and what is held never goes through anything that a guard found or may yet find, so
    what comes out is the same however the text was split.

    Policies that only log are asked at the end and hold nothing back.
    """

    def __init__(self, policies: list[Policy]) -> None:
        acting = [policy for policy in policies if policy.config.action != "log"]
        self._watching = [policy for policy in policies if policy.config.action == "log"]
        self._acting = acting
        self._needs_all = any(policy.guard.needs_whole_text for policy in acting)
        self._text, self._start = "", 0  # context and held text, and where the latter begins
        self._all: list[str] = []

    async def feed(self, text: str, final: bool = False) -> Released:
        """Raises GuardFailedError."""
        self._text += text
        if self._watching:
            self._all.append(text)
        if self._needs_all and not final:
            return Released("", [], None)
        acts, settled = await self._scan(final)
        watched = await self._watch() if final else []
        cut = _clear_of(acts, settled)
        block = min((act for act in acts if act.action == "block" and act.label and act.start < cut), default=None)
        if block is not None:
            # Whatever else began before the block and reaches into it is held with it.
            cut = _clear_of([act for act in acts if act.label is not None], block.start)
        done = [act for act in acts if act.end <= cut and act.label is not None]
        if block is not None:
            done.append(block)
        sent = self._text[self._start : cut]
        shifted = [
            act._replace(start=act.start - self._start, end=act.end - self._start) for act in done if act is not block
        ]
        released = Released(redact(sent, shifted), done + watched, block)
        context = max(0, cut - _CONTEXT)
        self._text, self._start = self._text[context:], cut - context
        return released

    async def _scan(self, final: bool) -> tuple[list[Act], int]:
        acts: list[Act] = []
        settled = len(self._text)
        for policy in self._acting:
            found, until = await policy.scan(self._text, self._start, final)
            acts += found
            settled = min(settled, until)
        return acts, max(settled, self._start)

    async def _watch(self) -> list[Act]:
        text = "".join(self._all)
        return [act for p in self._watching for act in (await p.scan(text, 0, True))[0] if act.label is not None]


def _clear_of(acts: list[Act], position: int) -> int:
    """The last position up to this one that goes through no finding."""
    while True:
        through = min((act.start for act in acts if act.start < position < act.end), default=position)
        if through == position:
            return position
        position = through
