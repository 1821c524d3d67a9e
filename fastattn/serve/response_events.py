"""A chat's chunks as the events of OpenAI's Responses. Whoever asked for no stream gets the response of the last one.

created, in_progress, then for each item: output_item.added, its parts and deltas, output_item.done; then completed,
incomplete (the token limit, a guard) or failed. Items are what the model thought, what it said, and each of its calls.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import msgspec

from fastattn.serve.contract import APIError, Chunk
from fastattn.serve.protocol import now
from fastattn.serve.responses import ResponsesRequest

Event = dict[str, Any]

_ENDS = {"length": "max_output_tokens", "content_filter": "content_filter"}  # of an answer that is incomplete, and why
# Which deltas of a chat are which part of a message: the part's type, its field, and the name in its events.
_PARTS = {"content": ("output_text", "text", "output_text"), "refusal": ("refusal", "refusal", "refusal")}


async def response_events(
    asked: ResponsesRequest, chunks: AsyncIterator[Chunk], request_id: str
) -> AsyncIterator[Event]:
    """Raises APIError where the chunks do; of a stream that has begun that is the event `response.failed`."""
    answer = _Answer(asked, request_id)
    async with aclosing(chunks) as stream:  # type: ignore[type-var]
        chunk: Chunk | None = await anext(stream, None)
        for kind in ("created", "in_progress"):
            yield answer.event(f"response.{kind}", response=answer.response("in_progress"))
        try:
            while chunk is not None:
                for event in answer.add(chunk):
                    yield event
                chunk = await anext(stream, None)
        except APIError as error:
            if not asked.stream:
                raise
            failed = {"code": error.code or error.type, "message": error.message}
            for event in answer.close("incomplete"):
                yield event
            yield answer.event("response.failed", response=answer.response("failed", error=failed))
            return
    for event in answer.end():
        yield event


async def last_response(events: AsyncIterator[Event]) -> dict[str, Any]:
    """The answer to one who asked for no stream."""
    response: dict[str, Any] = {}
    async with aclosing(events) as stream:  # type: ignore[type-var]
        async for event in stream:
            response = event.get("response", response)
    return response


def named_event(event: Event) -> bytes:
    """On the wire. What is not an event is an error of the server's own."""
    if "type" not in event:
        error = event["error"]
        event = {"type": "error", "code": error["code"] or error["type"], "message": error["message"], "param": None}
    return b"event: " + event["type"].encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"


