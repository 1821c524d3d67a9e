"""What requests are let through, what their errors say, and that folding a stream gives the whole answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import ValidationError

from fastattn.serve.contract import APIError, Chunk
from fastattn.serve.fold import fold_chunks
from fastattn.serve.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from fastattn.serve.renderer import _as_template_sees
from fastattn.serve.validation import validation_error

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f"}}

BAD_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"foo": 1}, "'foo' is not known"),
    ({"n": "5"}, "n: "),
    ({"n": 0}, "n: "),
    ({"n": True}, "n: "),
    ({"n": 129}, "n: "),
    ({"n": 2**63}, "n: "),
    ({"temperature": -0.1}, "temperature: "),
    ({"temperature": float("nan")}, "temperature: "),
    ({"temperature": float("inf")}, "temperature: "),
    ({"temperature": True}, "temperature: "),
    ({"top_p": 0}, "top_p: "),
    ({"top_k": -2}, "top_k: "),
    ({"top_k": 2**31}, "top_k: "),
    ({"min_p": 1.5}, "min_p: "),
    ({"seed": 2**63}, "seed: "),
    ({"repetition_penalty": 0}, "repetition_penalty: "),
    ({"presence_penalty": 2.5}, "presence_penalty: "),
    ({"max_tokens": 0}, "max_tokens: "),
    ({"max_tokens": 4, "min_tokens": 5}, "min_tokens is 5, allowed is at most the token limit, 4"),
    ({"stop": [""]}, "stop: "),
    ({"stop": ["a"] * 17}, "stop: "),
    ({"logit_bias": {"x": 1}}, "'x' is not a token id"),
    ({"logit_bias": {"-1": 1}}, "'-1' is not a token id"),
    ({"logit_bias": {"٣": 1}}, "is not a token id"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]: "),
    ({"logprobs": 1}, "logprobs: "),
    ({"top_logprobs": 3}, "only with logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: "),
    ({"stream_options": {"include_usage": True}}, "only with stream"),
    ({"stream": True, "stream_options": {"x": True}}, "'x' is not known"),
    ({"response_format": {"type": "json_schema"}}, "json_schema is needed"),
    ({"response_format": {"type": "xml"}}, "response_format.type: "),
    ({"tool_choice": "required"}, "there are no tools"),
    ({"tools": [TOOL, TOOL]}, "name twice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "not among the tools"),
    ({"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}}, "exclude one another"),
    ({"structured_outputs": {}}, "exactly one of"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "exactly one of"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "at most one of"),
    ({"messages": []}, "messages: "),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role: "),
    ({"messages": [{"role": "user"}]}, "content is null"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "tool_call_id"),
    ({"messages": "hi"}, "messages: "),
    ({"model": None}, "model: "),
    ({"store": True}, "store: "),
]


@pytest.mark.parametrize(("fields", "message"), BAD_CHAT, ids=lambda value: repr(value)[:60])
def test_bad_chat_requests_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate({"model": "m", "messages": [USER]} | fields)
    error = validation_error(caught.value)
    assert error.status == 400 and error.type == "invalid_request_error"
    assert message in error.message


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "refusal"])
def test_parts_that_are_no_text_are_named(kind: str) -> None:
    content = [{"type": "text", "text": "what is this?"}, {"type": kind, kind: {"url": "http://x"}}]
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate({"model": "m", "messages": [USER, {"role": "user", "content": content}]})
    error = validation_error(caught.value)
    said = f"messages[1].content: part 1 is of type {kind!r}, this server takes parts of type 'text' only"
    assert (error.param, error.message) == ("messages[1].content", said)


def test_a_union_says_all_that_is_allowed() -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"model": "m", "prompt": 5})
    error = validation_error(caught.value)
    assert error.param == "prompt"
    assert "valid string or Input should be a valid list, got 5" in error.message


@pytest.mark.parametrize("prompt", ["", [], [[]], [1, "a"], [-1], [2**31], [1.5], {"prompt_embeds": "x"}, [["a"]]])
def test_bad_prompts(prompt: Any) -> None:
    if prompt == "":  # the empty text is a prompt: it begins with BOS, where the model has one
        CompletionRequest.model_validate({"model": "m", "prompt": prompt})
        return
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate({"model": "m", "prompt": prompt})
    with pytest.raises(ValidationError):
        EmbeddingRequest.model_validate({"model": "m", "input": prompt})


def test_prompts_times_n_is_bounded() -> None:
    CompletionRequest.model_validate({"model": "m", "prompt": ["a"] * 64, "n": 2})
    with pytest.raises(ValidationError, match="allowed are 128 in all"):
        CompletionRequest.model_validate({"model": "m", "prompt": ["a"] * 65, "n": 2})


def test_an_answer_can_be_sent_back() -> None:
    """What the openai client keeps of an answer, as part of the next request."""
    answer = {"role": "assistant", "content": "x", "refusal": None, "annotations": None, "audio": None}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer |= {"function_call": None, "tool_calls": [call]}
    tool = {"role": "tool", "content": "5", "tool_call_id": "1"}
    request = ChatCompletionRequest.model_validate({"model": "m", "messages": [USER, answer, tool]})
    assert request.messages[1].tool_calls is not None
    thought = {"role": "assistant", "content": "x", "reasoning_content": "hm"}
    message = ChatCompletionRequest.model_validate({"model": "m", "messages": [USER, thought]}).messages[1]
    assert _as_template_sees(message, knows_tools=False)["reasoning_content"] == "hm"
    with pytest.raises(ValidationError, match="allowed is 'assistant'"):
        ChatCompletionRequest.model_validate({"model": "m", "messages": [USER | {"reasoning": "hm"}]})


def test_every_way_to_ask_for_structure_is_one() -> None:
    base = {"model": "m", "messages": [USER]}
    new = ChatCompletionRequest.model_validate(base | {"structured_outputs": {"regex": "a+"}})
    old = ChatCompletionRequest.model_validate(base | {"guided_regex": "a+"})
    assert new.structure == old.structure is not None


def test_tokenize_takes_one_of_two() -> None:
    with pytest.raises(ValidationError, match="either prompt or messages"):
        TokenizeRequest.model_validate({"prompt": "a", "messages": [USER]})


def chunk(index: int, delta: dict[str, Any], finish: str | None = None, **more: Any) -> Chunk:
    choice = {"index": index, "delta": delta, "finish_reason": finish, **more}
    return {"id": "1", "object": "chat.completion.chunk", "created": 5, "model": "m", "choices": [choice]}


def fold(*chunks: Chunk) -> dict[str, Any]:
    async def stream() -> AsyncIterator[Chunk]:
        for one in chunks:
            yield one

    return asyncio.run(fold_chunks(stream()))


def test_fold_chat() -> None:
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}
    more = {"index": 0, "function": {"arguments": '{"a": 1}'}}
    logprob = {"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": []}
    answer = fold(
        chunk(1, {"role": "assistant", "content": ""}),
        chunk(0, {"role": "assistant", "tool_calls": [call]}),
        chunk(1, {"content": "a"}, logprobs={"content": [logprob]}),
        chunk(0, {"tool_calls": [more]}),
        chunk(1, {"content": "b"}, "stop", logprobs={"content": [logprob]}),
        chunk(0, {}, "tool_calls"),
        {"object": "chat.completion.chunk", "choices": [], "usage": {"total_tokens": 3}},
    )
    assert answer["object"] == "chat.completion" and answer["id"] == "1" and answer["usage"] == {"total_tokens": 3}
    first, second = answer["choices"]
    assert first["message"]["tool_calls"] == [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    ]
    assert first["message"]["content"] is None and first["finish_reason"] == "tool_calls"
    assert second["message"]["content"] == "ab" and second["finish_reason"] == "stop"
    assert len(second["logprobs"]["content"]) == 2


def test_fold_text() -> None:
    def part(text: str, finish: str | None, at: int) -> Chunk:
        logprobs = {"tokens": [text], "token_logprobs": [-1.0], "top_logprobs": [{text: -1.0}], "text_offset": [at]}
        choice = {"index": 0, "text": text, "finish_reason": finish, "logprobs": logprobs}
        return {"id": "1", "object": "text_completion", "created": 5, "model": "m", "choices": [choice]}

    (choice,) = fold(part("a", None, 0), part("b", "length", 1))["choices"]
    assert choice["text"] == "ab" and choice["finish_reason"] == "length"
    assert choice["logprobs"]["text_offset"] == [0, 1]


def test_folding_nothing_is_an_error() -> None:
    with pytest.raises(APIError):
        fold()
