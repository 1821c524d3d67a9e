"""Clients that cost more than they should: endless bodies and trailers, floods, a million mistakes in one request."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from typing import Any

import msgspec
import psutil
import pytest

from fastattn.serve.app import _parse
from fastattn.serve.contract import APIError
from fastattn.serve.messages import TokenizerParts
from fastattn.serve.protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest
from fastattn.serve.renderer import Renderer, _as_template_sees
from fastattn.serve.responses import ResponsesRequest
from fastattn.serve.sse import EventStream
from fastattn.serve.tools import forced_schema
from tests.serve.fakes import until, wait
from tests.serve.harness import Running, chat, wait_for

HEAD = b" HTTP/1.1\r\nHost: localhost\r\n"


def talk(server: Running, data: bytes, more: bytes = b"", seconds: float = 8) -> bytes:
    """What comes back until the server closes the connection, while `more` is sent again and again."""
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.2) as connection:
        connection.sendall(data)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if more:
                    connection.sendall(more)
                part = connection.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                return received
            if not part:
                return received
            received += part
    raise AssertionError(f"still open after {seconds} s: {received[:200]!r}")


@pytest.mark.parametrize("request_", [b"GET /health", b"POST /nope", b"POST /v1/completions"])
def test_an_answer_before_the_body_ends_the_connection(server: Running, request_: bytes) -> None:
    """A drip of body bytes kept it open for ever: the timer of idle connections starts with the answer only."""
    body = b"Content-Length: 100000000\r\n\r\n"
    assert b"connection: close" in talk(server, request_ + HEAD + body, more=b"x")


def test_an_answer_after_the_body_keeps_it(server: Running) -> None:
    twice = (b"POST /detokenize" + HEAD + b"Content-Length: 13\r\n\r\n" + b'{"tokens":[]}') * 2
    last = b"GET /health" + HEAD + b"Connection: close\r\n\r\n"
    assert talk(server, twice + last).count(b" 200 OK") == 3


@pytest.mark.parametrize("trailer", [b"X-Trailer: " + b"a" * 100 + b"\r\n", b"a" * 100], ids=["many", "one"])
def test_trailers_are_bounded(server: Running, trailer: bytes) -> None:
    front = psutil.Process(server.process.pid)
    before = front.memory_info().rss
    start = b"POST /health" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n"
    talk(server, start + (b"" if b"\r" in trailer else b"X-Trailer: "), more=trailer * 10_000)
    assert front.memory_info().rss < before + (64 << 20)
    assert server.get("/health").status_code == 200


def test_leaving_before_the_body_is_no_error_of_ours(server: Running) -> None:
    count = server.metric("fastattn:client_disconnects_total")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /v1/completions" + HEAD + b"Content-Length: 100\r\n\r\n{")
        time.sleep(0.1)
    wait_for(lambda: server.metric("fastattn:client_disconnects_total") > count, "a client that left", 60)
    assert 'route="/v1/completions",status="5xx"' not in server.get("/metrics").text


def test_leaving_several_requests_at_once(server: Running) -> None:
    """Only the last was told; the others wrote on to a closed connection, each with two tracebacks."""
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}).encode()
    request = b"POST /v1/completions" + HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    seen = len(server.log)
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(request * 3)
            connection.recv(100)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not closed
    wait_for(lambda: server.metric("fastattn:num_requests_running") == 0, "an idle engine", 30)
    assert not any("error of ours" in line or "Traceback" in line for line in server.log[seen:])


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        (ChatCompletionRequest, '{"model":"m","messages":[{"role":"user","content":"a"}],"modalities":[', "]}"),
        (ResponsesRequest, '{"model":"m","input":[', "]}"),
        (
            ResponsesRequest,
            '{"model":"m","input":[{"role":"user","content":[{"type":"input_text","text":"a","logprobs":[',
            "]}]}]}",
        ),
    ],
)
def test_long_lists_of_what_is_wrong(kind: Any, before: str, after: str) -> None:
    start = time.process_time()
    with pytest.raises(APIError):
        _parse(f"{before}{'1,' * 300_000}1{after}".encode(), kind)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("kind", [CompletionRequest, DetokenizeRequest])
@pytest.mark.parametrize("item", ["1.5", "{}", "-1"])
def test_a_million_mistakes_are_one(kind: Any, item: str) -> None:
    """To describe each took ten seconds and a gigabyte."""
    body = f'{{"model":"m","{"prompt" if kind is CompletionRequest else "tokens"}":[{",".join([item] * 300_000)}]}}'
    start = time.process_time()
    with pytest.raises(APIError):
        _parse(body.encode(), kind)
    assert time.process_time() - start < 2


def schema(num_bytes: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i:07}": {"type": "string"} for i in range(num_bytes // 28)}}


def test_schemas_are_bounded() -> None:
    """One of 6 MB held up everybody for a second."""

    def tool(name: str, num_bytes: int) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, "parameters": schema(num_bytes)}}

    ChatCompletionRequest.model_validate(chat("a", tools=[tool("a", 100_000), tool("b", 100_000)]))
    ways: list[dict[str, Any]] = [
        {"tools": [tool("a", 6 << 20)]},
        {"tools": [tool(f"a{i}", 50_000) for i in range(6)]},
        {"guided_json": schema(300_000)},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema(300_000)}}},
    ]
    for fields in ways:
        with pytest.raises(APIError, match="bytes of JSON, allowed are 262144"):
            _parse(json.dumps(chat("a", **fields)).encode(), ChatCompletionRequest)


def test_parts_of_messages_are_bounded() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": ""}] * 2048}
    body = json.dumps({"model": "m", "messages": [message] * 100}).encode()
    with pytest.raises(APIError, match="allowed are 8192 in all"):
        _parse(body, ChatCompletionRequest)


def test_who_leaves_before_a_worker_is_free_leaves_nothing() -> None:
    async def run() -> None:
        renderer = Renderer(TokenizerParts("", None, [], False, False, "{{ tools }}"), 10, 1)
        worker = await renderer._idle.get()  # it is busy
        before = asyncio.all_tasks()
        flood = [asyncio.ensure_future(renderer.encode(["a"])) for _ in range(100)]
        await asyncio.sleep(0)
        for task in flood:
            task.cancel()
        await asyncio.wait(flood)
        assert asyncio.all_tasks() == before
        renderer._idle.put_nowait(worker)
        assert await asyncio.wait_for(renderer._idle.get(), 1) is worker

    wait(run())


def test_numbers_that_no_template_gets() -> None:
    async def run() -> None:
        renderer = Renderer(TokenizerParts("", None, [], False, False, "{{ tools }}"), 10, 1)
        tool = {"type": "function", "function": {"name": "a", "parameters": {"maximum": 10**30}}}
        request = ChatCompletionRequest.model_validate(chat("a", tools=[tool]))
        with pytest.raises(APIError, match="template"):
            await renderer.chat(request.messages, request.tools)

    wait(run())


def test_half_a_surrogate_pair_in_a_calls_arguments() -> None:
    """In the body it is an escaped backslash, which is fine; what the arguments then hold could not be sent to a worker."""
    call = {"id": "c", "type": "function", "function": {"name": "a", "arguments": '{"b": "\\ud800"}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    request = _parse(json.dumps({"model": "m", "messages": messages}).encode(), ChatCompletionRequest)
    for template in ("{{ tools }}", ""):  # knows tools, and does not
        (seen,) = [_as_template_sees(message, "tools" in template) for message in request.messages]
        msgspec.msgpack.encode(seen)
        assert '"b": "?"' in json.dumps(seen).replace("\\", "")


def test_definitions_that_are_no_object() -> None:
    tool = {"type": "function", "function": {"name": "a", "parameters": {"$defs": 5}}}
    request = ChatCompletionRequest.model_validate(chat("a", tools=[tool], tool_choice="required"))
    with pytest.raises(APIError, match=r"\$defs"):
        forced_schema(request)


def test_a_client_that_does_not_read_is_cut_off_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """Not told of an error of ours first, which it would not read either, in twice the time."""
    ended: list[bool] = []
    sent: list[dict[str, Any]] = []
    aborted = asyncio.Event()

    async def chunks() -> Any:
        while True:
            yield {"choices": []}

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) > 3:
            await asyncio.Event().wait()

    async def run() -> None:
        stream = EventStream(chunks(), {}, 0.1, 60, ended.append)
        await stream({"fastattn.abort": aborted.set}, asyncio.Event().wait, send)  # type: ignore[arg-type]
        await until(aborted.is_set)

    wait(run())
    assert len(sent) == 4 and ended == [False] and "error of ours" not in caplog.text


def test_what_is_not_offered_is_said(server: Running) -> None:
    response = server.post("/v1/completions", {"model": "tiny", "prompt": "a", "suffix": "b"})
    assert response.status_code == 400 and "not supported" in json.loads(response.text)["error"]["message"]


@pytest.mark.parametrize("num_turns", range(12))
def test_a_client_that_leaves_is_noticed_between_any_two_chunks(num_turns: int) -> None:
    """Chunks that come without a pause, and a cancellation that comes when one has just been sent: once lost, and all were made."""
    sent: list[bytes] = []
    sixth = asyncio.Event()

    async def chunks() -> Any:
        for _ in range(400):
            yield {"choices": []}
            await asyncio.sleep(0)

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))
        if len(sent) == 6:
            sixth.set()

    async def receive() -> Any:
        await sixth.wait()
        for _ in range(num_turns):
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    ended: list[bool] = []
    asyncio.run(EventStream(chunks(), {}, 60, 60, ended.append)({"type": "http"}, receive, send))
    assert ended == [False] and len(sent) < 40
