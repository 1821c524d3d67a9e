"""Who gets in, by which way, and what a body may be. The CVE in a name is the hole of another server that the case repeats."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from starlette.routing import Route

from fastattn.serve.app import make_app
from fastattn.serve.auth import Keys
from fastattn.serve.config import ServeConfig
from fastattn.serve.state import ServerState
from tests.serve.harness import NO_TLS, Running, chat, flags, running

KEY = "sk-test-0123456789abcdef"
KEYS = {
    "alice": {"key": "alice-secret-key-1", "tenant": "a", "requests_per_minute": 5},
    "bob": {"key": "bob-secret-key-22", "tenant": "b", "tokens_per_minute": 200},
    "prometheus": {"key": "metrics-only-key", "scopes": ["metrics"]},
}

# Every route that there is. A new one must be thought about here: it needs a key like all the others.
ROUTES = {
    ("GET", "/"), ("GET", "/health"), ("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/ready"), ("GET", "/version"),
    ("POST", "/sleep"), ("POST", "/wake_up"), ("GET", "/is_sleeping"), ("GET", "/v1/models"), ("GET", "/v1/models/{model:path}"), ("POST", "/detokenize"), ("POST", "/tokenize"),
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/v1/embeddings"), ("POST", "/v1/responses"),
}  # fmt: skip


@pytest.fixture(scope="module")
def guarded(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with one key for everything, and a file of keys."""
    entries = [
        {"name": name, "sha256": hashlib.sha256(entry["key"].encode()).hexdigest(), **{k: v for k, v in entry.items() if k != "key"}}  # type: ignore[attr-defined]
        for name, entry in KEYS.items()
    ]  # fmt: skip
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    file.write_text(yaml.safe_dump({"keys": entries}))
    more = ("--api-keys-file", str(file), "--max-body-bytes", "200k", "--header-timeout", "2", "--body-timeout", "2")
    with running(tiny_folder, *flags(*more), key=KEY, FASTATTN_API_KEY=KEY) as server:
        yield server
    assert not any(str(entry["key"]) in line for entry in KEYS.values() for line in server.log)


def raw(server: Running, data: bytes, seconds: float = 10) -> bytes:
    """What comes back for these bytes, until the server closes or is silent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        connection.sendall(data)
        received = b""
        while True:
            try:
                part = connection.recv(65536)
            except (TimeoutError, ConnectionResetError):
                return received
            if not part:
                return received
            received += part


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/") else 0


def all_routes() -> set[tuple[str, str]]:
    app = make_app(ServerState(ServeConfig(model="m"), Keys([])))
    found = set()
    for route in app.routes:
        assert isinstance(route, Route) or hasattr(route, "methods"), route
        found |= {(method, route.path) for method in route.methods or () if method != "HEAD"}  # type: ignore[union-attr]
    return found


def test_the_routes_are_those_we_know() -> None:
    found = {(method, path) for method, path in all_routes() if not path.startswith("/static/")}
    assert found == ROUTES


@pytest.mark.parametrize("key", [None, "wrong", KEY[:-1], KEY + "x", KEY.upper()], ids=repr)
def test_every_route_needs_the_key(guarded: Running, key: str | None) -> None:
    """vLLM's --api-key left routes open."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=guarded.url, timeout=30) as client:
        for method, path in sorted(all_routes()):
            for verb in {method, "HEAD", "OPTIONS", "PUT"}:
                response = client.request(verb, path, headers=headers)
                if path == "/health" and verb in ("GET", "HEAD"):
                    assert response.status_code == 200
                    continue
                assert response.status_code == 401, (verb, path)
                assert verb == "HEAD" or response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "lines",
    [
        b"GET /v1/models HTTP/1.1\r\nHost: localhost/?x=/health",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost/health",
        b"GET //v1/models HTTP/1.1\r\nHost: localhost",
        b"GET /health/../v1/models HTTP/1.1\r\nHost: localhost",
        b"GET /health/%2e%2e/v1/models HTTP/1.1\r\nHost: localhost",
        b"GET /health%00/v1/models HTTP/1.1\r\nHost: localhost",
        b"GET /health;/v1/models HTTP/1.1\r\nHost: localhost",
        b"GET /HEALTH HTTP/1.1\r\nHost: localhost",
        b"GET /health/ HTTP/1.1\r\nHost: localhost",
        b"GET http://localhost/v1/models HTTP/1.1\r\nHost: localhost",
        b"GET /v1/models HTTP/1.0\r\nHost: localhost",
        b"HEAD /v1/models HTTP/1.1\r\nHost: localhost",
        b"POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Original-URL: /health",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: 127.0.0.1",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer\r\nAuthorization: Bearer x",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Basic !!!",
        b"GET /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13",
        b"GET /v1/models HTTP/1.1",
    ],
    ids=lambda lines: repr(lines)[2:80],
)
def test_no_way_around_the_key(guarded: Running, lines: bytes) -> None:
    """CVE-2026-48746: a crafted Host changed the path that the check of the key saw."""
    answer = raw(guarded, lines + b"\r\nConnection: close\r\n\r\n")
    assert status_of(answer) in (400, 401, 403), answer
    assert b'"data"' not in answer


