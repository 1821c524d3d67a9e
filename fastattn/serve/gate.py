"""What every connection passes before a route sees it: Host, Origin, key, drain, size and time of the body. Nothing gets
by that this does not know: a route that is added later needs a key too."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from fastattn.serve.auth import NOBODY, ApiKey, Keys, token_of
from fastattn.serve.config import ServeConfig
from fastattn.serve.contract import APIError
from fastattn.serve.metrics import Metrics

logger = logging.getLogger("fastattn.serve")

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

# Labels of the metric of answers; all other paths are "other".
ROUTES = (
    "/", "/health", "/metrics", "/openapi.json", "/ready", "/version", "/tokenize", "/detokenize",
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/models", "/sleep", "/wake_up",
    "/is_sleeping",
)  # fmt: skip
_SCOPES = {"/metrics": "metrics", "/sleep": "admin", "/wake_up": "admin"}
_FOR_ALL = ("/ready", "/version", "/is_sleeping")  # who has a key, whatever its scopes
WORK = ("/tokenize", "/detokenize", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
_CLIENT_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")  # what a proxy or a client may call a request
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")


class Gate:
    """num_working: requests that a shutdown waits for. draining: no more are taken."""

    def __init__(self, app: ASGIApp, config: ServeConfig, keys: Keys, metrics: Metrics) -> None:
        self._app, self._config, self._keys, self._metrics = app, config, keys, metrics
        self._hosts = _allowed_hosts(config)
        self.draining = False
        self.num_working = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self.num_connections: Callable[[], int] = lambda: 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await receive()
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.monotonic()
        path = scope["path"]
        request_id = uuid.uuid4().hex
        # A proxy's own id goes back to it and into the log; nothing else is looked up by it.
        label = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
        label = label if _CLIENT_ID.fullmatch(label) else request_id
        status = 0

        body = _Body(scope, receive, self._config.max_body_bytes, self._config.body_timeout)

        async def count(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_own_headers(label)]
                if self.draining or not body.complete:  # what the client may still send is not waited for
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        works = path in WORK
        self.num_working += works
        self.idle.clear() if self.num_working else None
        key = NOBODY
        try:
            key = self._let_in(scope)
            scope.setdefault("state", {}).update(key=key, request_id=request_id)
            await self._app(scope, body.receive, count)
        except APIError as error:
            if status:
                raise
            await _send_error(count, error)
        finally:
            self.num_working -= works
            if not self.num_working:
                self.idle.set()
            route = path if path in ROUTES else "other"
            self._metrics.http.labels(route, f"{status // 100}xx").inc()
            logger.info(
                "%s %s %d in %.3f s, key %r, tenant %r, request %s%s",
                scope["method"] if scope["method"].isalpha() else "?",
                route,
                status,
                time.monotonic() - start,
                key.name,
                key.tenant,
                request_id,
                "" if label == request_id else f", called {label}",
            )

    def _let_in(self, scope: Scope) -> ApiKey:
        """Whose request it is. Raises APIError for what goes no further."""
        headers = _headers(scope)
        path, method = scope["path"], scope["method"]
        self._check_host(headers.get("host"))
        self._check_origin(headers)
        if path == "/health" and method in ("GET", "HEAD"):
            return NOBODY
        try:
            key = self._keys.find(token_of(headers.get("authorization")))
        except APIError as error:
            if "text/html" in headers.get("accept", ""):  # a person in a browser: let it ask for the key
                error.headers["WWW-Authenticate"] = 'Basic realm="fastattn: the key is the password"'
            raise
        needed = _SCOPES.get(path, "inference")
        if key is not NOBODY and needed not in key.scopes and path not in _FOR_ALL:
            raise APIError(403, f"this API key has no scope {needed!r}", "permission_error")
        if path in WORK:
            self._check_load()
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._config.max_body_bytes:
            raise _too_large(self._config.max_body_bytes)
        return key

    def _check_host(self, host: str | None) -> None:
        """A page that has its own name point here (DNS rebinding) still sends that name."""
        name = (host or "").rpartition(":")[0] if (host or "").rpartition(":")[2].isdigit() else host or ""
        if self._hosts is not None and name.lower() not in self._hosts:
            raise APIError(403, "this server is not called by this Host; see --allowed-hosts", "permission_error")

    def _check_origin(self, headers: dict[str, str]) -> None:
        origin = headers.get("origin")
        if origin is None or origin in self._config.cors_origins or "*" in self._config.cors_origins:
            return
        # The scheme may differ: behind a proxy that ends TLS the page is https, and this server's requests are not.
        if origin not in (f"http://{headers.get('host')}", f"https://{headers.get('host')}"):
            raise APIError(
                403, "pages of other origins may not call this server; see --cors-origins", "permission_error"
            )

    def _check_load(self) -> None:
        if self.draining:
            self._metrics.rejections.labels("draining").inc()
            raise APIError(503, "the server is shutting down", "overloaded_error", headers={"Retry-After": "5"})
        if self.num_connections() > self._config.limit_concurrency:
            self._metrics.rejections.labels("concurrency").inc()
            text = f"more than {self._config.limit_concurrency} connections are open"
            raise APIError(503, text, "overloaded_error", headers={"Retry-After": "1"})


class _Body:
    """receive() that gives up on a body that is too large, or that takes too long."""

    def __init__(self, scope: Scope, receive: Receive, max_bytes: int, seconds: float) -> None:
        self._receive, self._max_bytes = receive, max_bytes
        self._seconds, self._deadline = seconds, time.monotonic() + seconds
        self._num_bytes = 0
        # Without one of these a request has no body (RFC 9112, 6.3).
        self.complete = not any(
            name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
            for name, value in scope["headers"]
        )

    async def receive(self) -> Message:
        if self.complete:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._deadline - time.monotonic()))
        except asyncio.TimeoutError:
            raise APIError(408, f"the body did not arrive within {self._seconds:g} s") from None
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._max_bytes:
            raise _too_large(self._max_bytes)
        self.complete = not message.get("more_body", False)
        return message


def _own_headers(request_id: str) -> list[tuple[bytes, bytes]]:
    return [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]


def _too_large(limit: int) -> APIError:
    return APIError(413, f"the body is larger than {limit} bytes", code="request_too_large")


async def _send_error(send: Send, error: APIError) -> None:
    body = msgspec.json.encode(error.body())
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _headers(scope: Scope) -> dict[str, str]:
    """By name; of a header that is there twice, all, which then match nothing that is expected once."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        text = value.decode("latin-1")
        found[key] = f"{found[key]}, {text}" if key in found else text
    return found


def _allowed_hosts(config: ServeConfig) -> frozenset[str] | None:
    """None: any."""
    if "*" in config.allowed_hosts:
        return None
    if config.allowed_hosts:
        return frozenset(host.lower() for host in (*config.allowed_hosts, config.host))
    if config.uds is None and config.host not in _LOOPBACK and not config.host.startswith("127."):
        return None
    return frozenset((*_LOOPBACK, config.host.lower())) if config.uds is None else None
