"""uvicorn's HTTP protocol with the limits that it lacks: how long, and how large, a request's headers may be, and what
follows the body (trailers)."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

_MAX_HEADER_BYTES = 64 << 10


def protocol_class(header_timeout: float) -> type[HttpToolsProtocol]:
    """uvicorn makes the instances, so what they are to know goes into the class."""

    class LimitedProtocol(HttpToolsProtocol):
        _header_timer: asyncio.TimerHandle | None = None
        _num_header_bytes = 0
        _cycles: tuple[RequestResponseCycle, ...] = ()  # not yet answered
        _num_chunk_bytes: int | None = None  # since a chunk's head, while nothing of its data has come

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait_for_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            # uvicorn tells only the last of several requests that came at once.
            for cycle in self._cycles:
                cycle.disconnected = True
                cycle.message_event.set()
            self.pipeline.clear()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._header_timer is not None:
                self._num_header_bytes += len(data)
            elif self._num_chunk_bytes is not None:
                self._num_chunk_bytes += len(data)
            super().data_received(data)
            # A whole request with its body may come at once; then nothing is waited for here any more.
            if self._header_timer is not None and self._num_header_bytes > _MAX_HEADER_BYTES:
                self._refuse(b"431 Request Header Fields Too Large", b"the request's headers are too large")
            elif (self._num_chunk_bytes or 0) > _MAX_HEADER_BYTES:  # the parser keeps a trailer until its end
                self._refuse(b"431 Request Header Fields Too Large", b"the request's trailers are too large")

        def on_chunk_header(self) -> None:
            self._num_chunk_bytes = 0

        def on_body(self, body: bytes) -> None:
            self._num_chunk_bytes = None
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._num_chunk_bytes = None
            super().on_message_complete()

        def on_header(self, name: bytes, value: bytes) -> None:
            # Trailers would join the headers behind the back of whoever has judged those.
            if self._header_timer is not None:
                super().on_header(name, value)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            if self._header_timer is None:  # another request on a connection that was kept
                self._wait_for_headers()

        def on_headers_complete(self) -> None:
            self._stop_waiting()
            super().on_headers_complete()
            self.scope["fastattn.abort"] = self.transport.abort  # type: ignore[typeddict-unknown-key]
            self._cycles = (*(cycle for cycle in self._cycles if not cycle.response_complete), self.cycle)

        def _wait_for_headers(self) -> None:
            self._num_header_bytes = 0
            self._header_timer = self.loop.call_later(
                header_timeout, self._refuse, b"408 Request Timeout", b"the request's headers did not arrive in time"
            )

        def _stop_waiting(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def send_400_response(self, msg: str) -> None:
            self._refuse(b"400 Bad Request", b"the request is not HTTP")

        def _refuse(self, status: bytes, text: bytes) -> None:
            self._stop_waiting()
            if self.transport.is_closing():
                return
            body = b'{"error":{"message":"' + text + b'","type":"invalid_request_error","param":null,"code":null}}'
            head = b"HTTP/1.1 " + status + b"\r\ncontent-type: application/json\r\nconnection: close\r\n"
            self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            self.transport.close()

    return LimitedProtocol