class _Answer:
    """The response so far."""

    def __init__(self, asked: ResponsesRequest, request_id: str) -> None:
        self._asked, self._request_id = asked, request_id
        self._model, self._created = asked.model, now()
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None  # the message or the thought that is being said
        self._calls: dict[int, dict[str, Any]] = {}  # by the chat's index; they may come in turns, and end together
        self._logprobs: list[dict[str, Any]] = []  # whose text has not come yet
        self._usage: dict[str, Any] | None = None
        self._end: str | None = None
        self._num_events = 0

    def event(self, kind: str, **fields: Any) -> Event:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}

    def response(self, status: str, **fields: Any) -> dict[str, Any]:
        asked = self._asked
        given = asked.model_dump(
            include={"instructions", "max_output_tokens", "temperature", "top_p", "tools", "tool_choice", "metadata",
                     "text", "parallel_tool_calls", "user"},
            by_alias=True, exclude_none=True,
        )  # fmt: skip
        return {
            "id": f"resp_{self._request_id}", "object": "response", "created_at": self._created, "status": status,
            "background": False, "error": None, "incomplete_details": None, "instructions": None,
            "max_output_tokens": None, "model": self._model, "output": copy.deepcopy(self._output),
            "parallel_tool_calls": True, "previous_response_id": None,
            "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
            "service_tier": "default", "store": False, "temperature": 1.0, "tool_choice": "auto", "tools": [],
            "top_p": 1.0, "truncation": "disabled", "usage": self._usage, "user": None, "metadata": {},
            **given, "text": {"format": {"type": "text"}} | given.get("text", {}), **fields,
        }  # fmt: skip

    def add(self, chunk: Chunk) -> Iterator[Event]:
        self._model = chunk.get("model") or self._model
        if usage := chunk.get("usage"):
            self._usage = _usage(usage)
        for choice in chunk["choices"]:
            delta = choice.get("delta") or {}
            self._logprobs += (choice.get("logprobs") or {}).get("content") or []
            for name in ("reasoning_content", "reasoning"):
                if delta.get(name):
                    yield from self._think(delta[name])
            for name in _PARTS:
                if delta.get(name):
                    yield from self._say(name, delta[name])
            for call in delta.get("tool_calls") or ():
                yield from self._call(call)
            self._end = choice.get("finish_reason") or self._end

    def close(self, status: str) -> Iterator[Event]:
        """Ends what is open; status: of what came last."""
        for item in [*([self._open] if self._open else []), *self._calls.values()]:
            yield from self._close(item, status if item is self._output[-1] else "completed")
        self._open, self._calls = None, {}

    def end(self) -> Iterator[Event]:
        if not self._output:  # a message that says nothing
            yield from self._begin_part("content")
        reason = _ENDS.get(self._end or "")
        yield from self.close("completed" if reason is None else "incomplete")
        if reason is None:
            yield self.event("response.completed", response=self.response("completed"))
        else:
            response = self.response("incomplete", incomplete_details={"reason": reason})
            yield self.event("response.incomplete", response=response)

    # ---- items ----

    def _think(self, text: str) -> Iterator[Event]:
        if self._open is None or self._open["type"] != "reasoning":
            yield from self._begin({"type": "reasoning", "summary": [], "content": []}, "rs")
            self._open["content"].append({"type": "reasoning_text", "text": ""})  # type: ignore[index]
        assert self._open is not None
        self._open["content"][0]["text"] += text
        yield self.event("response.reasoning_text.delta", **self._place(self._open), content_index=0, delta=text)

    def _say(self, name: str, text: str) -> Iterator[Event]:
        kind, field, event = _PARTS[name]
        if self._open is None or self._open["type"] != "message" or self._open["content"][-1]["type"] != kind:
            yield from self._begin_part(name)
        assert self._open is not None
        part, more = self._open["content"][-1], {}
        part[field] += text
        if kind == "output_text":
            more["logprobs"], self._logprobs = self._logprobs, []
            if self._asked.wants_logprobs:
                part["logprobs"] += more["logprobs"]
        yield self.event(f"response.{event}.delta", **self._part_place(self._open), delta=text, **more)

    def _call(self, delta: dict[str, Any]) -> Iterator[Event]:
        function = delta.get("function") or {}
        item = self._calls.get(delta["index"])
        if item is None:
            call = {"type": "function_call", "call_id": delta.get("id") or "", "name": "", "arguments": ""}
            yield from self._begin(call | {"name": function.get("name") or ""}, "fc")
            assert self._open is not None
            item = self._calls[delta["index"]] = self._open
            self._open = None
        if text := function.get("arguments"):
            item["arguments"] += text
            yield self.event("response.function_call_arguments.delta", **self._place(item), delta=text)

    def _begin(self, item: dict[str, Any], prefix: str) -> Iterator[Event]:
        """Opens an item; what was being said before it is said."""
        if self._open is not None:
            yield from self._close(self._open, "completed")
        place = len(self._output)
        self._open = {"id": f"{prefix}_{self._request_id}_{place}", "status": "in_progress", **item}
        self._output.append(self._open)
        yield self.event("response.output_item.added", output_index=place, item=copy.deepcopy(self._open))

    def _begin_part(self, name: str) -> Iterator[Event]:
        kind, field, _ = _PARTS[name]
        if self._open is None or self._open["type"] != "message":
            yield from self._begin({"type": "message", "role": "assistant", "content": []}, "msg")
        else:
            yield from self._close_part(self._open)
        assert self._open is not None
        part: dict[str, Any] = {"type": kind, field: ""}
        self._open["content"].append(part | ({"annotations": [], "logprobs": []} if kind == "output_text" else {}))
        yield self.event("response.content_part.added", **self._part_place(self._open), part=self._last_part())

    def _close(self, item: dict[str, Any], status: str) -> Iterator[Event]:
        place = self._place(item)
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self.event("response.function_call_arguments.done", **place, **done)
        elif item["type"] == "reasoning":
            text = item["content"][0]["text"]
            yield self.event("response.reasoning_text.done", **place, content_index=0, text=text)
        else:
            yield from self._close_part(item)
        item["status"] = status
        yield self.event("response.output_item.done", output_index=place["output_index"], item=copy.deepcopy(item))

    def _close_part(self, item: dict[str, Any]) -> Iterator[Event]:
        part, place = item["content"][-1], self._part_place(item)
        if part["type"] == "output_text":
            yield self.event("response.output_text.done", **place, text=part["text"], logprobs=part["logprobs"])
        else:
            yield self.event("response.refusal.done", **place, refusal=part["refusal"])
        yield self.event("response.content_part.done", **place, part=copy.deepcopy(part))

    def _place(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": next(i for i, o in enumerate(self._output) if o is item)}

    def _part_place(self, item: dict[str, Any]) -> dict[str, Any]:
        return {**self._place(item), "content_index": len(item["content"]) - 1}

    def _last_part(self) -> dict[str, Any]:
        assert self._open is not None
        return copy.deepcopy(self._open["content"][-1])


def _usage(chat: dict[str, Any]) -> dict[str, Any]:
    cached = (chat.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    thought = (chat.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": chat["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": chat["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": chat["total_tokens"],
    }
