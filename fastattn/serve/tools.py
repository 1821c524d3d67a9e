"""Tool calls: the grammar that forces one, and the reader of what a model writes.

Read are Hermes' and Qwen's `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, and an answer that is one such JSON
object, with "arguments" or "parameters", as Llama 3 writes it. The reader is linear in what it reads and never backtracks
into what it gave out.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Sequence
from typing import Any

from fastattn.serve.contract import APIError
from fastattn.serve.json_body import parse_text
from fastattn.serve.protocol import ChatCompletionRequest, NamedToolChoice, Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_MAX_HEADER = 1024  # characters until the arguments begin
_HEADER = re.compile(r'\s{0,64}\{\s{0,64}"name"\s{0,64}:\s{0,64}"([^"\\]{1,64})"\s{0,64},\s{0,64}"(?:arguments|parameters)"\s{0,64}:\s{0,64}(?=\{)')  # fmt: skip
_STRUCTURAL = re.compile(r'["{}]')
_IN_STRING = re.compile(r'["\\]')

Delta = dict[str, Any]  # what goes into a chunk's delta: content, or tool_calls


def system_text(definitions: Sequence[dict[str, Any]]) -> str:
    """For models whose template knows no tools: what Hermes' template would say."""
    lines = "\n".join(json.dumps(definition, ensure_ascii=False) for definition in definitions)
    return (
        "You may call one or more functions to assist with the user query. Their signatures are within <tools></tools>:\n"
        f"<tools>\n{lines}\n</tools>\n"
        f'To call a function, answer with {OPEN}\n{{"name": <function-name>, "arguments": <json-object>}}\n{CLOSE}'
    )


def forced_schema(request: ChatCompletionRequest) -> dict[str, Any] | None:
    """The JSON schema of the answer where a tool call is forced, else None."""
    if isinstance(request.tool_choice, NamedToolChoice):
        name = request.tool_choice.function.name
        tool = next(tool for tool in request.tools or () if tool.function.name == name)
        return tool.function.parameters or {"type": "object"}
    if request.tool_choice == "required":
        return _any_call(request.tools or [])
    return None


def _any_call(tools: Sequence[Tool]) -> dict[str, Any]:
    definitions: dict[str, Any] = {}
    branches = []
    for tool in tools:
        parameters = dict(tool.function.parameters or {"type": "object"})
        for key in ("$defs", "definitions"):  # references start at the root, which is ours here
            found = parameters.pop(key, {})
            if not isinstance(found, dict):
                raise APIError(400, f"{key} of {tool.function.name!r} is no object", param="tools")
            for name, value in found.items():
                if definitions.setdefault(key, {}).setdefault(name, value) != value:
                    raise APIError(400, f"two tools define {key}/{name} differently", param="tools")
        properties = {"name": {"const": tool.function.name}, "arguments": parameters}
        branches.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return {"anyOf": branches, **definitions}


def reader_for(request: ChatCompletionRequest) -> ToolReader | None:
    """What reads this request's answers; None where they are plain text."""
    if not request.tools or request.tool_choice == "none":
        return None
    if isinstance(request.tool_choice, NamedToolChoice):
        return ToolReader((), fixed=request.tool_choice.function.name)
    return ToolReader({tool.function.name for tool in request.tools})