def test_the_key_opens_every_route(guarded: Running) -> None:
    for path in ("/health", "/ready", "/version", "/metrics", "/v1/models", "/openapi.json", "/"):
        assert guarded.get(path).status_code == 200
    assert guarded.post("/v1/chat/completions", chat("hi", max_tokens=2)).status_code == 200


def test_a_browser_may_send_the_key_as_a_password(guarded: Running) -> None:
    response = httpx.get(guarded.url + "/", headers={"Accept": "text/html"}, verify=NO_TLS)
    assert response.status_code == 401 and response.headers["www-authenticate"].startswith("Basic ")
    for password, status in ((KEY, 200), ("wrong", 401)):
        login = base64.b64encode(f"me:{password}".encode()).decode()
        headers = {"Authorization": f"Basic {login}"}
        assert httpx.get(guarded.url + "/", headers=headers, verify=NO_TLS).status_code == status


def test_scopes(guarded: Running) -> None:
    def get(path: str, name: str) -> int:
        headers = {"Authorization": f"Bearer {KEYS[name]['key']}"}
        return httpx.get(guarded.url + path, headers=headers, verify=NO_TLS).status_code

    assert [get(path, "prometheus") for path in ("/metrics", "/ready", "/v1/models")] == [200, 200, 403]
    assert [get(path, "alice") for path in ("/metrics", "/ready", "/v1/models")] == [403, 200, 200]


def test_rate_limits(guarded: Running) -> None:
    def ask(name: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEYS[name]['key']}"}
        return guarded.post("/v1/chat/completions", chat("hi", **options), headers=headers)

    answers = [ask("alice", max_tokens=1) for _ in range(8)]
    assert [a.status_code for a in answers].count(200) in (5, 6)  # a minute may end meanwhile
    refused = next(a for a in answers if a.status_code == 429)
    assert refused.json()["error"]["type"] == "rate_limit_error" and 1 <= int(refused.headers["retry-after"]) <= 60
    assert answers[0].headers["x-ratelimit-limit-requests"] == "5"
    assert answers[0].headers["x-ratelimit-remaining-requests"] == "4"
    assert ask("bob", max_tokens=50).status_code == 200
    spent = ask("bob", max_tokens=180)
    assert spent.status_code == 429 and "tokens a minute" in spent.json()["error"]["message"]
    assert ask("bob", max_tokens=500).status_code == 429
    assert guarded.post("/v1/chat/completions", chat("hi", max_tokens=1)).status_code == 200  # others are not concerned


