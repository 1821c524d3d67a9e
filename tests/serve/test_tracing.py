"""Traces: what a span says of an answer, whose child it is, and that a collector that is not there harms nobody."""

from __future__ import annotations

import builtins
import importlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="opentelemetry comes with fastattn[otel]")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from fastattn.serve.contract import APIError, RequestContext
from fastattn.serve.tracing import Tracing
from tests.serve.fakes import Scripted, chat, chunks, completion, context, error_of, saying, text, wait
from tests.serve.harness import chat as body
from tests.serve.harness import running
from tests.serve.router.test_upstream import Peer, config, events, lines, router

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collected:
    def __init__(self, inner: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracing = Tracing(inner, "http://127.0.0.1:1/v1/traces", self.exporter)

    def spans(self) -> list[ReadableSpan]:
        wait(self.tracing.close())
        return list(self.exporter.get_finished_spans())

    def span(self) -> ReadableSpan:
        (span,) = self.spans()
        return span


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_a_span_says_what_was_asked_and_answered_and_no_word_of_it() -> None:
    collected = Collected(saying("se", "cret"))
    asked = chat("a secret", max_tokens=7, top_p=0.5, seed=3, stop=["secret"])
    about = context("alice", request_id="r1")
    about.headers["x-fastattn-cache"] = "miss"
    assert wait(text(collected.tracing, asked, about)) == "secret"
    span = collected.span()
    found = attributes(span)
    assert span.name == "chat m" and span.parent is None and span.status.status_code is StatusCode.UNSET
    assert 0 < found.pop("gen_ai.latency.time_to_first_token") <= found.pop("gen_ai.latency.e2e") < 60
    assert found == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "fastattn",
        "gen_ai.request.model": "m",
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.top_p": 0.5,
        "gen_ai.request.seed": 3,
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.model": "m",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 2,
        "fastattn.cache": "miss",
        "fastattn.request_id": "r1",
        "fastattn.tenant": "alice",
    }
    assert span.resource.attributes["service.name"] == "fastattn"


def test_what_another_server_leaves_out_is_left_out() -> None:
    """A span never ends an answer."""

    def bare(request: Any, _: Any) -> list[Any]:
        found = chunks(request, ["hi"])
        for chunk in found:
            del chunk["id"], chunk["model"]
        found[-1]["usage"] = {"total_tokens": 5}
        found[0]["id"] = found[0]["model"] = None
        return found

    collected = Collected(Scripted(bare))

    async def all_of() -> int:
        return len([chunk async for chunk in collected.tracing.stream(chat(), context())])

    assert wait(all_of()) == 4
    found = attributes(collected.span())
    assert found["gen_ai.response.finish_reasons"] == ("stop",) and "gen_ai.usage.input_tokens" not in found


def test_a_text_of_several_completions() -> None:
    asked = completion("hi", n=2)
    collected = Collected(Scripted(lambda request, _: [*chunks(request, "a", usage=False), *chunks(request, "b", index=1, finish="length")]))  # fmt: skip
    wait(text(collected.tracing, asked, context()))
    found = attributes(collected.span())
    assert found["gen_ai.operation.name"] == "text_completion" and found["gen_ai.request.choice.count"] == 2
    assert found["gen_ai.response.finish_reasons"] == ("stop", "length")


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (APIError(400, "it is too long", code="context_length_exceeded"), "context_length_exceeded", StatusCode.UNSET),
        (APIError(503, "the engine died", "server_error"), "server_error", StatusCode.ERROR),
        (RuntimeError("a secret"), "RuntimeError", StatusCode.ERROR),
    ],
)
@pytest.mark.parametrize("num_chunks", [0, 2])
def test_an_error_is_in_its_span(error: Exception, kind: str, status: StatusCode, num_chunks: int) -> None:
    collected = Collected(Scripted(lambda request, _: [*chunks(request, "ab")[:num_chunks], error]))
    with pytest.raises(type(error)):
        wait(text(collected.tracing, chat(), context()))
    span = collected.span()
    assert attributes(span)["error.type"] == kind and span.status.status_code is status
    assert "secret" not in str(span.status.description)


