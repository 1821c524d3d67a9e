"""Reading tool calls out of text, at every way of cutting it; and the schema that forces one."""

from __future__ import annotations

import json
import time
from typing import Any

import jsonschema_rs
import pytest

from fastattn.serve.contract import APIError
from fastattn.serve.protocol import ChatCompletionRequest
from fastattn.serve.tools import ToolReader, forced_schema, reader_for, system_text

NAMES = {"get_weather", "add"}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par}is \\"{", "in": {"unit": "C"}}}\n</tool_call>'
ARGUMENTS = {"city": 'Par}is "{', "in": {"unit": "C"}}
SECOND = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'

Read = tuple[str, list[tuple[str, Any]]]


def read(pieces: list[str], names: set[str] = NAMES, fixed: str | None = None) -> Read:
    """(content, [(name, arguments)]) that the deltas amount to."""
    reader = ToolReader(names, fixed)
    deltas = [delta for piece in pieces for delta in reader.feed(piece)] + reader.finish()
    content, calls = "", dict[int, list[str]]()
    for delta in deltas:
        content += delta.get("content", "")
        for call in delta.get("tool_calls", ()):
            known = calls.setdefault(call["index"], ["", ""])
            assert ("id" in call) == (known == ["", ""])  # id and name come first, and once
            known[0] += call["function"].get("name", "")
            known[1] += call["function"]["arguments"]
    assert list(calls) == list(range(reader.num_calls))
    return content, [(name, json.loads(text)) for name, text in calls.values()]


TEXTS: list[tuple[str, Read]] = [
    ("Hello <b>you</b>, 1 < 2 <tool", ("Hello <b>you</b>, 1 < 2 <tool", [])),
    (CALL, ("", [("get_weather", ARGUMENTS)])),
    (f"Let me look.\n{CALL}", ("Let me look.\n", [("get_weather", ARGUMENTS)])),
    (f"{CALL}\n{SECOND}", ("", [("get_weather", ARGUMENTS), ("add", {})])),
    (f"{CALL}\n ", ("", [("get_weather", ARGUMENTS)])),
    (f"a{SECOND}b", ("ab", [("add", {})])),
    ('<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', ("", [("add", {"a": 1})])),
    ('<tool_call>{"name": "add", "parameters": {"a": 1}}', ("", [("add", {"a": 1})])),
    ('{"name": "add", "parameters": {"a": [1, {"b": "}"}]}}', ("", [("add", {"a": [1, {"b": "}"}]})])),
    ('  {"name": "add", "arguments": {}}  ', ("", [("add", {})])),
    ('{"name": "unknown", "arguments": {}}', ('{"name": "unknown", "arguments": {}}', [])),
    ('Say {"name": "add", "arguments": {}}', ('Say {"name": "add", "arguments": {}}', [])),
    ('{"answer": 5}', ('{"answer": 5}', [])),
    ('<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', ('<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', [])),
    ("<tool_call>nonsense</tool_call> more", ("<tool_call>nonsense</tool_call> more", [])),
    ("<tool_call>cut", ("<tool_call>cut", [])),
    ('<tool_call>{"name": ["add"], "arguments": {}}</tool_call>', ('<tool_call>{"name": ["add"], "arguments": {}}</tool_call>', [])),
    ('<tool_call>{"arguments": {"a": "\\ud800\\ud83d\\ude00"}, "name": "add"}</tool_call>', ("", [("add", {"a": "?😀"})])),  # the first is half a pair
    ("", ("", [])),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), TEXTS, ids=lambda value: repr(value)[:40])
def test_any_cut_reads_the_same(text: str, expected: Read) -> None:
    assert read([text]) == expected
    assert read(list(text)) == expected
    for at in range(len(text)):
        assert read([text[:at], text[at:]]) == expected


def test_arguments_come_as_they_are_written() -> None:
    reader = ToolReader(NAMES)
    deltas = [reader.feed(char) for char in CALL]
    with_arguments = [d for step in deltas for d in step if d["tool_calls"][0]["function"]["arguments"]]
    assert len(with_arguments) > 30


def test_a_named_function_gets_the_whole_text() -> None:
    assert read(list('{"city": "x"}'), set(), "get_weather") == ("", [("get_weather", {"city": "x"})])


@pytest.mark.parametrize("text", ["(" * 10**6, "<tool_call>" + "{" * 10**6, '{"name": "' + "a" * 10**6, " " * 10**6, "<" * 10**6])  # fmt: skip
def test_hostile_output_is_read_in_linear_time(text: str) -> None:
    """CVE-2025-48887: a regular expression over what the model writes that takes for ever."""
    start = time.perf_counter()
    reader = ToolReader(NAMES)
    for at in range(0, len(text), 4096):
        reader.feed(text[at : at + 4096])
    reader.finish()
    assert time.perf_counter() - start < 5


def request(**fields: Any) -> ChatCompletionRequest:
    tools = [
        {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}, "required": ["a"], "$defs": {"n": {"type": "integer"}}}}},
        {"type": "function", "function": {"name": "now"}},
    ]  # fmt: skip
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": tools}
    return ChatCompletionRequest.model_validate(body | fields)


def test_forced_schema() -> None:
    assert forced_schema(request()) is None and forced_schema(request(tool_choice="none")) is None
    required = forced_schema(request(tool_choice="required"))
    assert required is not None
    valid = jsonschema_rs.validator_for(required).is_valid
    assert valid({"name": "add", "arguments": {"a": 1}}) and valid({"name": "now", "arguments": {}})
    assert not valid({"name": "add", "arguments": {"a": "1"}}) and not valid({"name": "sub", "arguments": {}})
    named = {"type": "function", "function": {"name": "add"}}
    schema = forced_schema(request(tool_choice=named))
    assert schema is not None and jsonschema_rs.validator_for(schema).is_valid({"a": 1})


def test_definitions_that_differ_are_refused() -> None:
    tools = [
        {
            "type": "function",
            "function": {"name": name, "parameters": {"type": "object", "$defs": {"n": {"type": kind}}}},
        }
        for name, kind in (("f", "string"), ("g", "integer"))
    ]
    with pytest.raises(APIError, match="differently"):
        forced_schema(request(tools=tools, tool_choice="required"))


def test_who_is_read() -> None:
    assert reader_for(request(tool_choice="none")) is None
    assert reader_for(request()) is not None
    assert "get_weather" in system_text([{"type": "function", "function": {"name": "get_weather"}}])
