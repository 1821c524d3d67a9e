"""Guardrails: what may go in, what may come out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing

from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from fastattn.serve.contract import APIError, Backend, Chunk, RequestContext
from fastattn.serve.guardrails.config import (
    GuardConfig,
    GuardrailsConfig,
    InjectionGuardConfig,
    PatternGuardConfig,
    PIIGuardConfig,
    PresidioGuardConfig,
    SchemaGuardConfig,
    SizeGuardConfig,
    WordGuardConfig,
)
from fastattn.serve.guardrails.guard import Guard
from fastattn.serve.guardrails.injection import InjectionGuard
from fastattn.serve.guardrails.output import OutputGuards
from fastattn.serve.guardrails.patterns import PatternGuard, WordGuard
from fastattn.serve.guardrails.pii import PIIGuard
from fastattn.serve.guardrails.policy import Act, GuardFailedError, GuardMetrics, Policy, redact
from fastattn.serve.guardrails.texts import Request, Slot, slots
from fastattn.serve.guardrails.whole import PresidioGuard, SchemaGuard
from fastattn.serve.protocol import ChatCompletionRequest, Message

Decode = Callable[[str, list[int]], Awaitable[str]]  # (model, token ids)


class Guardrails:
    """A Backend around another.

    decode: token ids to text, for prompts that are ids; without it they are refused while a guard looks at what goes in.
    guards: in place of those that the configuration makes, by name.
    """

    def __init__(
        self,
        config: GuardrailsConfig,
        inner: Backend,
        *,
        decode: Decode | None = None,
        registry: CollectorRegistry | None = None,
        guards: dict[str, Guard] | None = None,
    ) -> None:
        self._inner, self._decode, self._metrics = inner, decode, GuardMetrics(registry)
        self._sizes = [guard for guard in config.guards if isinstance(guard, SizeGuardConfig)]
        others = [guard for guard in config.guards if not isinstance(guard, SizeGuardConfig)]
        self._policies = [Policy(c, (guards or {}).get(c.name) or build_guard(c), self._metrics) for c in others]
        self._input = [policy for policy in self._policies if "input" in policy.config.directions]
        self._output = [policy for policy in self._policies if "output" in policy.config.directions]

    async def stream(self, request: Request, context: RequestContext) -> AsyncIterator[Chunk]:
        begun = time.perf_counter()
        self._check_sizes(request, context)
        if self._input:
            request = await self._check_input(request, context)
        self._metrics.seconds.observe(time.perf_counter() - begun)
        chunks = self._inner.stream(request, context)
        if self._output:
            num_prompts = 1 if isinstance(request, ChatCompletionRequest) else len(request.prompts)
            chunks = OutputGuards(self._output, context, num_prompts * (request.n or 1)).stream(chunks)
        async with aclosing(chunks) as stream:  # type: ignore[type-var]
            async for chunk in stream:
                yield chunk

    async def close(self) -> None:
        for policy in self._policies:
            policy.close()

    def _check_sizes(self, request: Request, context: RequestContext) -> None:
        if not self._sizes:
            return
        if isinstance(request, ChatCompletionRequest):
            lengths = [_num_chars(message) for message in request.messages]
        else:
            lengths = [len(prompt) for prompt in request.prompts]
        for guard in self._sizes:
            measured = (
                ("max_prompt_chars", sum(lengths), guard.max_prompt_chars),
                ("max_message_chars", max(lengths), guard.max_message_chars),
                ("max_messages", len(lengths), guard.max_messages),
            )
            for name, value, limit in measured:
                if limit is not None and value > limit:
                    self._metrics.findings.labels(guard.name, "input", guard.action).inc()
                    if guard.action == "block":
                        raise _refusal(guard.name, f"{name} is {limit}, the request has {value}")

    async def _check_input(self, request: Request, context: RequestContext) -> Request:
        """The request, with what is to be redacted redacted. Raises APIError."""
        data = request.model_dump(mode="python", by_alias=True, exclude_unset=True)
        decoded = await self._decode_prompts(request)
        texts = list(slots(data, lambda ids: decoded[tuple(ids)]))
        redacting = ""
        for slot in texts:
            acts = await self._scan_slot(slot)
            for act in acts:
                self._policy(act).count(act, "input", context.request_id)
            block = next((act for act in acts if act.action == "block"), None)
            if block is not None:
                raise _refusal(block.guard, f"it has what is not allowed here: {block.label}")
            if found := next((act for act in acts if act.action == "redact"), None):
                slot.put(redact(slot.text, acts))
                redacting = found.guard
            await asyncio.sleep(0)  # others' turns between the texts of a long request
        if not redacting:
            return request
        prompts = data.get("prompt")
        if isinstance(prompts, list) and any(isinstance(prompt, str) for prompt in prompts):
            # One of several prompts of token ids became text, so all do.
            data["prompt"] = [p if isinstance(p, str) else decoded[tuple(p)] for p in prompts]
        try:
            return type(request).model_validate(data)
        except ValidationError:  # a tool's name, say
            raise _refusal(redacting, "what is to be redacted stands where it cannot be replaced") from None

    async def _decode_prompts(self, request: Request) -> dict[tuple[int, ...], str]:
        prompts = () if isinstance(request, ChatCompletionRequest) else request.prompts
        found: dict[tuple[int, ...], str] = {}
        for prompt in prompts:
            if not isinstance(prompt, str):
                if self._decode is None:
                    raise _refusal(self._input[0].config.name, "a prompt of token ids cannot be looked at")
                try:
                    found[tuple(prompt)] = await self._decode(request.model, prompt)
                except ValueError as error:
                    raise _refusal(self._input[0].config.name, str(error)) from None
        return found

    async def _scan_slot(self, slot: Slot) -> list[Act]:
        acts: list[Act] = []
        for policy in self._input:
            if slot.role in policy.config.roles:
                try:
                    found, _ = await policy.scan(slot.text, 0, True)
                except GuardFailedError as error:
                    text = f"the guardrail {str(error)!r} cannot judge the request at the moment"
                    raise APIError(503, text, "server_error", code="guardrail_unavailable") from None
                acts += [act for act in found if act.label is not None]
        return acts

    def _policy(self, act: Act) -> Policy:
        return next(policy for policy in self._policies if policy.config.name == act.guard)


def _num_chars(message: Message) -> int:
    texts = [message.text, message.refusal, message.reasoning_content, message.reasoning]
    texts += [call.function.arguments for call in message.tool_calls or ()]
    return sum(len(text or "") for text in texts)


def build_guard(config: GuardConfig) -> Guard:
    """Raises ValueError for what a guard cannot be made of, ImportError that names the extra."""
    if isinstance(config, PatternGuardConfig):
        return PatternGuard(config.patterns, case_sensitive=config.case_sensitive, window=config.window)
    if isinstance(config, WordGuardConfig):
        return WordGuard(config.words)
    if isinstance(config, PIIGuardConfig):
        return PIIGuard(config.kinds)
    if isinstance(config, InjectionGuardConfig):
        return InjectionGuard(config.threshold)
    if isinstance(config, SchemaGuardConfig):
        return SchemaGuard(config.json_schema)
    if isinstance(config, PresidioGuardConfig):
        return PresidioGuard(config)
    raise TypeError(f"no guard is made of {type(config).__name__}")


def build_guardrails(
    config: GuardrailsConfig,
    inner: Backend,
    *,
    decode: Decode | None = None,
    registry: CollectorRegistry | None = None,
) -> Guardrails:
    return Guardrails(config, inner, decode=decode, registry=registry)


def _refusal(guard: str, why: str) -> APIError:
    text = f"the request was refused by the guardrail {guard!r}: {why}"
    return APIError(400, text, "content_policy_error", code="content_policy_violation")
