"""Our engine as a Backend: what becomes of its outputs, and what is counted of each engine."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from fastattn.serve import engine_client
from fastattn.serve import messages as m
from fastattn.serve.cache import ResponseCache
from fastattn.serve.cache.config import CacheConfig
from fastattn.serve.config import ServeConfig
from fastattn.serve.contract import APIError
from fastattn.serve.engine_backend import EngineBackend
from fastattn.serve.guardrails import Guardrails, GuardrailsConfig
from fastattn.serve.metrics import Metrics
from fastattn.serve.server import _listen
from tests.serve.fakes import ask, chat, completion, context, wait

CALLS = (
    '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
)


class Client:
    """Says one text, a character at a time."""

    info = SimpleNamespace(max_model_len=1000)

    def __init__(self, text: str) -> None:
        self._text = text

    async def generate(self, works: Sequence[m.Generate]) -> AsyncIterator[tuple[int, m.Output]]:
        for i, char in enumerate(self._text):
            last = i == len(self._text) - 1
            choice = m.Choice(0, char, [i], finish_reason="stop" if last else None)
            yield 0, m.Output(works[0].id, [choice], last)


class Renderer:
    async def chat(self, *_: Any, **__: Any) -> list[int]:
        return [1, 2, 3]

    async def encode(self, texts: list[str]) -> list[list[int]]:
        return [[1, 2] for _ in texts]


def backend(text: str, metrics: Metrics, name: str = "m") -> EngineBackend:
    return EngineBackend(Client(text), Renderer(), metrics.of(name))  # type: ignore[arg-type]


@pytest.mark.parametrize(("parallel", "count"), [(None, 2), (True, 2), (False, 1)])
def test_calls_one_by_one(parallel: bool | None, count: int) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    answer = wait(ask(backend(CALLS, Metrics()), chat(tools=tools, parallel_tool_calls=parallel), context()))
    (choice,) = answer["choices"]
    assert len(choice["message"]["tool_calls"]) == count and choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None


@pytest.mark.parametrize("cached", [False, True])
def test_an_answer_that_a_guard_ended_says_what_it_took(cached: bool, tmp_path: Path) -> None:
    words = {"name": "w", "kind": "words", "words": ["secret"], "directions": ["output"]}

    async def run() -> dict[str, Any]:
        inner: Any = backend("a secret and more", Metrics())
        cache = ResponseCache(CacheConfig(path=tmp_path / "c.sqlite", lookup_timeout=60.0), inner, lambda _: "m")
        guards = Guardrails(GuardrailsConfig.model_validate({"guards": [words]}), cache if cached else inner)
        try:
            return await ask(guards, chat(), context())
        finally:
            await cache.close()

    answer = wait(run())
    assert answer["choices"][0]["finish_reason"] == "content_filter"
    usage = answer["usage"]
    assert usage["prompt_tokens"] == 3 and len("a secret") <= usage["completion_tokens"] <= len("a secret and more")


def test_a_name_in_another_alphabet() -> None:
    asked = context()
    wait(ask(backend("hello", Metrics()), completion(model="/models/モデル\r\nX: 1"), asked))
    name = asked.headers["x-fastattn-model"]
    assert name.isascii() and name.isprintable() and name.startswith("/models/%E3")


def test_every_engine_has_its_own_numbers() -> None:
    """Two engines in one series took turns: their counters fell and rose with each sign of life."""
    metrics = Metrics()
    for name, count in (("a", 5), ("b", 70)):
        metrics.of(name).numbers.update({"num_generated_tokens": count, "num_kv_blocks": 10, "num_usable_kv_blocks": 5})
        wait(ask(backend("hello", metrics, name), completion(), context()))
    metrics.of("b").numbers.restarted()
    metrics.of("b").numbers.update({"num_generated_tokens": 1})
    lines = metrics.text().decode().splitlines()
    for line in (
        'fastattn:generation_tokens_total{model_name="a"} 5.0',
        'fastattn:generation_tokens_total{model_name="b"} 71.0',
        'fastattn:kv_cache_usage_perc{model_name="a"} 0.5',
        'fastattn:kv_cache_usage_perc{model_name="b"} 0.0',
        'fastattn:request_success_total{finished_reason="stop",model_name="b"} 1.0',
        'fastattn:time_to_first_token_seconds_count{model_name="a"} 1.0',
        'fastattn:request_prompt_tokens_sum{model_name="a"} 2.0',
        'fastattn:request_generation_tokens_sum{model_name="a"} 5.0',
    ):
        assert line in lines


@pytest.mark.parametrize("error", [zmq.ZMQError(24), OSError(24, "Too many open files")])
def test_an_engine_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Out of file descriptors when its engine had died, a server ended with a traceback."""
    tries = 0

    class Link:
        def __init__(self, folder: Path) -> None:
            nonlocal tries
            tries += 1
            if isinstance(error, zmq.ZMQError):
                raise error

        async def start(self, *_: Any) -> None:
            raise error

        async def kill(self) -> str:
            return "it did not start"

    monkeypatch.setattr(engine_client, "EngineLink", Link)
    monkeypatch.setattr(engine_client, "_BACK_OFF", (0.0,) * 5)
    client = engine_client.EngineClient("m", "m", {}, Metrics(), engine_client.EngineTimes(), 1)
    wait(client.run())
    assert tries == 1 + engine_client.MAX_FAILURES and client.failure is not None
    assert "could not be started: Too many open files" in client.failure[0] or "[Errno 24]" in client.failure[0]


def test_a_socket_that_was_left_behind_is_no_hindrance(tmp_path: Path) -> None:
    config = ServeConfig(model="m", uds=tmp_path / "s")
    _listen(config).close()  # as a killed server does
    with _listen(config) as alive:
        with pytest.raises(OSError, match="in use"):
            _listen(config)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(config.uds))
        assert alive.fileno() > 0
    (tmp_path / "file").write_text("a file is left alone")
    with pytest.raises(OSError, match="in use"):
        _listen(ServeConfig(model="m", uds=tmp_path / "file"))


def test_what_never_fits_is_not_to_be_tried_again() -> None:
    client = engine_client.EngineClient("m", "m", {}, Metrics(), engine_client.EngineTimes(), 1)
    client.info = SimpleNamespace(max_num_seqs=2)  # type: ignore[assignment]
    with pytest.raises(APIError, match="4 sequences") as caught:
        client._admit([m.Embed(str(i), [1]) for i in range(4)])
    assert caught.value.status == 400
