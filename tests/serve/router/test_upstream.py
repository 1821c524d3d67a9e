"""Other servers as models: real HTTP on loopback, every way in which one can fail (reliability table, row 30)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fastattn.serve.router import Router, RouterConfig
from tests.serve.fakes import ask, chat, chunks, completion, context, error_of, saying, text, until_error, wait

Handler = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]


class Peer:
    """A scripted server. requests: (first line, headers, body) of each."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.base = ""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            first = (await reader.readline()).decode().strip()
            headers = {}
            while line := (await reader.readline()).decode().strip():
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))))
            self.requests.append((first, headers, body))
            await self._handler(body, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Peer]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.base = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with server:
            yield self


def plain(status: str, body: str = "{}", **headers: str) -> Handler:
    async def handle(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        lines = [
            f"HTTP/1.1 {status}",
            f"content-length: {len(body)}",
            *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items()),
        ]
        writer.write(("\r\n".join(lines) + "\r\n\r\n" + body).encode())
        await writer.drain()

    return handle


def events(*parts: bytes | float, content_type: str = "text/event-stream", done: bool = True) -> Handler:
    """Sends bytes as they are; a number is a pause."""

    async def handle(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\nconnection: close\r\n\r\n".encode())
        for part in parts:
            if isinstance(part, bytes):
                writer.write(part)
                await writer.drain()
            else:
                await asyncio.sleep(part)
        if done:
            writer.write(b"data: [DONE]\n\n")
            await writer.drain()

    return handle


def lines(request: Any, *pieces: str, **more: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(c).encode() + b"\n\n" for c in chunks(request, pieces, **more))


def config(peer: Peer, **fields: Any) -> dict[str, Any]:
    return {"model_name": "m", "api_base": peer.base, "model": "theirs", "timeout": 20.0} | fields


def router(*entries: dict[str, Any], **fields: Any) -> Router:
    return Router(
        RouterConfig.model_validate({"model_list": list(entries), "num_retries": 0} | fields), {"ours": saying("ours")}
    )


async def through(peer: Peer, request: Any, **fields: Any) -> dict[str, Any]:
    async with peer.running():
        route = router(config(peer, **fields))
        try:
            return await ask(route, request, context(request_id="req-1"))
        finally:
            await route.close()


def test_what_is_sent_and_what_comes_back(tmp_path: Path) -> None:
    request = chat("hi", model="m", max_tokens=7, seed=3, tools=[{"type": "function", "function": {"name": "f"}}])
    peer = Peer(events(b": a comment\n\n", lines(request, "one ", "two\u2028", "three")))
    (tmp_path / "key").write_text("sk-upstream\n")
    answer = wait(through(peer, request, api_key_file=tmp_path / "key"))
    assert answer["choices"][0]["message"]["content"] == "one two\u2028three"
    assert answer["model"] == "m" and answer["usage"]["completion_tokens"] == 3
    ((first, headers, body),) = peer.requests
    assert first == "POST /v1/chat/completions HTTP/1.1"
    assert headers["authorization"] == "Bearer sk-upstream" and headers["x-request-id"] == "req-1"
    assert body == {
        "model": "theirs", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 7, "seed": 3, "temperature": 0.0,
        "tools": [{"type": "function", "function": {"name": "f"}}], "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def test_completions_and_bytes_in_any_pieces() -> None:
    request = completion("p", model="m")
    data = lines(request, "grüße ", "日本", logprobs=[-0.5, -0.5])
    parts: list[bytes | float] = [data[i : i + 1] for i in range(len(data))]
    peer = Peer(events(*parts))
    answer = wait(through(peer, request))
    assert answer["choices"][0]["text"] == "grüße 日本"
    assert peer.requests[0][0].startswith("POST /v1/completions")


REQUEST = chat(model="m")
GOOD = lines(REQUEST, "good")
FAULTS: dict[str, tuple[Handler, int, str]] = {
    "429": (plain("429 Busy", retry_after="7"), 429, "busy"),
    "500": (plain("500 Oops", "secret details"), 502, "status 500"),
    "503": (plain("503 No"), 503, "overloaded"),
    "401": (plain("401 No", '{"error":{"message":"bad key sk-upstream"}}'), 502, "status 401"),
    "404": (plain("404 No"), 502, "status 404"),
    "redirect": (plain("302 Found", location="http://169.254.169.254/latest/meta-data"), 502, "status 302"),
    "a page": (events(b"<html>", content_type="text/html"), 502, "'text/html', not a stream"),
    "JSON": (plain("200 OK", '{"choices": []}', content_type="application/json"), 502, "not a stream"),
    "compressed": (plain("200 OK", "zzzz", content_type="text/event-stream", content_encoding="gzip"), 502, "not a stream"),
    "hang": (events(10.0), 504, "no sign of life"),
    "hang before headers": (lambda b, w: asyncio.sleep(10), 504, "no sign of life"),
    "closed": (lambda b, w: asyncio.sleep(0), 502, "cannot be reached"),
    "no end": (events(lines(REQUEST, finish=None, usage=False), done=False), 502, "cut the answer"),
    "empty": (events(), 502, "cut the answer"),
    "not JSON": (events(b"data: {oops\n\n"), 502, "not JSON"),
    "NaN": (events(b'data: {"choices": [], "x": NaN}\n\n'), 502, "not JSON"),
    "half a surrogate": (events(b'data: {"choices": [{"index": 0, "delta": {"content": "\\ud800"}}]}\n\n'), 502, "not JSON"),
    "deep": (events(b"data: " + b"[" * 100_000 + b"\n\n"), 502, "not JSON"),
    "no chunk": (events(b'data: {"choices": {}}\n\n'), 502, "a chunk that is none"),
    "a list": (events(b"data: []\n\n"), 502, "a chunk that is none"),
    "odd index": (events(b'data: {"choices": [{"index": -1, "delta": {}}]}\n\n'), 502, "a chunk that is none"),
    "odd text": (events(b'data: {"choices": [{"index": 0, "delta": {"content": 5}}]}\n\n'), 502, "a chunk that is none"),
    "odd call": (events(b'data: {"choices": [{"index": 0, "delta": {"tool_calls": [1]}}]}\n\n'), 502, "a chunk that is none"),
    "odd id": (events(b'data: {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "id": 5}]}}]}\n\n'), 502, "is none"),
    "a huge index": (events(b'data: {"choices": [{"index": 1%s, "delta": {}}]}\n\n' % (b"0" * 30)), 502, "more than 64 bits"),
    "a huge number": (events(b'data: {"choices": [], "x": {"y": [%d]}}\n\n' % 2**70), 502, "more than 64 bits"),
    "odd usage": (events(b'data: {"choices": [], "usage": [1]}\n\n'), 502, "a chunk that is none"),
    "odd counts": (events(b'data: {"choices": [], "usage": {"total_tokens": null}}\n\n'), 502, "a chunk that is none"),
    "odd logprobs": (events(b'data: {"choices": [{"index": 0, "logprobs": {"content": 5}}]}\n\n'), 502, "a chunk that is none"),
    "error event": (events(b'data: {"error": {"message": "secret"}}\n\n'), 502, "an error in the middle"),
    "endless line": (events(b"data: " + b"x" * (5 << 20)), 502, "a line of more than"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_and_another_model_answers(fault: str) -> None:
    handler, status, words = FAULTS[fault]
    peer = Peer(handler)
    timeout = 0.4 if fault.startswith("hang") else 20.0

    async def run() -> None:
        async with peer.running():
            alone = router(config(peer, timeout=timeout), allowed_fails=1)
            before = time.monotonic()
            error = await error_of(alone, REQUEST, context())
            assert (error.status, error.type) == (status, "server_error") and words in error.message, error.message
            assert "secret" not in error.message and "sk-upstream" not in error.message
            assert time.monotonic() - before < 5
            resting = await error_of(alone, REQUEST, context())
            assert (resting.status, resting.code) == (503, "model_unavailable"), "it rests"
            await alone.close()
            backed = router(
                config(peer, timeout=timeout), {"model_name": "o", "engine": "ours"}, fallbacks={"m": ["o"]}
            )
            assert await text(backed, REQUEST, context()) == "ours"
            await backed.close()

    wait(run())
    assert len(peer.requests) == 2


def test_a_refusal_of_the_request_reaches_the_client() -> None:
    peer = Peer(plain("400 Bad", '{"error": {"message": "max_tokens is too large"}}'))

    async def run() -> None:
        async with peer.running():
            route = router(config(peer), allowed_fails=1)
            for _ in range(2):
                error = await error_of(route, REQUEST, context())
                assert (error.status, error.type, error.message) == (
                    400,
                    "invalid_request_error",
                    "max_tokens is too large",
                )
            await route.close()

    wait(run())


def test_a_rest_that_was_asked_for_is_kept() -> None:
    peer = Peer(plain("429 Busy", retry_after="7"))

    async def run() -> None:
        async with peer.running():
            route = router(config(peer), allowed_fails=100)
            await error_of(route, REQUEST, context())
            error = await error_of(route, REQUEST, context())
            assert (error.status, error.headers["Retry-After"]) == (503, "7")
            await route.close()

    wait(run())
    assert len(peer.requests) == 1


def test_a_stream_cut_after_its_first_words_is_not_begun_again() -> None:
    peer = Peer(events(lines(REQUEST, "half", finish=None, usage=False), done=False))

    async def run() -> str:
        async with peer.running():
            route = router(config(peer), {"model_name": "o", "engine": "ours"}, fallbacks={"m": ["o"]}, num_retries=5)
            got, error = await until_error(route, REQUEST, context())
            await route.close()
            assert "cut the answer" in error.message
            return got

    assert wait(run()) == "half"
    assert len(peer.requests) == 1


@pytest.mark.parametrize("base", ["http://no-such-host.invalid/v1", "http://127.0.0.1:9/v1"])
def test_nobody_there(base: str) -> None:
    async def run() -> None:
        route = router({"model_name": "m", "api_base": base, "connect_timeout": 5.0})
        error = await error_of(route, REQUEST, context())
        assert error.status in (502, 504) and base not in error.message
        await route.close()

    wait(run())


def test_leaving_closes_the_connection() -> None:
    gone = asyncio.Event()

    async def handle(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
            + lines(REQUEST, "a", finish=None, usage=False)
        )
        try:
            while True:
                writer.write(lines(REQUEST, "b", finish=None, usage=False))
                await writer.drain()
                await asyncio.sleep(0.005)
        finally:
            gone.set()

    async def run() -> None:
        async with Peer(handle).running() as peer:
            route = router(config(peer))
            stream = route.stream(REQUEST, context())
            await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]
            await asyncio.wait_for(gone.wait(), 5)
            await route.close()

    wait(run())


def test_no_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert wait(through(Peer(events(GOOD)), REQUEST))["choices"][0]["message"]["content"] == "good"


def test_a_key_file_without_a_key(tmp_path: Path) -> None:
    for content in (b"", b"two\nlines", b"\xff\xfe"):
        (tmp_path / "key").write_bytes(content)
        with pytest.raises(ValueError, match="api_key_file"):
            router({"model_name": "m", "api_base": "http://127.0.0.1:9/v1", "api_key_file": tmp_path / "key"})
    with pytest.raises(ValueError, match="api_key_file"):
        router({"model_name": "m", "api_base": "http://127.0.0.1:9/v1", "api_key_file": tmp_path / "none"})
