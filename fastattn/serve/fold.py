"""From a stream of chunks to the answer that a client gets who asked for no stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastattn.serve.contract import DELTA_TEXTS, APIError, Chunk

_OBJECTS = {"chat.completion.chunk": "chat.completion", "text_completion": "text_completion"}


async def fold_chunks(chunks: AsyncIterator[Chunk]) -> dict[str, Any]:
    """The answer as one object, of chat or text completion; the stream is closed when this returns or raises."""
    fold = Fold()
    async with aclosing(chunks) as stream:  # type: ignore[type-var]
        async for chunk in stream:
            fold.add(chunk)
    return fold.result()


class Fold:
    """Chunks in, one at a time; the answer so far out."""

    def __init__(self) -> None:
        self._head: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._usage: dict[str, Any] | None = None

    def add(self, chunk: Chunk) -> None:
        if not self._head:
            # Whatever else a chunk says of the whole answer (an upstream's fingerprint) stays.
            self._head = {k: v for k, v in chunk.items() if k not in ("choices", "usage", "object") and v is not None}
            self._head["object"] = _OBJECTS[chunk["object"]]
        self._usage = chunk.get("usage") or self._usage
        for part in chunk["choices"]:
            if self._head["object"] == "chat.completion":
                self._add_chat(part)
            else:
                self._add_text(part)

    def result(self) -> dict[str, Any]:
        if not self._head:
            raise APIError(502, "the stream ended before its first chunk", "server_error")
        for choice in self._choices.values():
            if (message := choice.get("message", {})).get("tool_calls") and not message["content"]:
                message["content"] = None  # a stream begins with "" before anybody knows
        answer = {**self._head, "choices": [self._choices[index] for index in sorted(self._choices)]}
        if self._usage is not None:
            answer["usage"] = self._usage
        return answer

    def _add_chat(self, part: dict[str, Any]) -> None:
        index, delta = part["index"], part.get("delta") or {}
        empty = {
            "index": index,
            "message": {"role": "assistant", "content": None, "refusal": None},
            "logprobs": None,
            "finish_reason": None,
        }
        choice = self._choices.setdefault(index, empty)
        message = choice["message"]
        for key in DELTA_TEXTS:
            if delta.get(key) is not None:
                message[key] = (message.get(key) or "") + delta[key]
        for call in delta.get("tool_calls") or ():
            calls = message.setdefault("tool_calls", [])
            while len(calls) <= call["index"]:
                calls.append(empty_call())
            add_call(calls[call["index"]], call)
        for key, values in (part.get("logprobs") or {}).items():
            if values is not None:
                choice["logprobs"] = choice["logprobs"] or {"content": None, "refusal": None}
                choice["logprobs"][key] = (choice["logprobs"].get(key) or []) + values
        _end(choice, part)

    def _add_text(self, part: dict[str, Any]) -> None:
        index = part["index"]
        choice = self._choices.setdefault(index, {"index": index, "text": "", "logprobs": None, "finish_reason": None})
        choice["text"] += part.get("text") or ""
        for key, values in (part.get("logprobs") or {}).items():
            choice["logprobs"] = choice["logprobs"] or {}
            choice["logprobs"][key] = (choice["logprobs"].get(key) or []) + (values or [])
        _end(choice, part)


def empty_call() -> dict[str, Any]:
    return {"id": None, "type": "function", "function": {"name": "", "arguments": ""}}


def add_call(call: dict[str, Any], delta: dict[str, Any]) -> None:
    call["id"] = delta.get("id") or call["id"]
    function = delta.get("function") or {}
    call["function"]["name"] += function.get("name") or ""
    call["function"]["arguments"] += function.get("arguments") or ""


def _end(choice: dict[str, Any], part: dict[str, Any]) -> None:
    choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
    if part.get("stop_reason") is not None:
        choice["stop_reason"] = part["stop_reason"]
