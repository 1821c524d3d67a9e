"""Where texts are in a request, and how one is put back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from fastattn.serve.json_body import parse_text
from fastattn.serve.protocol import ChatCompletionRequest, CompletionRequest

Request = ChatCompletionRequest | CompletionRequest


class Slot(NamedTuple):
    """A text in a request's data. put: replaces it there."""

    role: str
    text: str
    put: Callable[[str], None]


def slots(data: dict[str, Any], decode: Callable[[list[int]], str]) -> Iterator[Slot]:
    """Every text that the model will see, or a model elsewhere. decode: token ids to text."""
    for message in data.get("messages") or ():
        yield from _message_slots(message)
    for tool in data.get("tools") or ():
        yield from leaves(tool, "system")
    for name in ("prediction", "chat_template_kwargs", "response_format"):
        yield from leaves(data.get(name) or {}, "user")
    if "prompt" in data:
        prompt = data["prompt"]
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            yield _prompt_slot(prompt, decode, data, "prompt")
        else:
            for i, one in enumerate(prompt):
                yield _prompt_slot(one, decode, prompt, i)


def _message_slots(message: dict[str, Any]) -> Iterator[Slot]:
    role, content = message["role"], message.get("content")
    if isinstance(content, str):
        yield _slot(role, message, "content")
    if isinstance(content, list):  # the model sees them joined, so nothing hides in a cut between two
        yield Slot(role, "".join(part["text"] for part in content), lambda text: message.__setitem__("content", text))
    for name in ("name", "refusal", "reasoning_content", "reasoning", "tool_call_id"):
        if isinstance(message.get(name), str):
            yield _slot(role, message, name)
    for call in message.get("tool_calls") or ():
        yield from call_slots(call, role)


def call_slots(call: dict[str, Any], role: str) -> Iterator[Slot]:
    """Of a tool call; its arguments as data, so an escape hides nothing and a redaction leaves JSON."""
    for holder, key in ((call, "id"), (call["function"], "name")):
        if holder.get(key):
            yield _slot(role, holder, key)
    yield from json_slots(call["function"], "arguments", role)


def _slot(role: str, holder: Any, key: Any) -> Slot:
    return Slot(role, holder[key], lambda text: holder.__setitem__(key, text))


def _prompt_slot(prompt: str | list[int], decode: Callable[[list[int]], str], holder: Any, key: Any) -> Slot:
    if isinstance(prompt, str):
        return _slot("user", holder, key)
    return Slot("user", decode(prompt), lambda text: holder.__setitem__(key, text))


def json_slots(holder: Any, key: Any, role: str) -> Iterator[Slot]:
    """The strings in a JSON text (a tool's arguments), escapes undone; the text itself if it is no JSON."""
    try:
        value = {"": parse_text(holder[key])}
    except (ValueError, RecursionError):
        yield _slot(role, holder, key)
        return

    def write_back() -> None:
        holder[key] = json.dumps(value[""], ensure_ascii=False)

    yield from leaves(value, role, write_back)


def leaves(value: Any, role: str, after: Callable[[], None] = lambda: None) -> Iterator[Slot]:
    """The strings in JSON data, names included as texts that cannot be replaced but by renaming; numbers as their digits."""
    todo: list[Any] = [value]
    while todo:
        holder = todo.pop()
        for key, item in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
            if isinstance(item, dict | list):
                todo.append(item)
            elif isinstance(item, str) or (isinstance(item, int | float) and not isinstance(item, bool)):
                yield Slot(role, str(item), _leaf_put(holder, key, after))
            if isinstance(key, str) and key:
                yield Slot(role, key, _key_put(holder, key, after))


def _leaf_put(holder: Any, key: Any, after: Callable[[], None]) -> Callable[[str], None]:
    def put(text: str) -> None:
        holder[key] = text
        after()

    return put


def _key_put(holder: dict[str, Any], key: str, after: Callable[[], None]) -> Callable[[str], None]:
    def put(text: str) -> None:
        holder[text] = holder.pop(key)
        after()

    return put
