"""OpenAI's Responses: the official client against a server, conversations as chats, and every event of every kind of answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from fastattn.serve.contract import APIError, Chunk
from fastattn.serve.response_events import last_response, named_event, response_events
from fastattn.serve.responses import ResponsesRequest
from tests.serve.fakes import wait
from tests.serve.harness import MODEL, Running

LOGPROBS = "message.output_text.logprobs"
ADD = {
    "type": "function",
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    },
}


def respond(client: openai.OpenAI, **options: Any) -> Any:
    return client.responses.create(**{"model": MODEL, "input": "hello", "max_output_tokens": 12, "temperature": 0} | options)  # fmt: skip


def call_item(number: int) -> dict[str, Any]:
    return {"type": "function_call", "call_id": f"c{number}", "name": "add", "arguments": "{}"}


ANNOTATED = {"type": "output_text", "text": "a", "annotations": [1] * 100_000}


def said(client: openai.OpenAI, messages: Any) -> str:
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12, temperature=0)
    return answer.choices[0].message.content or ""


# ---- against a server ----


def test_the_text_is_the_chats(client: openai.OpenAI) -> None:
    answer = respond(client, instructions="Be brief.", metadata={"a": "b"})
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert answer.output_text == said(client, told)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.output_tokens == 12 and answer.usage.total_tokens == answer.usage.input_tokens + 12
    assert answer.instructions == "Be brief." and answer.metadata == {"a": "b"} and answer.model == MODEL
    (item,) = answer.output
    assert (item.role, item.status) == ("assistant", "incomplete") and answer.id.startswith("resp_")


def test_an_answer_goes_back_as_it_came(client: openai.OpenAI) -> None:
    first = respond(client)
    items = [{"role": "user", "content": "hello"}, *first.to_dict()["output"], {"role": "user", "content": "and then?"}]
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "and then?"},
    ]
    assert respond(client, input=items).output_text == said(client, messages)


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    whole = respond(client)
    events = list(respond(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:4]] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    final = events[-1].response
    assert (events[-1].type, final.output_text, final.usage) == ("response.incomplete", whole.output_text, whole.usage)


def test_a_call_of_a_function_streamed_or_not(client: openai.OpenAI) -> None:
    options: Any = {"tools": [ADD], "tool_choice": {"type": "function", "name": "add"}, "max_output_tokens": 60}
    answer = respond(client, **options)
    (call,) = answer.output
    assert (call.type, call.name, call.status) == ("function_call", "add", "completed")
    assert TypeAdapter(dict[str, bool]).validate_json(call.arguments).keys() == {"a"}
    assert answer.tools[0].name == "add" and answer.tool_choice.name == "add"
    with client.responses.stream(
        model=MODEL, input="hello", temperature=0, **options | {"tool_choice": "required"}
    ) as stream:
        deltas = [e.delta for e in stream if e.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output[0].arguments and len(deltas) > 1  # type: ignore[union-attr]
    back = [
        {"role": "user", "content": "hello"},
        *answer.to_dict()["output"],
        {"type": "function_call_output", "call_id": call.call_id, "output": "3"},
    ]
    assert respond(client, input=back, max_output_tokens=4).output_text


def test_a_schema_and_logprobs(client: openai.OpenAI) -> None:
    schema = {"type": "json_schema", "name": "s", "schema": ADD["parameters"]}
    answer = respond(client, text={"format": schema}, max_output_tokens=60)
    assert TypeAdapter(dict[str, bool]).validate_json(answer.output_text).keys() == {"a"}
    assert answer.text.format.type == "json_schema" and answer.status == "completed"
    answer = respond(client, include=[LOGPROBS], top_logprobs=2)
    rows = answer.output[0].content[0].logprobs
    assert len(rows) == 12 and all(len(row.top_logprobs) == 2 for row in rows)
    streamed = [row for e in respond(client, include=[LOGPROBS], stream=True) if e.type.endswith("text.delta") for row in e.logprobs]  # fmt: skip
    assert [row.logprob for row in streamed] == [row.logprob for row in rows[: len(streamed)]] and len(streamed) > 6


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"input": []}, "input: .*at least 1 item"),
        (
            {"input": [{"type": "local_shell_call"}]},
            "'local_shell_call' .*'message', 'function_call', 'function_call_o",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "'input_image' .*'input_text'"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}] * 9000}]}, "9000 parts"),
        ({"previous_response_id": "resp_1"}, "previous_response_id: it is not supported here"),
        ({"store": True}, "store: Input should be False"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\]"),
        ({"tool_choice": {"type": "function", "name": "add"}}, "tool_choice names 'add', which is not among the tools"),
        ({"input": [{"role": "user", "content": "a"}, {"role": "user"}]}, r"input\[1\]"),
        ({"input": [call_item(n) for n in range(200)]}, "input: .*at most 128 items"),
        ({"input": [{"role": "assistant", "content": [ANNOTATED]}]}, r"input\[0\].message.content"),
        ({"top_logprobs": 1}, "top_logprobs is allowed only with include"),
        ({"max_output_tokens": 10**9}, "the model takes 512 tokens in all"),
    ],
)
def test_what_is_wrong_is_named(client: openai.OpenAI, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=f"(?s){says}"):
        respond(client, **fields)


def test_a_stream_on_the_wire(server: Running) -> None:
    body = {"model": MODEL, "input": "hello", "max_output_tokens": 3, "stream": True}
    lines = server.post("/v1/responses", body).text.splitlines()
    assert lines[0] == "event: response.created" and lines[1].startswith('data: {"type":"response.created"')
    assert lines[-3] == "event: response.incomplete" and "[DONE]" not in lines


# ---- conversations ----


def called(*numbers: int) -> list[dict[str, Any]]:
    return [{"id": f"c{n}", "type": "function", "function": {"name": "add", "arguments": "{}"}} for n in numbers]


OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "3"}]}
THOUGHT = {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ("hello", [{"role": "user", "content": "hello"}]),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}],
            [{"role": "user", "content": "ab"}],
        ),
        # What it thought, said and called is one turn.
        (
            [THOUGHT, {"role": "assistant", "content": "I add"}, call_item(1), call_item(2), OUTPUT],
            [
                {"role": "assistant", "reasoning_content": "hm", "content": "I add", "tool_calls": called(1, 2)},
                {"role": "tool", "tool_call_id": "c1", "content": "3"},
            ],
        ),
        ([call_item(1), OUTPUT, call_item(2)], [
            {"role": "assistant", "tool_calls": called(1)},
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
            {"role": "assistant", "tool_calls": called(2)},
        ]),
        ([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}], [
            {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"},
        ]),
        ([{"role": "assistant", "content": "a"}, THOUGHT, call_item(1)], [
            {"role": "assistant", "content": "a"},
            {"role": "assistant", "reasoning_content": "hm", "tool_calls": called(1)},
        ]),
        # What is said and thought before the calls have their answers is of the same turn.
        ([call_item(1), {"role": "assistant", "content": "wait"}, THOUGHT, call_item(2), OUTPUT], [
            {"role": "assistant", "content": "wait", "reasoning_content": "hm", "tool_calls": called(1, 2)},
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
        ]),
        ([THOUGHT], [{"role": "assistant", "reasoning_content": "hm", "content": ""}]),
        ([{"type": "reasoning", "summary": []}, {"role": "user", "content": "a"}], [
            {"role": "assistant", "content": ""}, {"role": "user", "content": "a"},
        ]),
        ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}], [
            {"role": "assistant", "content": "", "refusal": "no"},
        ]),
    ],
)  # fmt: skip
def test_items_are_messages(items: Any, messages: list[dict[str, Any]]) -> None:
    request = ResponsesRequest.model_validate({"model": "m", "input": items}).as_chat()
    assert request.model_dump(exclude_unset=True)["messages"] == messages


def test_options_are_those_of_a_chat() -> None:
    body = {
        "model": "m", "input": "a", "max_output_tokens": 5, "temperature": 0.5, "top_p": 0.5, "seed": 3, "top_k": 4,
        "reasoning": {"effort": "low"}, "text": {"format": {"type": "json_object"}}, "include": [LOGPROBS],
        "top_logprobs": 3, "tools": [ADD], "tool_choice": "auto", "parallel_tool_calls": False, "priority": 2,
    }  # fmt: skip
    chat = ResponsesRequest.model_validate(body).as_chat()
    assert (chat.max_new_tokens, chat.temperature, chat.top_p, chat.seed, chat.top_k) == (5, 0.5, 0.5, 3, 4)
    assert (chat.reasoning_effort, chat.logprobs, chat.top_logprobs, chat.priority) == ("low", True, 3, 2)
    assert chat.response_format is not None and chat.response_format.type == "json_object"
    assert chat.tools is not None and chat.tools[0].function.name == "add" and chat.tool_choice == "auto"
    assert chat.parallel_tool_calls is False
    # Some clients always say it.
    assert ResponsesRequest.model_validate({"model": "m", "input": "a", "tool_choice": "auto"}).as_chat().tool_choice is None  # fmt: skip


# ---- events ----


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def answered(
    deltas: list[Any],
    finish: str | None = "stop",
    error: Exception | None = None,
    *,
    has_begun: bool = False,
    chunkless: bool = False,
    usage: Any = USAGE,
    logprobs: bool = False,
    **asked: Any,
) -> list[dict[str, Any]]:
    """Events of an answer in these deltas; each is what the client's own types take."""
    request = ResponsesRequest.model_validate({"model": "m", "input": "a", "stream": True} | asked)
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "served"}

    async def chunks() -> AsyncIterator[Chunk]:
        for number, delta in enumerate(deltas):
            row = {"token": str(number), "logprob": -1.0, "bytes": None, "top_logprobs": []}
            rows = {"content": [row], "refusal": None} if logprobs else None
            choice = {"index": 0, "delta": delta, "logprobs": rows, "finish_reason": None}
            yield {**head, "choices": [choice, {**choice, "index": 1}]}  # another choice is not this answer's
        if error is not None:
            raise error
        if chunkless:
            return
        yield {**head, "choices": [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": finish}]}
        yield {**head, "choices": [], "usage": usage}

    async def collect() -> list[dict[str, Any]]:
        events = response_events(request, chunks(), "r", lambda: has_begun)
        return [json.loads(named_event(event).partition(b"data: ")[2]) async for event in events]

    events: list[dict[str, Any]] = wait(collect())
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event)
    return events


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def test_thoughts_words_and_calls_are_items_in_their_order() -> None:
    calls: list[Any] = [
        {"tool_calls": [{"index": 0, "id": "c0", "type": "function", "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 1, "id": "c1", "type": "function", "function": {"name": "g", "arguments": "["}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}, {"index": 1, "function": {"arguments": "]"}}]},
    ]
    events = answered(
        [
            {"role": "assistant", "content": ""},
            {"reasoning_content": "h"},
            {"reasoning_content": "m"},
            {"content": "So"},
            {"content": "!"},
            *calls,
        ],
        finish="tool_calls",
    )
    assert kinds(events) == [
        "created", "in_progress",
        "output_item.added", "reasoning_text.delta", "reasoning_text.delta", "reasoning_text.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done",
        # Calls begin with their arguments, and not before those that were named before them.
        "output_item.added", "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    response = Response.model_validate(events[-1]["response"])
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    assert response.output_text == "So!" and response.output[0].content[0].text == "hm"  # type: ignore[union-attr, index]
    assert [(o.call_id, o.arguments) for o in response.output[2:]] == [("c0", "{}"), ("c1", "[]")]  # type: ignore[union-attr]
    assert all(item.status == "completed" for item in response.output)  # type: ignore[union-attr]
    assert response.usage is not None and response.usage.total_tokens == 5 and response.model == "served"


def test_a_refusal_is_a_part_of_its_own() -> None:
    events = answered([{"content": "I "}, {"refusal": "can"}, {"refusal": "not"}], finish="content_filter")
    (item,) = events[-1]["response"]["output"]
    assert [part["type"] for part in item["content"]] == ["output_text", "refusal"]
    assert item["content"][1]["refusal"] == "cannot" and item["status"] == "incomplete"
    assert events[-1]["response"]["incomplete_details"] == {"reason": "content_filter"}
    assert kinds(events)[-3:] == ["content_part.done", "output_item.done", "incomplete"]


def test_an_answer_without_a_word_is_a_message() -> None:
    (item,) = answered([{"role": "assistant", "content": ""}])[-1]["response"]["output"]
    assert item["content"] == [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]


def test_an_error_on_the_way() -> None:
    error = APIError(503, "the engine died", "server_error")
    events = answered([{"content": "I "}], error=error)
    assert kinds(events)[-3:] == ["content_part.done", "output_item.done", "failed"]
    failed = events[-1]["response"]
    assert (failed["status"], failed["error"]["message"]) == ("failed", "the engine died")
    assert failed["output"][0]["status"] == "incomplete"
    with pytest.raises(APIError, match="the engine died"):  # its status can still be said
        answered([{"content": "I "}], error=error, stream=False)
    with pytest.raises(APIError, match="the engine died"):
        answered([], error=error)
    late = answered([], error=error, has_begun=True)  # the headers went out with a comment
    assert kinds(late) == ["created", "in_progress", "failed"]
    assert late[-1]["response"]["error"]["message"] == "the engine died"
    fault = answered([{"content": "I "}], error=RuntimeError("a secret"))
    assert kinds(fault)[-1] == "failed" and "secret" not in str(fault)
    assert fault[-1]["response"]["error"]["code"] == "server_error"
    with pytest.raises(APIError, match="before its first chunk"):
        answered([], chunkless=True)
    assert named_event(error.body()).startswith(b'event: error\ndata: {"type":"error","sequence_number":0,"code":null')


def test_calls_of_other_servers() -> None:
    """Ids that come late or never, names in pieces, no arguments; thoughts under two names; usage in part."""
    calls: list[Any] = [
        {"tool_calls": [{"index": 0, "id": None, "function": {"name": "get_"}}]},
        {"tool_calls": [{"index": 0, "id": "late", "function": {"name": "weather"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]},
        {"tool_calls": [{"index": 1, "function": {"name": "now"}}]},
        {"tool_calls": [{"index": 2, "id": "", "function": {"name": "x", "arguments": "1"}}]},
    ]
    deltas = [{"reasoning": "hm", "reasoning_content": "hm"}, *calls]
    events = answered(deltas, finish="tool_calls", usage={"prompt_tokens": 4, "prompt_tokens_details": [1]})
    response = Response.model_validate(events[-1]["response"])
    thought, *found = response.output
    assert thought.content[0].text == "hm"  # type: ignore[union-attr, index]
    assert [(c.call_id, c.name, c.arguments) for c in found] == [  # type: ignore[union-attr]
        ("late", "get_weather", "{}"), ("call_r_1", "now", ""), ("call_r_2", "x", "1"),
    ]  # fmt: skip
    assert response.usage is not None and (response.usage.input_tokens, response.usage.total_tokens) == (4, 4)
    lone = answered([{"tool_calls": [{"index": 0, "id": "a", "function": {"name": "now", "arguments": ""}}]}])
    assert [(item["type"], item["call_id"]) for item in lone[-1]["response"]["output"]] == [("function_call", "a")]
    added = [e["item"] for e in events if e["type"] == "response.output_item.added"]
    assert [(a["id"], a.get("call_id")) for a in added] == [
        (o.id, getattr(o, "call_id", None)) for o in response.output
    ]


def test_logprobs_are_those_of_the_text() -> None:
    deltas = [{"reasoning": "hm"}, {"content": "a"}, {}, {"content": "b"}, {}]
    events = answered(deltas, logprobs=True, include=[LOGPROBS])
    (_, said) = events[-1]["response"]["output"]
    assert [row["token"] for row in said["content"][0]["logprobs"]] == ["1", "2", "3", "4"]
    sent = [[row["token"] for row in e["logprobs"]] for e in events if e["type"] == "response.output_text.delta"]
    assert sent == [["1"], ["2", "3"]]


def test_whoever_leaves_ends_the_work() -> None:
    ended = []

    async def chunks() -> AsyncIterator[Chunk]:
        try:
            while True:
                yield {"model": "m", "choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]}
        finally:
            ended.append(True)

    async def leave() -> None:
        request = ResponsesRequest.model_validate({"model": "m", "input": "a", "stream": True})
        events = response_events(request, chunks(), "r")
        for _ in range(6):
            await anext(events)
        await events.aclose()  # type: ignore[attr-defined]

    wait(leave())
    assert ended == [True]


def test_a_failed_answer_is_no_response() -> None:
    async def fails() -> AsyncIterator[dict[str, Any]]:
        yield {"type": "response.created", "response": {"status": "in_progress"}}
        raise APIError(500, "no", "server_error")

    with pytest.raises(APIError, match="no"):
        wait(last_response(fails()))
