"""What is in a request's key."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.serve.cache.key import DELIVERY, request_key
from fastattn.serve.protocol import ChatCompletionRequest, CompletionRequest

BASE = {
    "model": "m", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}],
    "temperature": 0.0, "max_tokens": 5,
}  # fmt: skip
OTHER_VALUES: dict[str, Any] = {
    "model": "n", "messages": [{"role": "user", "content": "hello"}], "temperature": 0.5, "max_tokens": 6,
    "max_completion_tokens": 5, "frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty": 1.5,
    "logit_bias": {"3": 1.0}, "n": 2, "seed": 3, "stop": ["x"], "top_p": 0.5, "user": "u", "top_k": 4, "min_p": 0.1,
    "min_tokens": 1, "stop_token_ids": [1], "ignore_eos": True, "skip_special_tokens": False,
    "include_stop_str_in_output": True, "priority": 1, "structured_outputs": {"regex": "a+"}, "guided_json": {},
    "guided_regex": "a", "guided_choice": ["a"], "guided_grammar": "start: \"a\"", "logprobs": True,
    "response_format": {"type": "json_object"}, "parallel_tool_calls": True, "metadata": {"a": "b"},
    "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none", "modalities": ["text"],
    "store": False, "service_tier": "auto", "reasoning_effort": "low", "chat_template_kwargs": {"thinking": True},
    "verbosity": "medium", "prediction": {"type": "content", "content": "x"}, "prompt_cache_key": "k",
    "prompt_cache_options": {}, "prompt_cache_retention": "24h", "safety_identifier": "s",
}  # fmt: skip


def key(body: dict[str, Any], fingerprint: str = "f", tenant: str = "t", **headers: str) -> bytes:
    return request_key(ChatCompletionRequest.model_validate(body), fingerprint, tenant, headers)


def test_every_field_is_in_the_key() -> None:
    """A field that is new in the protocol fails here until this test has a value for it."""
    refused = {name for name, field in ChatCompletionRequest.model_fields.items() if field.annotation is type(None)}
    fields = set(ChatCompletionRequest.model_fields) - DELIVERY - refused
    keys = {"": key(BASE)}
    for name in fields:
        body = BASE | {name: OTHER_VALUES[name]} if name != "top_logprobs" else BASE | {"logprobs": True, name: 2}
        keys[name] = key(body)
    assert len(set(keys.values())) == len(fields) + 1
    assert key(BASE | {"stream": True, "stream_options": {"include_usage": True}}) == keys[""]


def test_model_tenant_and_kind_are_in_the_key() -> None:
    keys = {
        key(BASE),
        key(BASE, fingerprint="g"),
        key(BASE, tenant="u"),
        key(BASE, "ft", ""),
        key(BASE, **{"x-tier": "gold"}),
    }
    keys.add(request_key(CompletionRequest(model="m", prompt="hello", temperature=0.0, max_tokens=5), "f", "t", {}))
    assert len(keys) == 6


def test_defaults_and_their_values_have_one_key() -> None:
    assert key(BASE) == key(BASE | {"top_p": None, "stop": None})


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(a=TEXTS, b=TEXTS, c=TEXTS, d=TEXTS)
@settings(max_examples=200, deadline=None)
def test_texts_never_slip_from_one_message_into_another(a: str, b: str, c: str, d: str) -> None:
    def of(x: str, y: str) -> bytes:
        return key(BASE | {"messages": [{"role": "system", "content": x}, {"role": "user", "content": y}]})

    assert (of(a, b) == of(c, d)) == ((a, b) == (c, d))
    assert (key(BASE, tenant=a, fingerprint=b) == key(BASE, tenant=c, fingerprint=d)) == ((a, b) == (c, d))
