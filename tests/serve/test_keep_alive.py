"""Streams in which nothing happens for a while, in a queue or while another engine starts."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from fastattn.serve.app import make_app
from fastattn.serve.auth import Keys
from fastattn.serve.config import ServeConfig
from fastattn.serve.contract import APIError
from fastattn.serve.sse import EventStream
from fastattn.serve.state import ServerState
from tests.serve.fakes import Scripted, chunks, until, wait
from tests.serve.test_rate_limits import KEY, chat_body, client_of

COMMENT = b": keep-alive\n\n"


def state_of(answers: Scripted, seconds: float) -> ServerState:
    state = ServerState(ServeConfig(model="m", stream_keep_alive=seconds), Keys([]))
    state.chain = answers
    return state


def late(*items: Any) -> Scripted:
    answers = Scripted(lambda request, _: items or chunks(request, ["he", "llo"]))
    answers.gate.clear()
    return answers


async def open_late(answers: Scripted) -> None:
    """Lets the next request go on when it has waited for ten times the shorter of the silences below."""
    await until(lambda: answers.num_running == 1)
    for _ in range(50):  # turns of the loop: what comes earlier has its own also where one of them is late
        await asyncio.sleep(0.01)
    answers.gate.set()


def test_silence_between_chunks() -> None:
    sent: list[bytes] = []

    async def slow() -> Any:
        yield {"choices": [1]}
        await asyncio.sleep(1.25)
        for _ in range(20):
            yield {"choices": [2]}
            await asyncio.sleep(0.01)

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    for _ in range(3):  # rounds: other work on this machine holds some of them up
        sent.clear()
        wait(EventStream(slow(), {}, 1, 0.5, lambda _: None)({}, asyncio.Event().wait, send))  # type: ignore[arg-type]
        if sent.count(COMMENT) == 2:
            break
    assert sent[2:4] == [COMMENT] * 2 and sent.count(COMMENT) == 2, "and none where something comes"
    assert sent[-1] == b"data: [DONE]\n\n"


def test_the_openai_client_waits_for_its_first_token() -> None:
    answers = late()

    async def run() -> None:
        async with client_of(state_of(answers, 0.05)) as http:
            opening = asyncio.ensure_future(open_late(answers))
            client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http, max_retries=0)
            stream = await client.chat.completions.create(**chat_body(stream=True))
            assert [c.choices[0].delta.content async for c in stream] == ["", "he", "llo", None]
            await opening
            answers.gate.clear()
            opening = asyncio.ensure_future(open_late(answers))
            raw = await http.post("/v1/chat/completions", json=chat_body(stream=True))
            await opening
            assert raw.content.startswith(COMMENT * 2) and raw.content.endswith(b"data: [DONE]\n\n")

    wait(run())


@pytest.mark.parametrize(("seconds", "status"), [(0.05, 200), (10, 503)])
def test_an_error_has_its_status_as_long_as_that_is_possible(seconds: float, status: int) -> None:
    answers = late(APIError(503, "the queue is full", "overloaded_error"))

    async def run() -> None:
        async with client_of(state_of(answers, seconds)) as http:
            opening = asyncio.ensure_future(open_late(answers))
            raw = await http.post("/v1/chat/completions", json=chat_body(stream=True))
            await opening
            assert raw.status_code == status and b"the queue is full" in raw.content

    wait(run())


@pytest.mark.parametrize("seconds", [0.05, 10])
def test_leaving_before_the_first_token_ends_the_work(seconds: float) -> None:
    answers, gone = late(), asyncio.Event()
    body = json.dumps(chat_body(stream=True)).encode()
    came = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if came:
            return came.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        pass

    async def run() -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b""}
        scope |= {"state": {"key": KEY, "request_id": "r"}}
        state, before = state_of(answers, seconds), asyncio.all_tasks()
        served = asyncio.ensure_future(make_app(state)(scope, receive, send))
        await until(lambda: answers.num_running == 1)
        await asyncio.sleep(0.2)
        gone.set()
        await served
        assert (answers.num_running, answers.num_left) == (0, 1) and asyncio.all_tasks() == before

    wait(run())
