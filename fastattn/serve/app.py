"""The routes. Each is a few lines: what a request is, what answers it, in which shape."""

from __future__ import annotations

import array
import asyncio
import base64
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar, cast, get_args

import msgspec
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fastattn import __version__
from fastattn.serve.auth import ApiKey
from fastattn.serve.contract import APIError, Chunk, RequestContext
from fastattn.serve.engine_sleep import SleepMode
from fastattn.serve.fold import fold_chunks
from fastattn.serve.json_body import parse_json
from fastattn.serve.openapi import describe
from fastattn.serve.page import page_routes
from fastattn.serve.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from fastattn.serve.rate_limits import Ticket
from fastattn.serve.response_events import last_response, named_event, response_events
from fastattn.serve.responses import ResponsesRequest
from fastattn.serve.sse import END, ClientGoneError, EventStream, event, unless_gone, up_to
from fastattn.serve.state import ServerState
from fastattn.serve.validation import validation_error

M = TypeVar("M", bound=BaseModel)
_TRACE_PARENT, _TRACE_STATE = (
    re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}"),
    re.compile(r"[ -~]{1,512}"),
)
_ON_THE_SPOT = 64 << 10  # bytes of a body that are read in the event loop: about a millisecond


def make_app(state: ServerState) -> FastAPI:
    app = FastAPI(
        title="fastattn",
        version=__version__,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        # All that anybody has to be told: the paths that come have lost the prefix, and the page's links are relative.
        servers=[{"url": state.config.root_path}] if state.config.root_path else None,
    )
    Handlers(state).register(app)
    app.router.routes.extend(page_routes())
    describe(app, state.names())

    @app.exception_handler(APIError)
    async def _api_error(request: Request, error: APIError) -> Response:
        return _json(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, error: HTTPException) -> Response:
        text = {404: "there is no such route, see /openapi.json", 405: "this route is not called by this method"}
        kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        api_error = APIError(error.status_code, text.get(error.status_code, str(error.detail)), kind)  # type: ignore[arg-type]
        return _json(api_error.body(), error.status_code, dict(error.headers or {}))

    @app.exception_handler(ClientDisconnect)  # before its body was here
    @app.exception_handler(ClientGoneError)
    async def _gone(request: Request, error: Exception) -> Response:
        state.metrics.disconnects.inc()
        return Response(status_code=499)  # for the log; nobody reads it

    @app.exception_handler(Exception)
    async def _our_fault(request: Request, error: Exception) -> Response:
        return _json(APIError(500, "internal error", "server_error").body(), 500)

    return app


@dataclass(frozen=True)
class _Form:
    """What clients get of an answer's chunks: one object, or a stream of events as they are on the wire, and its end."""

    fold: Callable[[AsyncIterator[Chunk]], Awaitable[dict[str, Any]]]
    stream: Callable[[AsyncIterator[Chunk]], AsyncIterator[Chunk]]
    encode: Callable[[Any], bytes] = event
    end: bytes = END
    on_begin: Callable[[], None] = lambda: None  # the headers of a stream are sent