class ToolReader:
    """Text in as it comes, deltas out. What may be the beginning of a call is held back until that is known."""

    def __init__(self, names: Collection[str], fixed: str | None = None) -> None:
        self._names = names
        self._fixed = fixed  # the whole text is the arguments of this function
        self._buffer = ""
        self._seen_text = False  # text has been given out: an object from here on is text too
        self._call: _Arguments | None = None
        self._tagged = False  # the call being read began with a tag
        self.num_calls = 0

    def feed(self, text: str) -> list[Delta]:
        if self._fixed is not None:
            begin = [] if self.num_calls else [self._begin(self._fixed)]
            return begin + ([self._more(text)] if text else [])
        self._buffer += text
        deltas: list[Delta] = []
        while self._advance(deltas):
            pass
        return deltas

    def finish(self) -> list[Delta]:
        """No more text: what was held back is what it is."""
        rest, self._buffer = self._buffer, ""
        if self._call is not None or not rest or self._fixed is not None or (self.num_calls and not rest.strip()):
            return []
        body = rest.strip().removeprefix(OPEN).removesuffix(CLOSE) if self._tagged else rest
        if (self._tagged or not self._seen_text) and (call := self._whole(body)):
            return call
        return [{"content": (OPEN if self._tagged else "") + rest}]

    def _advance(self, deltas: list[Delta]) -> bool:
        """Does one thing with the buffer; False when more text is needed."""
        if self._call is not None:
            return self._read_arguments(deltas)
        if self._tagged:
            return self._read_header(deltas)
        stripped = self._buffer.lstrip()
        if not self._seen_text and stripped.startswith("{"):
            return self._read_header(deltas)
        return self._read_text(deltas)

    def _read_text(self, deltas: list[Delta]) -> bool:
        at = self._buffer.find(OPEN)
        if at >= 0:
            before, self._buffer = self._buffer[:at], self._buffer[at + len(OPEN) :]
            self._tagged = True
        else:
            before = self._buffer[: len(self._buffer) - _overlap(self._buffer, OPEN)]
            if not self._seen_text and not before.strip() and len(self._buffer) <= _MAX_HEADER:
                return False  # a call may follow, and then nobody misses the blanks
            self._buffer = self._buffer[len(before) :]
        if before.strip() or (before and (self._seen_text or at < 0)):
            self._seen_text = True
            deltas.append({"content": before})
        return at >= 0

    def _read_header(self, deltas: list[Delta]) -> bool:
        match = _HEADER.match(self._buffer)
        if match and match[1] in self._names:
            deltas.append(self._begin(match[1]))
            self._buffer = self._buffer[match.end() :]
            self._call = _Arguments()
            return True
        end = self._buffer.find(CLOSE) if self._tagged else -1
        if end >= 0:  # a call in another order of keys, or nonsense
            body, self._buffer = self._buffer[:end], self._buffer[end + len(CLOSE) :]
            deltas += self._whole(body) or [{"content": OPEN + body + CLOSE}]
            self._tagged = False
            return True
        if len(self._buffer) > _MAX_HEADER and not self._tagged:
            self._seen_text = True  # an object, but no call
            return True
        return False

    def _read_arguments(self, deltas: list[Delta]) -> bool:
        assert self._call is not None
        if not self._call.done:
            used = self._call.read(self._buffer)
            if used:
                deltas.append(self._more(self._buffer[:used]))
            self._buffer = self._buffer[used:]
            if not self._call.done:
                return False
        # Behind the arguments only the object's end is expected, and the closing tag.
        end = self._buffer.find(CLOSE)
        if self._tagged and end < 0:
            self._buffer = self._buffer[-len(CLOSE) :]
            return False
        if self._tagged:
            self._buffer = self._buffer[end + len(CLOSE) :]
            self._tagged, self._call = False, None
            return True
        self._buffer = ""
        return False

    def _whole(self, body: str) -> list[Delta]:
        """A complete call as deltas; [] if it is none."""
        try:
            value = parse_text(body)
        except (ValueError, RecursionError):
            return []
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in self._names:
            return []
        arguments = value.get("arguments", value.get("parameters"))
        text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
        return [self._begin(name), self._more(text)]

    def _begin(self, name: str) -> Delta:
        self.num_calls += 1
        head = {"index": self.num_calls - 1, "id": f"call_{secrets.token_hex(12)}", "type": "function"}
        return {"tool_calls": [{**head, "function": {"name": name, "arguments": ""}}]}

    def _more(self, text: str) -> Delta:
        return {"tool_calls": [{"index": self.num_calls - 1, "function": {"arguments": text}}]}


class _Arguments:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False
        self.done = False

    def read(self, text: str) -> int:
        """How many characters of the text belong to the object."""
        at = 0
        while at < len(text) and not self.done:
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            match = (_IN_STRING if self._in_string else _STRUCTURAL).search(text, at)
            if match is None:
                return len(text)
            at = match.end()
            if match[0] == '"':
                self._in_string = not self._in_string
            elif match[0] == "\\":
                self._escaped = True
            else:
                self._depth += 1 if match[0] == "{" else -1
                self.done = self._depth == 0
        return at


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of the text that begins the tag."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)
