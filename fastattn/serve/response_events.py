"""A chat's chunks as the events of OpenAI's Responses. Whoever asked for no stream gets the response of the last one.

created, in_progress, then for each item: output_item.added, its parts and deltas, output_item.done; then completed,
incomplete (the token limit, a guard) or failed. Items are what the model thought, what it said, and each of its calls.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Any

import msgspec

from fastattn.serve.contract import APIError, Chunk
from fastattn.serve.protocol import now
from fastattn.serve.responses import ResponsesRequest

logger = logging.getLogger("fastattn.serve")

Event = dict[str, Any]

_ENDS = {"length": "max_output_tokens", "content_filter": "content_filter"}  # of an answer that is incomplete, and why
# Which deltas of a chat are which part of a message: the part's type, its field, and the name in its events.
_PARTS = {"content": ("output_text", "text", "output_text"), "refusal": ("refusal", "refusal", "refusal")}


async def response_events(
    asked: ResponsesRequest,
    chunks: AsyncIterator[Chunk],
    request_id: str,
    has_begun: Callable[[], bool] = lambda: False,
) -> AsyncIterator[Event]:
    """has_begun: whether a stream's headers are out before its first event, so that no status can be said any more.

    Raises what the chunks do; of a stream that has begun that is the event `response.failed`.
    """
    answer, is_first = _Answer(asked, request_id), True
    async with aclosing(chunks) as stream:  # type: ignore[type-var]
        try:
            async for chunk in stream:
                if is_first:
                    for event in answer.begin():
                        yield event
                    is_first = False
                for event in answer.add(chunk):
                    yield event
            if is_first:
                raise APIError(502, "the stream ended before its first chunk", "server_error")
            for event in answer.end():
                yield event
        except Exception as error:
            if not asked.stream or (is_first and not has_begun()):
                raise
            if not isinstance(error, APIError):
                logger.exception("a stream ended with an error of ours")
                error = APIError(500, "internal error", "server_error")
            if is_first:
                for event in answer.begin():
                    yield event
            for event in answer.fail(error):
                yield event


async def last_response(events: AsyncIterator[Event]) -> dict[str, Any]:
    """The answer to one who asked for no stream."""
    response: dict[str, Any] = {}
    async with aclosing(events) as stream:  # type: ignore[type-var]
        async for event in stream:
            response = event.get("response", response)
    return response


def named_event(event: Event) -> bytes:
    """On the wire. Where there is no event, but an error of the server's own behind the last one, it is one by itself."""
    if "type" not in event:
        error = event["error"]
        event = {"type": "error", "sequence_number": 0, **{name: error[name] for name in ("code", "message", "param")}}
    return b"event: " + event["type"].encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"


