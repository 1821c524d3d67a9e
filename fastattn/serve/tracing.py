"""OpenTelemetry: a span for each answer, in the words of its GenAI conventions, sent in the background. No text is in it.

A Backend around all others, so that what the cache, the router and the guards said is known at its end. A collector that is
slow or gone costs spans and nothing else.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastattn import __version__
from fastattn.serve.contract import DELTA_TEXTS, APIError, Backend, Chunk, RequestContext
from fastattn.serve.protocol import ChatCompletionRequest, CompletionRequest

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    raise ImportError("otlp_traces_endpoint needs OpenTelemetry: pip install 'fastattn[otel]'") from None

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_CLOSE_SECONDS = 3.0  # for what has not been sent yet
_W3C = TraceContextTextMapPropagator()
_REQUEST = ("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "seed")
_HEADERS = {"x-fastattn-cache": "fastattn.cache", "x-fastattn-route": "fastattn.route"}


class Tracing:
    """endpoint: where spans go, OTLP over HTTP. OTEL_SERVICE_NAME and OTEL_EXPORTER_OTLP_HEADERS are heard."""

    def __init__(self, inner: Backend, endpoint: str, exporter: SpanExporter | None = None) -> None:
        name = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "fastattn"}
        self._provider = TracerProvider(
            resource=Resource.create({**name, "service.version": __version__}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint)))
        self._inner, self._tracer = inner, self._provider.get_tracer("fastattn.serve", __version__)

    async def stream(
        self, request: ChatCompletionRequest | CompletionRequest, context: RequestContext
    ) -> AsyncIterator[Chunk]:
        operation = "chat" if isinstance(request, ChatCompletionRequest) else "text_completion"
        span = self._tracer.start_span(
            f"{operation} {request.model}",
            _W3C.extract(context.trace),
            SpanKind.SERVER,
            _asked(request, context) | {"gen_ai.operation.name": operation},
        )
        context.trace = {}
        _W3C.inject(context.trace, set_span_in_context(span))
        answer = _Answer()
        try:
            async with aclosing(self._inner.stream(request, context)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    answer.add(chunk)
                    yield chunk
        except APIError as error:
            _failed(span, error.code or error.type, error.message if error.status >= 500 else None)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            _failed(span, "client_disconnect", None)
            raise
        except Exception as error:
            _failed(span, type(error).__name__, "internal error")
            raise
        finally:
            span.set_attributes(answer.attributes())
            span.set_attributes(
                {key: context.headers[name] for name, key in _HEADERS.items() if name in context.headers}
            )
            span.end()

    async def close(self) -> None:
        """Sends what there is, if that is quick."""
        thread = threading.Thread(target=self._provider.shutdown, name="fastattn-traces", daemon=True)
        thread.start()
        end = time.monotonic() + _CLOSE_SECONDS
        while thread.is_alive() and time.monotonic() < end:
            await asyncio.sleep(0.02)


def _asked(request: ChatCompletionRequest | CompletionRequest, context: RequestContext) -> dict[str, Any]:
    found: dict[str, Any] = {
        "gen_ai.provider.name": "fastattn",
        "gen_ai.request.model": request.model,
        "fastattn.request_id": context.request_id,
    }
    found |= {f"gen_ai.request.{name}": value for name in _REQUEST if (value := getattr(request, name)) is not None}
    if request.max_new_tokens is not None:
        found["gen_ai.request.max_tokens"] = request.max_new_tokens
    if (request.n or 1) > 1:
        found["gen_ai.request.choice.count"] = request.n
    return found | ({"fastattn.tenant": context.tenant} if context.tenant else {})


def _failed(span: Span, kind: str, fault: str | None) -> None:
    """fault: what went wrong here, if it was not the client."""
    span.set_attribute("error.type", kind)
    if fault is not None:
        span.set_status(StatusCode.ERROR, fault)


class _Answer:
    """What a span says of an answer."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._found: dict[str, Any] = {}
        self._ends: dict[int, str] = {}

    def add(self, chunk: Chunk) -> None:
        """Other servers' chunks may lack anything that is not looked at elsewhere."""
        for key, name in (("gen_ai.response.model", "model"), ("gen_ai.response.id", "id")):
            if key not in self._found and isinstance(value := chunk.get(name), str):
                self._found[key] = value
        for choice in chunk["choices"]:
            if "gen_ai.latency.time_to_first_token" not in self._found and _says_something(choice):
                self._found["gen_ai.latency.time_to_first_token"] = time.monotonic() - self._start
            if isinstance(end := choice.get("finish_reason"), str):
                self._ends[choice.get("index") or 0] = end
        usage = chunk.get("usage") or {}
        for key, name in (
            ("gen_ai.usage.input_tokens", "prompt_tokens"),
            ("gen_ai.usage.output_tokens", "completion_tokens"),
        ):
            if isinstance(count := usage.get(name), int):
                self._found[key] = count

    def attributes(self) -> dict[str, Any]:
        ends = {"gen_ai.response.finish_reasons": [self._ends[i] for i in sorted(self._ends)]} if self._ends else {}
        return {**self._found, **ends, "gen_ai.latency.e2e": time.monotonic() - self._start}


def _says_something(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or delta.get("tool_calls") or any(delta.get(name) for name in DELTA_TEXTS))