@pytest.mark.parametrize(("host", "status"), [("evil.example", 403), ("localhost.evil", 403), ("LOCALHOST", 200), ("[::1]", 200), ("127.0.0.1:99", 200), ("", 403)])  # fmt: skip
def test_host(guarded: Running, host: str, status: int) -> None:
    """DNS rebinding: a page's own name that points here (CVE-2023-48022 and its like)."""
    answer = raw(guarded, f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert status_of(answer) == status


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1", "http://127.0.0.1:1"])
def test_origin(guarded: Running, origin: str) -> None:
    body = chat("hi", max_tokens=1)
    response = guarded.post("/v1/chat/completions", body, headers={**guarded.headers, "Origin": origin})
    assert response.status_code == 403 and "access-control-allow-origin" not in response.headers
    own = guarded.post("/v1/chat/completions", body, headers={**guarded.headers, "Origin": guarded.url})
    assert own.status_code == 200
    tls = {"Origin": guarded.url.replace("http:", "https:")}  # a proxy in front ends TLS
    assert guarded.post("/v1/chat/completions", body, headers={**guarded.headers, **tls}).status_code == 200
    preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    assert httpx.options(guarded.url + "/v1/models", headers=preflight).status_code == 403


BAD_BODIES: list[tuple[bytes, int, str]] = [
    (b"", 400, "JSON"),
    (b"{", 400, "JSON"),
    (b"[]", 400, "not a JSON object"),
    (b'"x"', 400, "not a JSON object"),
    (b"null", 400, "not a JSON object"),
    (b'{"model": NaN}', 400, "NaN"),
    (b'{"temperature": Infinity}', 400, "Infinity"),
    (b'{"temperature": 1e999}', 400, "too large"),
    (b'{"seed": ' + b"9" * 5000 + b"}", 400, "JSON"),
    (b'{"model": "a", "model": "b"}', 400, "twice"),
    (b'{"messages": [{"role": "user", "role": "system"}]}', 400, "twice"),
    (b'{"model": "\xff"}', 400, "UTF-8"),
    (b"\xef\xbb\xbf{}", 400, "byte order mark"),
    (b'{"model": "\\ud800"}', 400, "surrogate"),
    (b'{"\\udfff": 1}', 400, "surrogate"),
    (b"[" * 100_000, 400, "deep"),
    (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, 413, "larger"),
    (b'{"messages": ' + b"[" * 150 + b"]" * 150 + b"}", 400, "deep"),
    (b'{"model": "x"}garbage', 400, "JSON"),
    (b"x" * 300_000, 413, "larger"),
    (json.dumps(chat("x", prompt_embeds="x")).encode(), 400, "not known"),
    (json.dumps(chat("x", chat_template="{{ 1 }}")).encode(), 400, "not known"),
    (json.dumps(chat("x", chat_template_kwargs={"a": 1})).encode(), 400, "is not allowed here"),
    (json.dumps(chat("x", bad_words=["a"], allowed_token_ids=[2**31])).encode(), 400, "not known"),
    (json.dumps(chat("x", n=10**9)).encode(), 400, "n: "),
    (json.dumps(chat("x", logprobs=True, top_logprobs=10**6)).encode(), 400, "top_logprobs: "),
    (json.dumps(chat("x", min_tokens=9, max_tokens=3)).encode(), 400, "min_tokens"),
    (json.dumps(chat("x", stop_token_ids=[-1])).encode(), 400, "stop_token_ids"),
    (json.dumps(chat("x", stop_token_ids=[10**6])).encode(), 400, "allowed are ids"),
    (json.dumps(chat("x", model="../../etc/passwd")).encode(), 404, "not served"),
    (json.dumps(chat("x", model="tiny\x00")).encode(), 404, "not served"),
]


@pytest.mark.parametrize(("body", "status", "message"), BAD_BODIES, ids=lambda value: repr(value)[:50])
def test_bad_bodies(guarded: Running, body: bytes, status: int, message: str) -> None:
    headers = {**guarded.headers, "Content-Type": "application/json"}
    response = httpx.post(
        guarded.url + "/v1/chat/completions", content=body, headers=headers, timeout=30, verify=NO_TLS
    )
    error = response.json()["error"]
    assert response.status_code == status and message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_numbers_at_every_edge(guarded: Running) -> None:
    """CVE-2026-34756 and others: a number without a bound that kills the engine."""
    from fastattn.serve.protocol import ChatCompletionRequest

    numeric = [
        "temperature", "top_p", "top_k", "min_p", "n", "seed", "presence_penalty", "frequency_penalty", "max_tokens",
        "repetition_penalty", "min_tokens", "top_logprobs", "priority", "max_completion_tokens",
    ]  # fmt: skip
    assert set(numeric) <= set(ChatCompletionRequest.model_fields)
    with httpx.Client(base_url=guarded.url, headers=guarded.headers, timeout=60) as client:
        for name in numeric:
            for value in (-1, 0, 2**31, 2**63, 2**64, -(2**63) - 1, 1e308, 1.5, "1", True, [], {}):
                body = chat("x", max_tokens=2) | {"logprobs": True, name: value}
                response = client.post("/v1/chat/completions", json=body)
                assert response.status_code in (200, 400), (name, value, response.text)
    assert guarded.post("/v1/chat/completions", chat("still there", max_tokens=2)).status_code == 200


def test_other_errors_have_the_same_shape(guarded: Running) -> None:
    for method, path, status in (("GET", "/nope", 404), ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405)):
        response = httpx.request(method, guarded.url + path, headers=guarded.headers, verify=NO_TLS)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_slow_and_large_headers(guarded: Running) -> None:
    start = time.monotonic()
    answer = raw(guarded, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ", seconds=15)
    assert status_of(answer) == 408 and 1.5 < time.monotonic() - start < 12
    answer = raw(guarded, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X-Large: " + b"a" * 300_000)
    assert status_of(answer) in (0, 431)  # or the connection is reset before it can be read
    assert status_of(raw(guarded, b"\x16\x03\x01\x02\x00\x01\x00")) == 400  # TLS


def test_slow_body(guarded: Running) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 100\r\n\r\n"
    answer = raw(guarded, head.encode() + b"{", seconds=15)
    assert status_of(answer) == 408 and b"body did not arrive" in answer


def test_too_large_a_body_is_refused_before_it_comes(guarded: Running) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 100000000\r\n\r\n"
    answer = raw(guarded, head.encode())
    assert status_of(answer) == 413
    chunked = head.replace("Content-Length: 100000000", "Transfer-Encoding: chunked").encode()
    assert status_of(raw(guarded, chunked + b"30000\r\n" + b" " * 0x30000 + b"\r\n30000\r\n" + b" " * 0x30000)) == 413


def test_one_listener(guarded: Running) -> None:
    """ShadowMQ (CVE-2025-32444 and others): internal sockets on the network."""
    processes = [psutil.Process(guarded.process.pid), *psutil.Process(guarded.process.pid).children(recursive=True)]
    listening = [c.laddr for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert {(address.ip, address.port) for address in listening} == {("127.0.0.1", guarded.port)}
