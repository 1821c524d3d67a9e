"""Our own engine as a Backend: a validated request becomes token ids and sampling parameters, outputs become chunks."""

from __future__ import annotations

import json
import secrets
import string
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any
from urllib.parse import quote

from fastattn.serve import messages as m
from fastattn.serve.contract import APIError, Chunk, RequestContext
from fastattn.serve.engine_client import EngineClient
from fastattn.serve.logprobs import chat_logprobs, text_logprobs
from fastattn.serve.metrics import EngineMetrics
from fastattn.serve.protocol import ChatCompletionRequest, CompletionRequest, EmbeddingRequest, now, usage
from fastattn.serve.renderer import Renderer
from fastattn.serve.tools import ToolReader, forced_schema, reader_for


class EngineBackend:
    """Whatever model a request names, this engine answers it: choosing is somebody else's."""

    def __init__(self, client: EngineClient, renderer: Renderer, metrics: EngineMetrics) -> None:
        self._client, self._renderer, self._metrics = client, renderer, metrics

    async def stream(
        self, request: ChatCompletionRequest | CompletionRequest, context: RequestContext
    ) -> AsyncIterator[Chunk]:
        clock = _Clock(self._metrics)
        prompts = await self._prompts(request)
        sampling = _sampling(request)
        works = [
            m.Generate(f"{context.request_id}-{i}", ids, self._fit(ids, sampling), context.priority, context.tenant)
            for i, ids in enumerate(prompts)
        ]
        # A model's name may be a path in any alphabet; a header may not.
        context.headers.setdefault("x-fastattn-model", quote(request.model, safe=string.punctuation + " "))
        if isinstance(request, ChatCompletionRequest):
            answer: _ChatAnswer | _TextAnswer = _ChatAnswer(request, context)
        else:
            answer = _TextAnswer(request, context, await self._echoes(request, prompts))
        num_prompt, num_generated, num_cached = sum(map(len, prompts)), 0, [0] * len(prompts)
        async with aclosing(self._client.generate(works)) as outputs:  # type: ignore[type-var]
            async for position, output in outputs:
                clock.output(output)
                num_generated += sum(len(choice.token_ids) for choice in output.choices)
                num_cached[position] = output.num_cached_tokens
                context.usage = usage(num_prompt, num_generated, sum(num_cached))
                for chunk in answer.chunks(position, output):
                    yield chunk
        self._metrics.num_prompt_tokens.observe(num_prompt)
        self._metrics.num_generated_tokens.observe(num_generated)
        yield answer.head([]) | {"usage": usage(num_prompt, num_generated, sum(num_cached))}

    async def embed(self, request: EmbeddingRequest, context: RequestContext) -> tuple[list[list[float]], int]:
        """An embedding for each input, and how many tokens they had."""
        prompts = await self._encode(list(request.prompts))
        works = [
            m.Embed(f"{context.request_id}-{i}", ids, context.priority, context.tenant) for i, ids in enumerate(prompts)
        ]
        found: list[list[float]] = [[] for _ in prompts]
        async with aclosing(self._client.generate(works)) as outputs:  # type: ignore[type-var]
            async for position, output in outputs:
                if output.embedding is not None:
                    found[position] = output.embedding
        return found, sum(map(len, prompts))

    async def _prompts(self, request: ChatCompletionRequest | CompletionRequest) -> list[list[int]]:
        if isinstance(request, CompletionRequest):
            return await self._encode(list(request.prompts))
        tools = request.tools if request.tool_choice != "none" else None
        return [await self._renderer.chat(request.messages, tools, variables=request.template_variables)]

    async def _encode(self, prompts: list[str | list[int]]) -> list[list[int]]:
        """Texts are tokenized together; token ids stay as they are, and are checked by the engine."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        encoded = iter(await self._renderer.encode(texts) if texts else [])
        return [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]

    async def _echoes(self, request: CompletionRequest, prompts: list[list[int]]) -> list[str] | None:
        if not request.echo:
            return None
        given = request.prompts
        return [
            text if isinstance(text, str) else await self._renderer.decode(ids)
            for text, ids in zip(given, prompts, strict=True)
        ]

    def _fit(self, ids: list[int], sampling: m.Sampling) -> m.Sampling:
        """Refuses what is longer than the model; the engine does too, but not for a token limit that is too high."""
        assert self._client.info is not None
        limit = self._client.info.max_model_len
        wanted = sampling.max_tokens
        if len(ids) + (wanted or 1) > limit:
            asked = f" and max_tokens = {wanted}" if wanted is not None else ""
            text = f"the prompt has {len(ids)} tokens{asked}, and the model takes {limit} tokens in all"
            raise APIError(400, text, param="max_tokens" if len(ids) < limit else None, code="context_length_exceeded")
        return sampling


def _sampling(request: ChatCompletionRequest | CompletionRequest) -> m.Sampling:
    stop = [request.stop] if isinstance(request.stop, str) else list(request.stop or ())
    if isinstance(request, ChatCompletionRequest):
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        prompt_logprobs = None
    else:
        logprobs = request.logprobs
        prompt_logprobs = request.logprobs if request.echo else None
    # A seed of our own where the client gave none: an engine that takes over draws the same tokens.
    return m.Sampling(
        seed=request.seed if request.seed is not None else secrets.randbits(63),
        n=request.n or 1,
        temperature=_or(request.temperature, 1.0),
        top_p=_or(request.top_p, 1.0),
        top_k=request.top_k or 0,
        min_p=request.min_p or 0.0,
        max_tokens=request.max_new_tokens,
        min_tokens=request.min_tokens or 0,
        stop=stop,
        stop_token_ids=request.stop_token_ids or [],
        ignore_eos=bool(request.ignore_eos),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        logit_bias={int(token): bias for token, bias in (request.logit_bias or {}).items()},
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        skip_special_tokens=request.skip_special_tokens is not False,
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        structured_output=_structure(request),
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _structure(request: ChatCompletionRequest | CompletionRequest) -> m.Structure | None:
    if isinstance(request, ChatCompletionRequest) and (schema := forced_schema(request)) is not None:
        return m.Structure("json_schema", json.dumps(schema))
    form = request.response_format
    if form is not None and form.json_schema is not None:
        return m.Structure("json_schema", json.dumps(form.json_schema.schema_))
    if form is not None and form.type == "json_object":
        return m.Structure("json_object")
    asked = request.structure
    if asked is None:
        return None
    if asked.json_ is not None:
        return m.Structure("json_schema", asked.json_ if isinstance(asked.json_, str) else json.dumps(asked.json_))
    if asked.regex is not None:
        return m.Structure("regex", asked.regex)
    if asked.choice is not None:
        return m.Structure("choice", asked.choice)
    return m.Structure("grammar", asked.grammar) if asked.grammar is not None else m.Structure("json_object")


class _Clock:
    """Latencies of one request, as its reader sees them."""

    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = metrics
        self._start = self._last = time.monotonic()
        self._first = True

    def output(self, output: m.Output) -> None:
        at = time.monotonic()
        num_tokens = max((len(choice.token_ids) for choice in output.choices), default=0)
        if num_tokens:
            if self._first:
                self._metrics.ttft.observe(at - self._start)
                self._metrics.queue_time.observe(output.queue_seconds)
            else:
                self._metrics.itl.observe((at - self._last) / num_tokens)
            self._first, self._last = False, at
        for choice in output.choices:
            if choice.finish_reason is not None:
                self._metrics.success[choice.finish_reason].inc()
        if output.finished:
            self._metrics.e2e.observe(at - self._start)


class _Answer:
    def __init__(self, kind: str, prefix: str, model: str, context: RequestContext) -> None:
        self._head = {"id": prefix + context.request_id, "object": kind, "created": now(), "model": model}

    def head(self, choices: list[dict[str, Any]]) -> Chunk:
        return {**self._head, "choices": choices}


class _ChatAnswer(_Answer):
    def __init__(self, request: ChatCompletionRequest, context: RequestContext) -> None:
        super().__init__("chat.completion.chunk", "chatcmpl-", request.model, context)
        self._request = request
        self._readers: dict[int, ToolReader | None] = {}

    def chunks(self, position: int, output: m.Output) -> list[Chunk]:
        return [chunk for choice in output.choices for chunk in self._choice(choice)]

    def _choice(self, choice: m.Choice) -> list[Chunk]:
        deltas: list[dict[str, Any]] = []
        if choice.index not in self._readers:
            self._readers[choice.index] = reader_for(self._request)
            deltas.append({"role": "assistant", "content": ""})
        reader = self._readers[choice.index]
        if reader is not None:
            deltas += reader.feed(choice.text)
            deltas += reader.finish() if choice.finish_reason is not None else []
            if self._request.parallel_tool_calls is False:
                deltas = [delta for delta in deltas if all(call["index"] == 0 for call in delta.get("tool_calls", ()))]
        elif choice.text:
            deltas.append({"content": choice.text})
        logprobs = None
        if choice.logprobs and self._request.logprobs:
            logprobs = chat_logprobs(choice.logprobs, self._request.top_logprobs or 0)
        if choice.finish_reason is None and not deltas and logprobs is None:
            return []
        chunks: list[dict[str, Any]] = [
            {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas
        ]
        if logprobs is not None:
            if not chunks or (len(chunks) == 1 and "role" in chunks[0]["delta"]):
                chunks.append({"index": choice.index, "delta": {}, "logprobs": None, "finish_reason": None})
            chunks[-1]["logprobs"] = logprobs
        if choice.finish_reason is not None:
            called = reader is not None and reader.num_calls > 0 and choice.finish_reason == "stop"
            last: dict[str, Any] = {"index": choice.index, "delta": {}, "logprobs": None}
            last["finish_reason"] = "tool_calls" if called else choice.finish_reason
            if choice.stop_reason is not None:
                last["stop_reason"] = choice.stop_reason
            chunks.append(last)
        return [self.head([chunk]) for chunk in chunks]


class _TextAnswer(_Answer):
    def __init__(self, request: CompletionRequest, context: RequestContext, echoes: list[str] | None) -> None:
        super().__init__("text_completion", "cmpl-", request.model, context)
        self._request, self._echoes = request, echoes
        self._n = request.n or 1
        self._offsets: dict[int, int] = {}  # characters of each completion so far

    def chunks(self, position: int, output: m.Output) -> list[Chunk]:
        made = []
        for choice in output.choices:
            index = position * self._n + choice.index
            if index not in self._offsets:
                self._offsets[index] = 0
                if self._echoes is not None:
                    made.append(self._chunk(index, self._echoes[position], output.prompt_logprobs, choice=None))
            if choice.text or choice.logprobs or choice.finish_reason is not None:
                made.append(self._chunk(index, choice.text, choice.logprobs, choice))
        return made

    def _chunk(self, index: int, text: str, rows: list[list[m.TokenLogprob]] | None, choice: m.Choice | None) -> Chunk:
        logprobs = None
        if self._request.logprobs is not None and rows:
            logprobs, self._offsets[index] = text_logprobs(rows, self._request.logprobs, self._offsets[index])
        part: dict[str, Any] = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
        if choice is not None:
            part["finish_reason"] = choice.finish_reason
            if choice.stop_reason is not None:
                part["stop_reason"] = choice.stop_reason
        return self.head([part])
