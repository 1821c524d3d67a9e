"""A Backend that answers by script, and what tests of the gateway's parts need around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

from fastattn.serve.contract import APIError, Backend, Chunk, RequestContext
from fastattn.serve.fold import Fold
from fastattn.serve.protocol import ChatCompletionRequest, CompletionRequest

Request = ChatCompletionRequest | CompletionRequest


def wait(coroutine: Coroutine[Any, Any, Any], seconds: float = 60) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, seconds))


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """A machine may be slow; a condition that never comes is an error."""
    for _ in range(int(seconds / 0.005)):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"it did not come true in {seconds} s")


def chat(text: str = "hello", **fields: Any) -> ChatCompletionRequest:
    messages = fields.pop("messages", [{"role": "user", "content": text}])
    body = {"model": "m", "temperature": 0.0, "messages": messages} | fields
    return ChatCompletionRequest.model_validate(body)


def completion(prompt: Any = "hello", **fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "temperature": 0.0, "prompt": prompt} | fields)


def context(tenant: str = "", *cache_control: str, request_id: str = "r", **headers: str) -> RequestContext:
    return RequestContext(request_id, tenant, 0, frozenset(cache_control), headers)


def chunks(
    request: Request,
    pieces: Sequence[str],
    *,
    index: int = 0,
    finish: str | None = "stop",
    logprobs: Sequence[float] = (),
    usage: bool = True,
) -> list[Chunk]:
    """An answer in these pieces, as an engine gives it: role, pieces, end, usage."""
    is_chat = isinstance(request, ChatCompletionRequest)
    kind = "chat.completion.chunk" if is_chat else "text_completion"
    head = {"id": "chatcmpl-1" if is_chat else "cmpl-1", "object": kind, "created": 1, "model": request.model}

    def part(piece: str | None, end: str | None = None, logprob: float | None = None) -> Chunk:
        choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": end}
        if is_chat:
            choice["delta"] = {} if piece is None else {"content": piece}
            if logprob is not None:
                choice["logprobs"] = {"content": [{"token": piece, "logprob": logprob, "top_logprobs": []}]}
        else:
            choice["text"] = piece or ""
            if logprob is not None:
                choice["logprobs"] = {"tokens": [piece], "token_logprobs": [logprob]}
        return {**head, "choices": [choice]}

    values = list(logprobs) + [None] * (len(pieces) - len(logprobs))
    out = [part(piece, None, value) for piece, value in zip(pieces, values, strict=True)]
    if is_chat:
        first = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        out.insert(0, {**head, "choices": [first]})
    if finish is not None:
        out.append(part(None, finish))
    if usage:
        counts = {"prompt_tokens": 3, "completion_tokens": len(pieces), "total_tokens": 3 + len(pieces)}
        out.append({**head, "choices": [], "usage": counts})
    return out


class Scripted:
    """answer(request, context) says what each call gives: chunks, and exceptions that are raised in their place. gate: each
    chunk waits for it. Counts calls, and streams that were left early."""

    def __init__(self, answer: Callable[[Request, RequestContext], Sequence[Chunk | Exception]]) -> None:
        self._answer = answer
        self.requests: list[Request] = []
        self.contexts: list[RequestContext] = []
        self.num_left = 0
        self.num_running = 0
        self.gate = asyncio.Event()
        self.gate.set()

    @property
    def num_calls(self) -> int:
        return len(self.requests)

    async def stream(self, request: Request, context: RequestContext) -> AsyncIterator[Chunk]:
        self.requests.append(request)
        self.contexts.append(context)
        self.num_running += 1
        finished = False
        try:
            for item in self._answer(request, context):
                await asyncio.sleep(0)
                await self.gate.wait()
                if isinstance(item, Exception):
                    finished = True
                    raise item
                yield item
            finished = True
        finally:
            self.num_running -= 1
            self.num_left += not finished


def saying(*pieces: str, **more: Any) -> Scripted:
    return Scripted(lambda request, _: chunks(request, pieces, **more))


async def ask(backend: Backend, request: Request, context: RequestContext) -> dict[str, Any]:
    """The whole answer, with the number of its chunks."""
    fold, count = Fold(), 0
    async with aclosing(backend.stream(request, context)) as stream:  # type: ignore[type-var]
        async for chunk in stream:
            fold.add(chunk)
            count += 1
    return {**fold.result(), "num_chunks": count}


def text_of(answer: dict[str, Any], index: int = 0) -> str:
    choice = next(choice for choice in answer["choices"] if choice["index"] == index)
    return choice["message"]["content"] if "message" in choice else choice["text"]


async def text(backend: Backend, request: Request, context: RequestContext) -> str:
    return text_of(await ask(backend, request, context))


async def error_of(backend: Backend, request: Request, context: RequestContext) -> APIError:
    try:
        answer = await ask(backend, request, context)
    except APIError as error:
        return error
    raise AssertionError(f"an answer came: {answer}")


async def until_error(backend: Backend, request: Request, context: RequestContext) -> tuple[str, APIError]:
    """(text, error) of an answer that breaks off."""
    got = ""
    try:
        async for chunk in backend.stream(request, context):
            got += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
    except APIError as error:
        return got, error
    raise AssertionError(f"it came to its end: {got!r}")