class _Answer:
    """The response so far. What is in an event stays as it is until that is on the wire: an item is copied where it begins,
    and does not change once it is done. Whole answers are not copied, which takes a second for many log-probabilities.
    """

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
            "max_output_tokens": None, "model": self._model, "output": list(self._output),
            "parallel_tool_calls": True, "previous_response_id": None,
            "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
            "service_tier": "default", "store": False, "temperature": 1.0, "tool_choice": "auto", "tools": [],
            "top_p": 1.0, "truncation": "disabled", "usage": self._usage, "user": None, "metadata": {},
            **given, "text": {"format": {"type": "text"}} | given.get("text", {}), **fields,
        }  # fmt: skip

    def begin(self) -> Iterator[Event]:
        for kind in ("created", "in_progress"):
            yield self.event(f"response.{kind}", response=self.response("in_progress"))

    def add(self, chunk: Chunk) -> Iterator[Event]:
        self._model = chunk.get("model") or self._model
        if usage := chunk.get("usage"):
            self._usage = _usage(usage)
        for choice in chunk["choices"]:
            if choice.get("index"):  # a response has one
                continue
            delta = choice.get("delta") or {}
            self._logprobs += map(_logprob, (choice.get("logprobs") or {}).get("content") or [])
            if thought := delta.get("reasoning_content") or delta.get("reasoning"):  # some servers say it twice
                yield from self._think(thought)
            for name in _PARTS:
                if delta.get(name):
                    yield from self._say(name, delta[name])
            for call in delta.get("tool_calls") or ():
                yield from self._call(call)
            self._end = choice.get("finish_reason") or self._end

    def close(self, status: str) -> Iterator[Event]:
        """Ends what is open; status: of what came last."""
        yield from self._begin_calls()  # of functions without arguments
        for item in [*([self._open] if self._open else []), *self._calls.values()]:
            yield from self._close(item, status if item is self._output[-1] else "completed")
        self._open, self._calls = None, {}

    def end(self) -> Iterator[Event]:
        if not self._output and not self._calls:  # a message that says nothing
            yield from self._begin_part("content")
        reason = _ENDS.get(self._end or "")
        yield from self.close("completed" if reason is None else "incomplete")
        if reason is None:
            yield self.event("response.completed", response=self.response("completed"))
        else:
            response = self.response("incomplete", incomplete_details={"reason": reason})
            yield self.event("response.incomplete", response=response)

    def fail(self, error: APIError) -> Iterator[Event]:
        yield from self.close("incomplete")
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        failed = {"code": code, "type": error.code or error.type, "message": error.message, "param": error.param}
        yield self.event("response.failed", response=self.response("failed", error=failed))

    # ---- items ----

    def _think(self, text: str) -> Iterator[Event]:
        self._logprobs = []
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
        self._open["content"][-1][field] += text
        more = {"logprobs": self._take_logprobs(self._open)} if kind == "output_text" else {}
        yield self.event(f"response.{event}.delta", **self._part_place(self._open), delta=text, **more)

    def _take_logprobs(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        """Those that came since the last text, which are that of the open part now."""
        found, self._logprobs = self._logprobs, []
        if self._asked.wants_logprobs:
            item["content"][-1]["logprobs"] += found
        return found

    def _call(self, delta: dict[str, Any]) -> Iterator[Event]:
        self._logprobs = []
        index, function = delta["index"], delta.get("function") or {}
        call = self._calls.setdefault(index, {"type": "function_call", "call_id": "", "name": "", "arguments": ""})
        if "id" not in call:  # it begins with its arguments, when its name is there
            call["call_id"] = delta.get("id") or call["call_id"]
        call["name"] += function.get("name") or ""
        if not (text := function.get("arguments")):
            return
        if "id" not in call:
            yield from self._begin_calls(index)
        call["arguments"] += text
        yield self.event("response.function_call_arguments.delta", **self._place(call), delta=text)

    def _begin_calls(self, last: int | None = None) -> Iterator[Event]:
        """In the order in which they were named, up to that one."""
        for index, call in self._calls.items():
            if "id" not in call:
                call["call_id"] = call["call_id"] or f"call_{self._request_id}_{index}"
                yield from self._begin(call, "fc")
                self._open = None
            if index == last:
                return

    def _begin(self, item: dict[str, Any], prefix: str) -> Iterator[Event]:
        """Opens an item; what was being said before it is said."""
        if self._open is not None:
            yield from self._close(self._open, "completed")
        place = len(self._output)
        item |= {"id": f"{prefix}_{self._request_id}_{place}", "status": "in_progress"}
        self._open = item
        self._output.append(item)
        # Before there is anything in it.
        parts: dict[str, Any] = {"content": []} if "content" in item else {}
        yield self.event("response.output_item.added", output_index=place, item={**item, **parts})

    def _begin_part(self, name: str) -> Iterator[Event]:
        kind, field, _ = _PARTS[name]
        if self._open is None or self._open["type"] != "message":
            yield from self._begin({"type": "message", "role": "assistant", "content": []}, "msg")
        else:
            yield from self._close_part(self._open)
        assert self._open is not None
        part: dict[str, Any] = {"type": kind, field: ""}
        self._open["content"].append(part | ({"annotations": [], "logprobs": []} if kind == "output_text" else {}))
        place = self._part_place(self._open)
        yield self.event(
            "response.content_part.added",
            **place,
            part={**part, "annotations": [], "logprobs": []} if kind == "output_text" else {**part},
        )

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
        yield self.event("response.output_item.done", output_index=place["output_index"], item={**item})

    def _close_part(self, item: dict[str, Any]) -> Iterator[Event]:
        part, place = item["content"][-1], self._part_place(item)
        if part["type"] == "output_text":
            self._take_logprobs(item)
            yield self.event("response.output_text.done", **place, text=part["text"], logprobs=part["logprobs"])
        else:
            yield self.event("response.refusal.done", **place, refusal=part["refusal"])
        yield self.event("response.content_part.done", **place, part=part)

    def _place(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": next(i for i, o in enumerate(self._output) if o is item)}

    def _part_place(self, item: dict[str, Any]) -> dict[str, Any]:
        return {**self._place(item), "content_index": len(item["content"]) - 1}


def _logprob(row: dict[str, Any]) -> dict[str, Any]:
    """Some servers leave a token's bytes out, and the likeliest."""
    top = [{**other, "bytes": other.get("bytes") or []} for other in row.get("top_logprobs") or ()]
    return {**row, "bytes": row.get("bytes") or [], "top_logprobs": top}


def _usage(chat: dict[str, Any]) -> dict[str, Any]:
    """Of another server's usage what are numbers."""

    def count(values: Any, name: str) -> int:
        value = values.get(name) if isinstance(values, dict) else None
        return value if isinstance(value, int) else 0

    asked, said = count(chat, "prompt_tokens"), count(chat, "completion_tokens")
    cached = count(chat.get("prompt_tokens_details"), "cached_tokens")
    return {
        "input_tokens": asked,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": said,
        "output_tokens_details": {"reasoning_tokens": count(chat.get("completion_tokens_details"), "reasoning_tokens")},
        "total_tokens": count(chat, "total_tokens") or asked + said,
    }
