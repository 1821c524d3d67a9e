"""What counts against a limit, and that nothing stays reserved."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from fastattn.serve.app import make_app
from fastattn.serve.auth import ApiKey, Keys
from fastattn.serve.config import ServeConfig
from fastattn.serve.guardrails import Guardrails, GuardrailsConfig
from fastattn.serve.state import ServerState
from tests.serve.fakes import saying, wait

WORDS = {"name": "w", "kind": "words", "words": ["secret"], "directions": ["output"]}
LIMIT = 10_000


def left_after(body: dict[str, Any], path: str, guarded: bool) -> tuple[int, int]:
    """(tokens left, tokens reserved) of a tenant after a request."""
    state = ServerState(ServeConfig(model="m", tokens_per_minute=LIMIT), Keys([]))
    answers: Any = saying("a secret")
    state.chain = Guardrails(GuardrailsConfig.model_validate({"guards": [WORDS]}), answers) if guarded else answers
    app, key = make_app(state), ApiKey(b"")

    async def with_key(scope: Any, receive: Any, send: Any) -> None:
        scope.setdefault("state", {}).update(key=key, request_id="r")
        await app(scope, receive, send)

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(with_key), base_url="http://test") as client:
            response = await client.post(path, json=body)
            assert response.status_code == 200, response.text
            await asyncio.sleep(0)

    wait(run())
    left = int(state.limits.admit(key, 0).headers["x-ratelimit-remaining-tokens"])
    return left, state.limits._reserved[key.bucket]


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 100, **fields}


def test_what_an_answer_took_is_counted() -> None:
    for stream in (False, True):
        assert left_after(chat_body(stream=stream), "/v1/chat/completions", guarded=False) == (LIMIT - 4, 0)


def test_an_answer_that_a_guard_ended_costs_what_was_reserved() -> None:
    """It has no usage: its reservation stayed for ever, and its tenant's limit shrank with every such answer."""
    for stream in (False, True):
        left, reserved = left_after(chat_body(stream=stream), "/v1/chat/completions", guarded=True)
        assert reserved == 0 and LIMIT - 200 < left < LIMIT - 99


def test_every_prompt_counts() -> None:
    body = {"model": "m", "prompt": ["a"] * 100, "max_tokens": 101}
    state = ServerState(ServeConfig(model="m", tokens_per_minute=LIMIT), Keys([]))
    state.chain = saying("a")
    app = make_app(state)

    async def run() -> int:
        async def with_key(scope: Any, receive: Any, send: Any) -> None:
            scope.setdefault("state", {}).update(key=ApiKey(b""), request_id="r")
            await app(scope, receive, send)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(with_key), base_url="http://test") as client:
            return (await client.post("/v1/completions", json=body)).status_code

    assert wait(run()) == 429
