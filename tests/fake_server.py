"""A server that speaks OpenAI's protocol and does what a test tells it, well or badly. It is a real one, on a real socket."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route


@dataclass
class FakeServer:
    """pieces: the texts of each answer, `gap` seconds apart. headers: of each answer. api_key: what clients must show.
    status: an error instead of answers. cut_after: pieces after which the stream breaks off. metrics: the text of /metrics.
    gate: where there is one, the last piece waits for it.

    bodies, arrivals: what was asked so far, and when (monotonic seconds). num_left: streams that the client left early.
    """

    url: str = ""
    pieces: tuple[str, ...] = ("Hel", "lo", " world", ".")
    gap: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    api_key: str | None = None
    status: int = 200
    cut_after: int | None = None
    count_tokens: bool = True
    metrics: str = ""
    gate: threading.Event | None = None
    models: tuple[str, ...] = ("fake-small", "fake-large")
    bodies: list[dict[str, Any]] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    num_left: int = 0

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._answer, methods=["POST"]),
            Route("/v1/completions", self._answer, methods=["POST"]),
            Route("/metrics", self._metrics),
            Route("/health", lambda request: Response(status_code=200)),
            Route("/version", lambda request: JSONResponse({"version": "0.0.0"})),
        ]

    def _refusal(self, request: Request) -> Response | None:
        if self.api_key is not None and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return _error(401, "the API key is missing or wrong", "authentication_error")
        return None

    async def _models(self, request: Request) -> Response:
        data = [{"id": name, "object": "model"} for name in self.models]
        return self._refusal(request) or JSONResponse({"object": "list", "data": data})

    async def _metrics(self, request: Request) -> Response:
        return self._refusal(request) or PlainTextResponse(self.metrics)

    async def _answer(self, request: Request) -> Response:
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        body = json.loads(await request.body())
        self.bodies.append(body)
        self.arrivals.append(time.monotonic())
        if self.status != 200:
            return _error(self.status, "the model is away", "server_error")
        stream = self._stream(body, chat=request.url.path.endswith("chat/completions"))
        return StreamingResponse(stream, media_type="text/event-stream", headers=self.headers)

    async def _stream(self, body: dict[str, Any], chat: bool) -> AsyncIterator[str]:
        left = True
        try:
            for index, piece in enumerate(self.pieces):
                if index == self.cut_after:
                    left = False
                    return
                await asyncio.sleep(self.gap)
                while self.gate is not None and index == len(self.pieces) - 1 and not self.gate.is_set():
                    await asyncio.sleep(0.01)
                choice = {"delta": {"content": piece}} if chat else {"text": piece}
                yield _event({"model": body["model"], "choices": [{"index": 0, "finish_reason": None, **choice}]})
            end = {"delta": {}} if chat else {"text": ""}
            yield _event({"model": body["model"], "choices": [{"index": 0, "finish_reason": "stop", **end}]})
            if self.count_tokens and (body.get("stream_options") or {}).get("include_usage"):
                usage = {
                    "prompt_tokens": 7,
                    "completion_tokens": len(self.pieces),
                    "total_tokens": 7 + len(self.pieces),
                }
                yield _event({"model": body["model"], "choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
            left = False
        finally:
            self.num_left += left


def _event(chunk: dict[str, Any]) -> str:
    return f": a comment\ndata: {json.dumps(chunk)}\n\n"


def _error(status: int, message: str, kind: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


@contextmanager
def serve(app: Any) -> Iterator[str]:
    """Runs an ASGI app in a thread, and gives its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", lifespan="auto", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
    assert not thread.is_alive(), "the server did not end"


@contextmanager
def run_fake(extra: list[BaseRoute] | None = None) -> Iterator[FakeServer]:
    fake = FakeServer()
    with serve(Starlette(routes=[*fake.routes(), *(extra or [])])) as url:
        fake.url = url
        yield fake
