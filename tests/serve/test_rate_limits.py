"""What counts against a limit, and that nothing stays reserved."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from fastattn.serve.app import make_app
from fastattn.serve.auth import ApiKey, Keys
from fastattn.serve.config import ServeConfig
from fastattn.serve.guardrails import Guardrails, GuardrailsConfig
from fastattn.serve.state import ServerState
from tests.serve.fakes import saying, wait

WORDS = {"name": "w", "kind": "words", "words": ["secret"], "directions": ["output"]}
LIMIT = 10_000
KEY = ApiKey(b"")


def client_of(state: ServerState) -> httpx.AsyncClient:
    app = make_app(state)

    async def with_key(scope: Any, receive: Any, send: Any) -> None:
        scope.setdefault("state", {}).update(key=KEY, request_id="r")
        await app(scope, receive, send)

    return httpx.AsyncClient(transport=httpx.ASGITransport(with_key), base_url="http://test")


def left_after(body: dict[str, Any], path: str, guarded: bool) -> tuple[int, int]:
    """(tokens left, tokens reserved) of a tenant after a request."""
    state = ServerState(ServeConfig(model="m", tokens_per_minute=LIMIT), Keys([]))
    answers: Any = saying("a secret", " and ", "more")
    state.chain = Guardrails(GuardrailsConfig.model_validate({"guards": [WORDS]}), answers) if guarded else answers

    async def run() -> None:
        async with client_of(state) as client:
            response = await client.post(path, json=body)
            assert response.status_code == 200, response.text
            await asyncio.sleep(0)

    wait(run())
    reserved, ticket = state.limits._reserved[KEY.bucket], state.limits.admit(KEY)
    ticket.reserve(0)
    return int(ticket.headers["x-ratelimit-remaining-tokens"]), reserved


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 100, **fields}


def test_what_an_answer_took_is_counted() -> None:
    for stream in (False, True):
        assert left_after(chat_body(stream=stream), "/v1/chat/completions", guarded=False) == (LIMIT - 6, 0)


def test_an_answer_that_a_guard_ended_and_nobody_counted_costs_what_was_reserved() -> None:
    """Its reservation stayed for ever, and its tenant's limit shrank with every such answer."""
    for stream in (False, True):
        left, reserved = left_after(chat_body(stream=stream), "/v1/chat/completions", guarded=True)
        assert reserved == 0 and LIMIT - 200 < left < LIMIT - 99


def test_every_prompt_counts() -> None:
    assert status_of({"model": "m", "prompt": ["a"] * 100, "max_tokens": 101}, tokens_per_minute=LIMIT) == [429]


def test_a_request_counts_before_it_is_read() -> None:
    """Else what is refused as wrong costs time without an end."""
    assert status_of(5, requests_per_minute=1) == [400, 429]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_tokens_are_requests_too(path: str) -> None:
    assert status_of({"model": "nobody", "prompt": "a", "tokens": [1]}, path, requests_per_minute=1) == [400, 429]


def status_of(body: Any, path: str = "/v1/completions", **limits: int) -> list[int]:
    state = ServerState(ServeConfig(model="m", **limits), Keys([]))
    state.chain = saying("a")

    async def run() -> list[int]:
        async with client_of(state) as client:
            count = 1 + ("requests_per_minute" in limits)
            return [(await client.post(path, json=body)).status_code for _ in range(count)]

    found: list[int] = wait(run())
    return found
