"""Every parameter that the official client knows has been decided about: docs/serve.md says how, and so it is."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import ValidationError

from fastattn.serve.protocol import ChatCompletionRequest, CompletionRequest, EmbeddingRequest
from fastattn.serve.responses import ResponsesRequest
from fastattn.serve.validation import validation_error

CLIENT = openai.OpenAI(api_key="none")
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "chat completions": (
        CLIENT.chat.completions.create,
        ChatCompletionRequest,
        {"messages": [{"role": "user", "content": "hi"}]},
    ),
    "completions": (CLIENT.completions.create, CompletionRequest, {"prompt": "hi"}),
    "responses": (CLIENT.responses.create, ResponsesRequest, {"input": "hi"}),
    "embeddings": (CLIENT.embeddings.create, EmbeddingRequest, {"input": "hi"}),
}
OF_THE_CLIENT = {"extra_headers", "extra_query", "extra_body", "timeout"}
WITHOUT_EFFECT: dict[str, Any] = {
    "background": False, "best_of": 1, "metadata": {"a": "b"}, "modalities": ["text"],
    "prediction": {"type": "content", "content": [{"type": "text", "text": "a"}]}, "prompt_cache_key": "a",
    "prompt_cache_options": {"mode": "explicit", "ttl": "30m"}, "prompt_cache_retention": "24h", "safety_identifier": "a",
    "service_tier": "auto", "store": False, "stream_options": {"include_obfuscation": False}, "truncation": "disabled",
    "user": "a", "verbosity": "medium",
}  # fmt: skip
# What a client that means it would send; and other values of what is accepted with one.
REFUSED: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"}, "function_call": "auto", "functions": [{"name": "f"}],
    "moderation": {"model": "m"}, "web_search_options": {}, "suffix": "a", "dimensions": 8, "access_programs": ["a"],
    "background_options": {}, "context_management": [], "conversation": "a", "image": {}, "max_tool_calls": 1,
    "previous_response_id": "a", "prompt": {"id": "a"},
}  # fmt: skip
OTHER_VALUES: dict[str, Any] = {
    "background": True, "modalities": ["text", "audio"], "service_tier": "flex", "store": True, "truncation": "auto",
    "verbosity": "low", "best_of": 2,
}  # fmt: skip


def decided(kind: str) -> dict[str, set[str]]:
    """{supported | accepted, without an effect | refused: names} of the table."""
    lines = (Path(__file__).parents[2] / "docs/serve.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| | chat completions"))
    heads, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[start : start + 5])
    column = heads.index(kind)
    without_hints = [re.sub(r"\(.*?\)", "", row[column]) for row in rows]
    names = [set(re.findall(r"`([a-z_]+)(?:: [^`]*)?`", cell)) - {"default"} for cell in without_hints]
    return {row[0]: found for row, found in zip(rows, names, strict=True) if found}


def refusal(kind: str, **fields: Any) -> str | None:
    _, model, needed = KINDS[kind]
    try:
        model.model_validate({"model": "m"} | needed | fields)
    except ValidationError as error:
        return validation_error(error).message
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_the_client_is_decided(kind: str) -> None:
    """A new one fails here until somebody has decided about it, in the table and in the protocol."""
    known = set(inspect.signature(KINDS[kind][0]).parameters) - OF_THE_CLIENT
    table = decided(kind)
    assert set.union(*table.values()) == known
    assert sum(map(len, table.values())) == len(known), "one is there twice"
    fields = KINDS[kind][1].model_fields
    assert known <= fields.keys()
    for name in table["accepted, without an effect"]:
        assert refusal(kind, **{name: WITHOUT_EFFECT[name]}) is None, name
        if name in OTHER_VALUES:
            assert (refusal(kind, **{name: OTHER_VALUES[name]}) or "").startswith(name), name
    for name in table["refused"]:
        assert (refusal(kind, **{name: REFUSED[name]}) or "").startswith(f"{name}: it is not supported here"), name
    for name in known:
        assert fields[name].is_required() or refusal(kind, **{name: None}) is None, name


def test_a_streamed_tool_call_can_be_sent_back() -> None:
    call = {"index": 0, "id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    request = ChatCompletionRequest.model_validate({"model": "m", "messages": messages})
    del call["index"]
    assert request.model_dump(exclude_unset=True)["messages"] == messages, "others may not know it"