def test_a_client_that_leaves() -> None:
    scripted = saying("a", "b", "c")
    collected = Collected(scripted)

    async def leave() -> None:
        stream = collected.tracing.stream(chat(), context())
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]

    wait(leave())
    assert attributes(collected.span())["error.type"] == "client_disconnect" and scripted.num_left == 1


@pytest.mark.parametrize("given", [PARENT, "00-nonsense", "x" * 10_000])
def test_a_trace_goes_on(given: str) -> None:
    """The span is the caller's child, and another server's is its own."""
    peer = Peer(events(lines(chat(), "hi")))
    about = context()
    about.trace = {"traceparent": given}

    async def through() -> Collected:
        async with peer.running():
            route = router(config(peer))
            collected = Collected(route)
            assert await text(collected.tracing, chat(), about) == "hi"
            await route.close()
            return collected

    span = wait(through()).span()
    assert span.context is not None
    passed = peer.requests[0][1]["traceparent"].split("-")
    assert (int(passed[1], 16), int(passed[2], 16)) == (span.context.trace_id, span.context.span_id)
    if given is PARENT:
        assert span.parent is not None and f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
        assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    else:
        assert span.parent is None


def test_what_is_not_configured_passes_a_trace_on() -> None:
    peer = Peer(events(lines(chat(), "hi")))

    async def through() -> None:
        async with peer.running():
            route = router(config(peer))
            about = RequestContext("r", trace={"traceparent": PARENT, "tracestate": "a=b"})
            await text(route, chat(), about)
            await route.close()

    wait(through())
    assert peer.requests[0][1]["traceparent"] == PARENT and peer.requests[0][1]["tracestate"] == "a=b"


def test_a_collector_that_never_answers_delays_nobody() -> None:
    class Stuck(InMemorySpanExporter):
        def export(self, spans: Any) -> Any:
            time.sleep(60)

    tracing = Tracing(saying("a"), "http://127.0.0.1:1/v1/traces", Stuck())
    for _ in range(20):
        assert wait(text(tracing, chat(), context())) == "a"
    before = time.monotonic()
    wait(tracing.close())
    assert time.monotonic() - before < 30
    assert "fault" in str(wait(error_of(Tracing(Scripted(lambda *_: [APIError(500, "fault", "server_error")]), "http://127.0.0.1:1"), chat(), context())).message)  # fmt: skip


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *more: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"otlp_traces_endpoint needs OpenTelemetry: pip install 'fastattn\[otel\]'"):
        importlib.reload(importlib.import_module("fastattn.serve.tracing"))


@contextmanager
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    received: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["content-length"]))
            received.append(ExportTraceServiceRequest.FromString(data))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_sends_its_spans(tiny_folder: Path) -> None:
    with collector() as (url, received):
        options = ("--served-model-name", "tiny", "--otlp-traces-endpoint", url, "--num-kv-blocks", "64")
        with running(tiny_folder, *options, OTEL_BSP_SCHEDULE_DELAY="60000", OTEL_SERVICE_NAME="mine") as server:
            answer = server.post("/v1/chat/completions", body("hi", max_tokens=3), headers={"traceparent": PARENT})
            server.post("/v1/responses", {"model": "tiny", "input": "hi", "max_output_tokens": 2, "stream": True})
            assert server.post("/v1/completions", {"model": "other", "prompt": "hi"}).status_code == 404
            assert answer.status_code == 200 and not received
        (request,) = received  # at its end it sends what it has
    (resource,) = request.resource_spans
    assert ("service.name", "mine") in [(a.key, a.value.string_value) for a in resource.resource.attributes]
    spans = [span for scope in resource.scope_spans for span in scope.spans]
    assert [span.name for span in spans] == ["chat tiny", "chat tiny", "text_completion other"]
    assert spans[0].trace_id.hex() == "0af7651916cd43dd8448eb211c80319c" != spans[1].trace_id.hex()
    found = {a.key: a.value for a in spans[0].attributes}
    assert found["gen_ai.usage.output_tokens"].int_value == 3 and "hi" not in str(found)