class Handlers:
    def __init__(self, state: ServerState) -> None:
        self._state = state

    def register(self, app: FastAPI) -> None:
        for path, handler in (
            ("/v1/chat/completions", self.chat),
            ("/v1/completions", self.complete),
            ("/v1/responses", self.respond),
            ("/v1/embeddings", self.embed),
            ("/tokenize", self.tokenize),
            ("/detokenize", self.detokenize),
        ):
            app.post(path, response_class=Response)(handler)
        for path, getter in (
            ("/v1/models", self.models),
            ("/health", self.health),
            ("/ready", self.ready),
            ("/metrics", self.metrics),
            ("/version", self.version),
        ):
            app.get(path, response_class=Response)(getter)
        may_sleep = any(settings.enable_sleep_mode for settings in self._state.engine_settings().values())
        app.post("/sleep", include_in_schema=may_sleep, response_class=Response)(self.sleep)
        app.post("/wake_up", include_in_schema=may_sleep, response_class=Response)(self.wake_up)
        app.get("/is_sleeping", include_in_schema=may_sleep, response_class=Response)(self.is_sleeping)
        app.get("/v1/models/{model:path}", response_class=Response)(self.model)
        for path, getter in (("/health", self.health), ("/ready", self.ready)):  # as some load balancers ask
            app.head(path, include_in_schema=False, response_class=Response)(getter)

    # ---- answers ----

    async def chat(self, http: Request) -> Response:
        """An answer to a conversation."""
        return await self._answer(http, ChatCompletionRequest)

    async def complete(self, http: Request) -> Response:
        """A text that goes on."""
        return await self._answer(http, CompletionRequest)

    async def respond(self, http: Request) -> Response:
        """An answer to a conversation, in items; none is kept."""
        ticket = self._state.limits.admit(http.state.key)
        asked, num_bytes = await _read(http, ResponsesRequest)
        request = asked.as_chat() if num_bytes <= _ON_THE_SPOT else await asyncio.to_thread(asked.as_chat)
        context = self._context(http, asked.priority)
        begun = asyncio.Event()
        form = _Form(
            lambda chunks: last_response(response_events(asked, chunks, context.request_id)),
            lambda chunks: response_events(asked, chunks, context.request_id, begun.is_set),
            named_event,
            b"",
            begun.set,
        )
        return await self._run(http, ticket, request, num_bytes, context, form)

    async def _answer(self, http: Request, kind: type[ChatCompletionRequest] | type[CompletionRequest]) -> Response:
        ticket = self._state.limits.admit(http.state.key)
        request, num_bytes = await _read(http, kind)
        form = _Form(fold_chunks, lambda chunks: _for_client(chunks, request.wants_usage))
        return await self._run(http, ticket, request, num_bytes, self._context(http, request.priority), form)

    async def _run(
        self,
        http: Request,
        ticket: Ticket,
        request: ChatCompletionRequest | CompletionRequest,
        num_bytes: int,
        context: RequestContext,
        form: _Form,
    ) -> Response:
        if isinstance(request, ChatCompletionRequest):
            self._check_template_kwargs(request.chat_template_kwargs)
        backend = self._state.backend()
        num_prompts = len(request.prompts) if isinstance(request, CompletionRequest) else 1
        ticket.reserve(num_bytes // 4 + (request.max_new_tokens or 16) * (request.n or 1) * num_prompts)
        try:
            chunks = _metered(backend.stream(request, context), ticket)
            if not request.stream:
                answer = await unless_gone(http.receive, form.fold(chunks))
                ticket.forfeit()  # where nobody said what it took: a guard ended it, an upstream does not count
                return _json(answer, 200, {**ticket.headers, **context.headers})
            events = form.stream(chunks)
            first = asyncio.ensure_future(anext(events, None))
            # With its first chunk come the headers and the chance of a status; later, and the client hears a comment.
            await unless_gone(http.receive, up_to(self._state.config.stream_keep_alive, first))
        except (ClientGoneError, asyncio.CancelledError):
            ticket.forfeit()
            raise
        except BaseException:
            ticket.settle(0)
            raise
        form.on_begin()
        headers = {**ticket.headers, **context.headers}

        def on_end(complete: bool) -> None:
            first.cancel()
            ticket.forfeit()
            if not complete:
                self._state.metrics.disconnects.inc()

        config = self._state.config
        stream = _with_first(first, events)
        return EventStream(
            stream, headers, config.write_timeout, config.stream_keep_alive, on_end, form.encode, form.end
        )

    async def embed(self, http: Request) -> Response:
        """A vector for each text."""
        ticket = self._state.limits.admit(http.state.key)
        request, num_bytes = await _read(http, EmbeddingRequest)
        engine = self._state.engine(request.model)
        ticket.reserve(num_bytes // 4)
        try:
            work = engine.embed(request, self._context(http, None))
            vectors, num_tokens = await unless_gone(http.receive, work)
        except (ClientGoneError, asyncio.CancelledError):
            ticket.forfeit()
            raise
        except BaseException:
            ticket.settle(0)
            raise
        ticket.settle(num_tokens)
        wants_base64 = request.encoding_format == "base64"
        data = [
            {"object": "embedding", "index": i, "embedding": _base64(vector) if wants_base64 else vector}
            for i, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        answer = {"object": "list", "data": data, "model": request.model, "usage": usage}
        return _json(answer, 200, ticket.headers)

    async def tokenize(self, http: Request) -> Response:
        """The token ids of a text, or of a conversation as the model reads it."""
        ticket = self._state.limits.admit(http.state.key)
        request, _ = await _read(http, TokenizeRequest)
        engine = self._state.engine(request.model)
        render = engine.renderer
        if request.messages is not None:
            self._check_template_kwargs(request.chat_template_kwargs)
            more = request.chat_template_kwargs
            work = render.chat(request.messages, request.tools, request.add_generation_prompt, more)
            ids = await unless_gone(http.receive, work)
        else:
            texts = [request.prompt or ""]
            ids = (await unless_gone(http.receive, render.encode(texts, request.add_special_tokens)))[0]
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": engine.info.max_model_len, "tokens": ids}
        if request.return_token_strs:
            answer["token_strs"] = await unless_gone(http.receive, render.pieces(ids))
        return _json(answer, 200, ticket.headers)

    async def detokenize(self, http: Request) -> Response:
        """The text of token ids."""
        ticket = self._state.limits.admit(http.state.key)
        request, _ = await _read(http, DetokenizeRequest)
        engine = self._state.engine(request.model)
        if any(token >= engine.info.vocab_size for token in request.tokens):
            text = f"tokens has {max(request.tokens)}, allowed are ids from 0 to {engine.info.vocab_size - 1}"
            raise APIError(400, text, param="tokens")
        text = await unless_gone(http.receive, engine.renderer.decode(request.tokens))
        return _json({"prompt": text}, 200, ticket.headers)

    # ---- sleep ----

    async def sleep(self, http: Request) -> Response:
        """Has the engines, or that of the query's `model`, give their memory back: `level` 1 (weights to host memory) or 2 (weights
        given up), `mode` abort, wait or keep: what becomes of running requests."""
        asked = _query(http, "level", "mode", "model")
        level, mode = asked.get("level", "1"), asked.get("mode", "abort")
        if level not in ("1", "2"):
            raise APIError(400, f"level is {level[:100]!r}, allowed is 1 or 2", param="level")
        if mode not in get_args(SleepMode):
            raise APIError(400, f"mode is {mode[:100]!r}, allowed are {', '.join(get_args(SleepMode))}", param="mode")
        for client in self._state.sleepers(asked.get("model")):
            await unless_gone(http.receive, client.sleep(int(level), cast(SleepMode, mode)))
        return _json({"is_sleeping": True})

    async def wake_up(self, http: Request) -> Response:
        """Has them take it again; `tags`, weights or kv_cache and any number of times, only that."""
        asked, tags = _query(http, "tags", "model"), http.query_params.getlist("tags")
        if wrong := next((tag for tag in tags if tag not in ("weights", "kv_cache")), None):
            raise APIError(400, f"tags has {wrong[:100]!r}, allowed are weights and kv_cache", param="tags")
        clients = self._state.sleepers(asked.get("model"))
        for client in clients:
            await unless_gone(http.receive, client.wake_up(tags))
        return _json({"is_sleeping": any(client.rest.phase != "awake" for client in clients)})

    async def is_sleeping(self, http: Request) -> Response:
        """Whether one of them sleeps, is going to, or is not awake yet."""
        clients = self._state.sleepers(_query(http, "model").get("model"))
        return _json({"is_sleeping": any(client.rest.phase != "awake" for client in clients)})

    # ---- state ----

    async def models(self) -> Response:
        """The names that requests may give."""
        return _json({"object": "list", "data": [self._model(name) for name in self._state.names()]})

    async def model(self, model: str) -> Response:
        if model not in self._state.names():
            raise APIError(404, "no model of this name is served", "not_found_error", code="model_not_found")
        return _json(self._model(model))

    def _model(self, name: str) -> dict[str, Any]:
        found = {"id": name, "object": "model", "created": self._state.started, "owned_by": "fastattn"}
        engine = self._state.find_engine(name)
        return found if engine is None else {**found, "max_model_len": engine.info.max_model_len}

    async def health(self) -> Response:
        """200 if every engine made a step, or answered in idleness, a moment ago."""
        if sick := self._state.sick():
            raise APIError(503, sick, "server_error")
        return _json({"status": "ok"})

    async def ready(self) -> Response:
        """200 if requests are taken and can be worked on now."""
        if self._state.draining:
            raise APIError(503, "the server is shutting down", "overloaded_error")
        if waiting := self._state.not_ready():
            raise APIError(503, waiting, "overloaded_error", headers={"Retry-After": "2"})
        return _json({"status": "ready"})

    async def metrics(self) -> Response:
        """Prometheus metrics."""
        return Response(self._state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(self) -> Response:
        return _json({"version": __version__})

    # ---- requests ----

    def _check_template_kwargs(self, given: dict[str, Any] | None) -> None:
        allowed = self._state.config.template_kwargs
        if other := next((name for name in given or () if name not in allowed), None):
            text = f"{other!r} is not allowed here, allowed are: {', '.join(allowed) or 'none'}"
            raise APIError(400, f"chat_template_kwargs: {text}", param="chat_template_kwargs")

    def _context(self, http: Request, priority: int | None) -> RequestContext:
        key: ApiKey = http.state.key
        # Who has a key can be more patient than it says, not less.
        own = priority or 0 if not self._state.keys else max(0, priority or 0)
        directives = http.headers.get("cache-control", "").lower().split(",")
        return RequestContext(
            request_id=http.state.request_id,
            tenant=key.tenant,
            priority=key.priority + own,
            cache_control=frozenset(part.strip() for part in directives if part.strip()),
            request_headers={n: http.headers[n] for n in self._state.rule_headers if n in http.headers},
            trace=_trace(http),
        )


def _trace(http: Request) -> dict[str, str]:
    """W3C's trace headers, if they are what they should be: others go into the headers of another server's requests too."""
    parent, state = http.headers.get("traceparent", ""), http.headers.get("tracestate", "")
    if not _TRACE_PARENT.fullmatch(parent):
        return {}
    return {"traceparent": parent} | ({"tracestate": state} if _TRACE_STATE.fullmatch(state) else {})


def _query(http: Request, *names: str) -> dict[str, str]:
    """The query's parameters. Raises APIError for one that is not of these."""
    if wrong := next((name for name in http.query_params if name not in names), None):
        raise APIError(400, f"{wrong[:100]!r} is not a parameter, allowed are {', '.join(names)}", param=wrong[:100])
    return dict(http.query_params)


async def _read(http: Request, kind: type[M]) -> tuple[M, int]:
    """The request in the body, and the body's size."""
    body = await http.body()
    # A large one takes longer than others can wait.
    request = _parse(body, kind) if len(body) <= _ON_THE_SPOT else await asyncio.to_thread(_parse, body, kind)
    return request, len(body)


def _parse(body: bytes, kind: type[M]) -> M:
    value = parse_json(body)
    if not isinstance(value, dict):
        raise APIError(400, "the body is not a JSON object", code="invalid_json")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise validation_error(error) from None


async def _metered(chunks: AsyncIterator[Chunk], ticket: Ticket) -> AsyncIterator[Chunk]:
    """Counts the tokens of an answer against its limits."""
    async with aclosing(chunks) as stream:  # type: ignore[type-var]
        async for chunk in stream:
            if usage := chunk.get("usage"):
                ticket.settle(usage.get("total_tokens", 0))
            yield chunk


async def _for_client(chunks: AsyncIterator[Chunk], wants_usage: bool) -> AsyncIterator[Chunk]:
    """Without the usage that was not asked for; with `usage: null` before it where it was."""
    async with aclosing(chunks) as stream:  # type: ignore[type-var]
        async for chunk in stream:
            if wants_usage:
                yield {**chunk, "usage": chunk.get("usage")}
            elif chunk["choices"]:
                yield {key: value for key, value in chunk.items() if key != "usage"}


async def _with_first(first: Awaitable[Chunk | None], rest: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    """first: asked of the rest before."""
    async with aclosing(rest) as stream:  # type: ignore[type-var]
        chunk = await first
        while chunk is not None:
            yield chunk
            chunk = await anext(stream, None)


def _base64(vector: list[float]) -> str:
    numbers = array.array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")
