"""The engine process's loop, over an engine and a socket that are none."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest

from fastattn.serve import messages as m
from fastattn.serve.engine_process import EngineLoop


class Socket:
    def __init__(self) -> None:
        self.sent: list[Any] = []

    def poll(self, milliseconds: int) -> int:
        time.sleep(milliseconds / 1000)
        return 0

    def send(self, data: bytes) -> None:
        self.sent.append(msgspec.msgpack.decode(data, type=m.FromEngine))


class Engine:
    """Cannot prepare a request."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def has_unfinished_requests(self) -> bool:
        return False

    def prepare(self, *_: Any) -> Any:
        raise self.error


@pytest.mark.parametrize(
    ("error", "kind"),
    [(ValueError("no grammar"), "invalid"), (OSError("no memory for a process"), "busy"), (RuntimeError("x"), "busy")],
    ids=str,
)
def test_a_request_that_cannot_be_prepared_ends_alone(error: Exception, kind: str) -> None:
    """Its grammar is compiled by a process of its own, which may not start: the engine of all others lives on."""
    socket = Socket()
    loop = EngineLoop(Engine(error), socket, 1.0)  # type: ignore[arg-type]
    sampling = m.Sampling(seed=0, structured_output=m.Structure("regex", "a"))
    loop._obey(m.Generate("r", [1], sampling, 0, ""))
    end = time.monotonic() + 10
    while not socket.sent and time.monotonic() < end:
        loop._receive()
    (refused,) = socket.sent
    assert (refused.id, refused.kind) == ("r", kind)
