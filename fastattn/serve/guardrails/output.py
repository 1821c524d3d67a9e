"""The way out: a stream of chunks through the guards, whatever they are split into."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastattn.serve.contract import DELTA_TEXTS, Chunk, RequestContext
from fastattn.serve.fold import add_call, empty_call
from fastattn.serve.guardrails.policy import Act, GuardFailedError, Policy, redact
from fastattn.serve.guardrails.texts import call_slots
from fastattn.serve.guardrails.window import Released, Window

# What else may pass. A server elsewhere may send more, and nobody has looked at that.
_OF_CHOICE = ("index", "finish_reason", "stop_reason")


class OutputGuards:
    """For one answer. Log-probabilities name the tokens, so they wait for the end of their choice, and are left out if
    anything was blocked or redacted. Tool calls wait likewise: nobody can use half of one."""

    def __init__(self, policies: list[Policy], context: RequestContext, num_choices: int) -> None:
        self._policies, self._context, self._num_choices = policies, context, num_choices
        self._choices: dict[int, _Choice] = {}

    async def stream(self, chunks: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
        async with aclosing(chunks) as stream:  # type: ignore[type-var]
            async for chunk in stream:
                parts = [out for part in chunk["choices"] if (out := await self._choice(part).feed(part)) is not None]
                if parts or chunk.get("usage"):
                    yield {**chunk, "choices": parts}
                if self._is_in_vain():
                    break
            else:
                return
        # Leaving has ended the work; what it took until now is what it cost.
        if self._context.usage is not None:
            yield {**chunk, "choices": [], "usage": self._context.usage}

    def _is_in_vain(self) -> bool:
        """Nothing of what follows would be sent, and more than the usage would follow."""
        choices = self._choices.values()
        blocked = sum(choice.is_blocked for choice in choices)
        return blocked == self._num_choices and not all(choice.has_ended for choice in choices)

    def _choice(self, part: dict[str, Any]) -> _Choice:
        index = part["index"]
        if index not in self._choices:
            self._choices[index] = _Choice(self._policies, self._context)
        return self._choices[index]


class _Choice:
    def __init__(self, policies: list[Policy], context: RequestContext) -> None:
        self._policies, self._context = policies, context
        self._windows: dict[str, Window] = {}
        self._calls: dict[int, dict[str, Any]] = {}  # as far as they have come
        self._logprobs: dict[str, Any] = {}
        self._is_marked = False
        self.is_blocked = False
        self.has_ended = False  # by itself

    async def feed(self, part: dict[str, Any]) -> dict[str, Any] | None:
        """The part as it may be sent now; None when nothing of it may, or is left."""
        final = part.get("finish_reason") is not None
        self.has_ended = self.has_ended or final
        if self.is_blocked:
            return None
        for key, values in (part.get("logprobs") or {}).items():
            if values is not None:
                self._logprobs[key] = self._logprobs.get(key, []) + values
        out = {name: part[name] for name in _OF_CHOICE if name in part} | {"logprobs": None}
        try:
            sent = await self._chat(part, out, final) if "delta" in part else await self._text(part, out, final)
        except GuardFailedError:
            self._block(out)
            return out
        if final and not self.is_blocked and self._logprobs and not self._is_marked:
            out["logprobs"] = self._logprobs
        return out if sent or final or self.is_blocked else None

    async def _text(self, part: dict[str, Any], out: dict[str, Any], final: bool) -> bool:
        out["text"] = await self._pass("text", part.get("text") or "", final, out)
        return bool(out["text"])

    async def _chat(self, part: dict[str, Any], out: dict[str, Any], final: bool) -> bool:
        given = part["delta"] or {}
        delta = {"role": given["role"]} if given.get("role") else {}
        out["delta"] = delta
        for name in DELTA_TEXTS:
            new = given.get(name)
            if new is None and not (final and name in self._windows):
                continue
            text = await self._pass(name, new or "", final, out)
            # The first delta says "" to tell that text will come; later ones say nothing or something.
            if text or new == "":
                delta[name] = text
            if self.is_blocked:
                return True
        for call in given.get("tool_calls") or ():
            add_call(self._calls.setdefault(call["index"], empty_call()), call)
        calls = []
        for index in sorted(self._calls) if final else ():
            await self._check_call(self._calls[index], out)
            if self.is_blocked:
                return True
            calls.append({"index": index, **self._calls[index]})
        if calls:
            delta["tool_calls"] = calls
        return bool(delta)

    async def _pass(self, name: str, text: str, final: bool, out: dict[str, Any]) -> str:
        if name not in self._windows:
            self._windows[name] = Window(self._policies)
        released: Released = await self._windows[name].feed(text, final)
        self._note(released.acts)
        if released.blocked is not None:
            self._block(out)
        return released.text

    async def _check_call(self, call: dict[str, Any], out: dict[str, Any]) -> None:
        for slot in list(call_slots(call, "assistant")):
            acts: list[Act] = []
            for policy in self._policies:
                if policy.config.kind != "json_schema":  # which is about the answer's text
                    acts += (await policy.scan(slot.text, 0, True))[0]
            acts = [act for act in acts if act.label is not None]
            self._note(acts)
            if any(act.action == "block" for act in acts):
                self._block(out)
                return
            if any(act.action == "redact" for act in acts):
                slot.put(redact(slot.text, acts))

    def _note(self, acts: list[Act]) -> None:
        for act in acts:
            policy = next(p for p in self._policies if p.config.name == act.guard)
            policy.count(act, "output", self._context.request_id)
        if any(act.action != "log" for act in acts):
            self._mark()

    def _mark(self) -> None:
        if not self._is_marked:
            self._is_marked = True
            for call in self._context.on_refusal:
                call()

    def _block(self, out: dict[str, Any]) -> None:
        self.is_blocked = True
        self._mark()
        out["finish_reason"] = "content_filter"
        out.pop("stop_reason", None)
