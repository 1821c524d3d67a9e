"""A server's life: socket, engines, ready, signals, drain, end."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import uvicorn
from starlette.middleware.cors import CORSMiddleware

from fastattn.serve.app import make_app
from fastattn.serve.auth import load_keys
from fastattn.serve.chain import Chain, build_chain
from fastattn.serve.config import ServeConfig
from fastattn.serve.engine_client import EngineClient, cancel
from fastattn.serve.gate import ASGIApp, Gate
from fastattn.serve.renderer import Renderer
from fastattn.serve.state import LocalEngine, ServerState
from fastattn.serve.uvicorn_protocol import protocol_class

logger = logging.getLogger("fastattn.serve")

_LAG_SECONDS = 0.5


def serve(config: ServeConfig) -> int:
    """Serves until a signal ends it or no engine can be kept running; the exit code. Raises ValueError or OSError."""
    state = ServerState(config, load_keys(config.api_key, config.api_keys_file))
    _raise_file_limit()
    listener = _listen(config)
    try:
        import uvloop

        uvloop.install()
        return asyncio.run(Server(state, listener).run())
    finally:
        listener.close()
        if config.uds is not None:
            config.uds.unlink(missing_ok=True)


def _raise_file_limit() -> None:
    """A shell's 1024 files are fewer than the connections that are allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _listen(config: ServeConfig) -> socket.socket:
    """The socket, before anything is loaded: an address in use is said at once."""
    if config.uds is not None:
        listener = socket.socket(socket.AF_UNIX)
        try:
            _remove_stale(config.uds)
            old = os.umask(0o177)  # a socket for its owner
            try:
                listener.bind(str(config.uds))
            finally:
                os.umask(old)
        except OSError as error:
            raise OSError(f"uds: {config.uds}: {error.strerror}") from None
        listener.listen(2048)
        return listener
    try:
        family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ValueError(f"host: {config.host}: {error.strerror}") from None
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"port: {config.host}:{config.port}: {error.strerror}") from None
    listener.listen(2048)
    return listener


def _remove_stale(path: Path) -> None:
    """A socket that nobody listens on any more: a server that was killed leaves it behind."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)


class _Uvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals are the Server's


class Server:
    def __init__(self, state: ServerState, listener: socket.socket) -> None:
        self._state, self._listener = state, listener
        self._started = time.monotonic()
        self._stop, self._now = asyncio.Event(), asyncio.Event()
        config = state.config
        self._gate = Gate(make_app(state), config, state.keys, state.metrics)
        app: ASGIApp = self._gate
        if config.cors_origins:
            seen = ["x-request-id", "retry-after", "x-fastattn-model", "x-fastattn-route", "x-fastattn-cache"]
            seen += [
                f"x-ratelimit-{n}-{kind}" for n in ("limit", "remaining", "reset") for kind in ("requests", "tokens")
            ]
            app = CORSMiddleware(
                app, config.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"], expose_headers=seen
            )
        self._http = _Uvicorn(
            uvicorn.Config(
                app,
                http=protocol_class(config.header_timeout),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=config.keep_alive_timeout,
                timeout_graceful_shutdown=5,
                ssl_certfile=config.ssl_certfile,
                ssl_keyfile=config.ssl_keyfile,
            )
        )
        self._gate.num_connections = lambda: len(self._http.server_state.connections)
        self._renderers: list[Renderer] = []
        self._chain: Chain | None = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        engines = [asyncio.create_task(client.run()) for client in self._state.clients.values()]
        background = [asyncio.create_task(self._make_ready()), asyncio.create_task(self._watch_lag())]
        http = asyncio.create_task(self._http.serve([self._listener]))
        stop = asyncio.create_task(self._stop.wait())
        try:
            done, _ = await asyncio.wait({stop, http, background[0], *engines}, return_when=asyncio.FIRST_COMPLETED)
            if background[0] in done and not background[0].exception():  # it is ready, and that goes on
                done, _ = await asyncio.wait({stop, http, *engines}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            code = self._failure()
            if code is None:
                await self._drain()
                code = 0
        finally:
            for task in [stop, *background, *engines]:
                await cancel(task)
            with suppress(asyncio.TimeoutError):  # answers that were cut off get their error event out
                await asyncio.wait_for(self._gate.idle.wait(), 2)
            self._http.should_exit = True
            await http
            if self._chain is not None:
                await self._chain.close()
            for renderer in self._renderers:
                await renderer.close()
        return code

    def _on_signal(self) -> None:
        (self._now if self._stop.is_set() else self._stop).set()

    def _failure(self) -> int | None:
        for client in self._state.clients.values():
            if client.failure is not None:
                text, code = client.failure
                print(f"fastattn: {text}", file=sys.stderr)
                return code
        return None

    async def _drain(self) -> None:
        """No new work; what runs may finish, in time and unless a second signal comes."""
        self._state.draining = self._gate.draining = True
        seconds = self._state.config.shutdown_timeout
        count = self._gate.num_working
        print(f"fastattn: shutting down, {count} requests have {seconds:g} s to finish", file=sys.stderr)
        waits = {asyncio.ensure_future(self._gate.idle.wait()), asyncio.ensure_future(self._now.wait())}
        _, pending = await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()

    async def _make_ready(self) -> None:
        """Waits for every engine, and opens the doors. Returns early if one cannot start, which others report."""
        config = self._state.config
        for name, client in self._state.clients.items():
            if not await _first_ready(client):
                return
            info = client.info
            assert info is not None
            settings = self._state.engine_settings()[name]
            if settings.chat_template is not None:
                template = settings.chat_template.read_text(encoding="utf-8")
                # Another template is another model to the response cache.
                digest = hashlib.sha256(f"{info.digest}\0{template}".encode()).hexdigest()
                parts = msgspec.structs.replace(info.tokenizer, chat_template=template)
                info = msgspec.structs.replace(info, tokenizer=parts, digest=digest)
            renderer = Renderer(info.tokenizer, info.max_model_len, config.render_workers)
            self._renderers.append(renderer)
            await renderer.start()
            self._state.engines[name] = LocalEngine(client, info, renderer, self._state.metrics.of(name))
        self._chain = build_chain(self._state)
        self._state.chain = self._chain.front
        seconds = time.monotonic() - self._started
        names = ", ".join(self._state.names())
        print(f"fastattn: ready, {names} at {self._address()} ({seconds:.1f} s)", file=sys.stderr, flush=True)
        if not self._state.keys and config.host not in ("127.0.0.1", "localhost", "::1") and config.uds is None:
            logger.warning("anybody who reaches %s may use this server: see --api-key", self._address())

    def _address(self) -> str:
        config = self._state.config
        if config.uds is not None:
            return f"unix:{config.uds}"
        host = f"[{config.host}]" if ":" in config.host else config.host
        return f"http{'s' if config.ssl_certfile else ''}://{host}:{self._listener.getsockname()[1]}"

    async def _watch_lag(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(_LAG_SECONDS)
            self._state.metrics.loop_lag.set(max(0.0, time.monotonic() - before - _LAG_SECONDS))


async def _first_ready(client: EngineClient) -> bool:
    async with client.changed:
        await client.changed.wait_for(lambda: client.info is not None or client.state == "dead")
    return client.state != "dead"
