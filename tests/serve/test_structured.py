"""Answers of a given form, and tool calls, over HTTP; and forms that are meant to do harm."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import jsonschema_rs
import openai
import pytest

from tests.serve.harness import MODEL, Running, chat

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "color": {"enum": ["red", "green"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "color", "n"],
    "additionalProperties": False,
}  # fmt: skip
# Short, for a model of 512 tokens.
COLOR = {"type": "object", "properties": {"c": {"enum": ["red", "green"]}}, "required": ["c"], "additionalProperties": False}  # fmt: skip
PAINT: Any = {"type": "function", "function": {"name": "paint", "parameters": COLOR}}


def say(client: openai.OpenAI, **options: Any) -> Any:
    messages = [{"role": "user", "content": "hello"}]
    return client.chat.completions.create(**{"model": MODEL, "messages": messages, "max_tokens": 300, "seed": 1} | options)  # fmt: skip


def test_json_schema(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        choice = say(client, response_format=form, seed=seed).choices[0]
        assert choice.finish_reason == "stop"
        jsonschema_rs.validator_for(SCHEMA).validate(json.loads(choice.message.content))
    streamed = say(client, response_format=form, seed=2, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == choice.message.content
    text = client.completions.create(
        model=MODEL, prompt="x", max_tokens=300, extra_body={"response_format": form}
    ).choices[0]
    jsonschema_rs.validator_for(SCHEMA).validate(json.loads(text.text))


def test_json_object(client: openai.OpenAI) -> None:
    choice = say(client, response_format={"type": "json_object"}, temperature=0, max_tokens=400).choices[0]
    assert choice.message.content.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"structured_outputs": {"regex": "[ab]{3}-[0-9]{2}"}}, r"[ab]{3}-\d{2}"),
        ({"guided_regex": "yes|no"}, r"yes|no"),
        ({"structured_outputs": {"choice": ["north", "south"]}}, r"north|south"),
        ({"guided_choice": ["one"]}, r"one"),
        ({"structured_outputs": {"grammar": 'start: "a" ("b" | "c") "d"'}}, r"a[bc]d"),
        ({"guided_json": {"type": "boolean"}}, r"true|false"),
        ({"structured_outputs": {"json": '{"type": "boolean"}'}}, r"true|false"),
    ],
)
def test_other_forms(client: openai.OpenAI, extra: dict[str, Any], pattern: str) -> None:
    choice = say(client, extra_body=extra, n=2).choices[0]
    assert choice.finish_reason == "stop" and re.fullmatch(pattern, choice.message.content)


def test_a_required_tool(client: openai.OpenAI) -> None:
    for seed in range(4):
        choice = say(client, tools=[PAINT], tool_choice="required", seed=seed, max_tokens=None).choices[0]
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls" and not choice.message.content and call.id.startswith("call_")
        assert call.function.name == "paint"
        jsonschema_rs.validator_for(COLOR).validate(json.loads(call.function.arguments))


def test_a_named_tool_streamed(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "paint"}}
    options: Any = {"tools": [PAINT], "tool_choice": named, "max_tokens": None}
    (whole,) = say(client, **options).choices[0].message.tool_calls
    name = arguments = ""
    finish = None
    for chunk in say(client, stream=True, **options):
        for call in chunk.choices[0].delta.tool_calls or ():
            assert call.index == 0
            name += call.function.name or ""
            arguments += call.function.arguments or ""
        finish = chunk.choices[0].finish_reason or finish
    assert (name, arguments, finish) == ("paint", whole.function.arguments, "tool_calls")
    jsonschema_rs.validator_for(COLOR).validate(json.loads(arguments))


def test_a_conversation_with_tools(client: openai.OpenAI) -> None:
    """What the client got goes back as it is, with the tool's answer."""
    first = say(client, tools=[PAINT], tool_choice="required", max_tokens=None).choices[0].message
    messages: Any = [{"role": "user", "content": "the time?"}, first]
    messages.append({"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "12:00"})
    answer = say(client, messages=messages, max_tokens=5)
    assert answer.choices[0].finish_reason in ("length", "stop")
    none = say(client, tools=[PAINT], tool_choice="none", max_tokens=5)
    assert none.choices[0].message.tool_calls is None
    assert none.usage.prompt_tokens == say(client, max_tokens=5).usage.prompt_tokens  # the model does not hear of them


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "boolean"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE: list[dict[str, Any]] = [
    {"structured_outputs": {"regex": "(" * 20_000}},
    {"structured_outputs": {"regex": "(a+)+" * 500 + "b"}},
    {"structured_outputs": {"regex": "a{1000}{1000}{1000}"}},
    {"structured_outputs": {"regex": r"(?=a)b\1"}},
    {"structured_outputs": {"grammar": "start: " + "(" * 5000}},
    {"structured_outputs": {"grammar": "start: start start"}},
    {"structured_outputs": {"grammar": "nothing"}},
    {"structured_outputs": {"json": {"$ref": "http://127.0.0.1:1/schema"}}},
    {"structured_outputs": {"json": {"$ref": "file:///etc/passwd"}}},
    {"structured_outputs": {"json": "{"}},
    {"structured_outputs": {"json": deep(90)}},
    {"structured_outputs": {"json": {"enum": [f"value {i}" for i in range(20_000)]}}},
    {"structured_outputs": {"json": {"type": "object", "minProperties": 10**9}}},
    {"structured_outputs": {"json": {"type": "string", "pattern": "(" * 1000}}},
    {"structured_outputs": {"choice": ["x" * 70_000]}},
]


def test_hostile_forms(server: Running) -> None:
    """CVE-2025-29770, CVE-2025-57809 and others: refused in time, or answered; the engine steps on, and others with it."""
    for form in HOSTILE:
        start = time.monotonic()
        response = server.post("/v1/chat/completions", chat("x", max_tokens=4, **form))
        assert response.status_code in (200, 400), (form, response.text)
        assert time.monotonic() - start < 30
        assert server.post("/v1/completions", {"model": MODEL, "prompt": "a", "max_tokens": 1}).status_code == 200
    bad = server.post("/v1/chat/completions", chat("x", structured_outputs={"regex": "("}))
    assert bad.status_code == 400 and bad.json()["error"]["type"] == "invalid_request_error"
    assert server.get("/health").status_code == 200
    assert server.metric("fastattn:engine_restarts_total") == 0
