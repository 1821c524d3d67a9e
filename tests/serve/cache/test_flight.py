"""Requests in flight: identical ones are computed once, and what did not end well is not kept."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fastattn.serve.contract import APIError
from tests.serve.cache.cached import HEADER, cache_of, echo, outcomes, said
from tests.serve.fakes import (
    Scripted,
    chat,
    chunks,
    context,
    error_of,
    saying,
    text,
    until,
    wait,
)


def test_identical_requests_in_flight_are_computed_once(tmp_path: Path) -> None:
    inner = echo(6)

    async def run() -> list[str]:
        cache = cache_of(tmp_path, inner)
        inner.gate.clear()
        contexts = [context("t") for _ in range(20)]
        tasks = [asyncio.create_task(text(cache, chat("p"), ctx)) for ctx in contexts]
        await until(lambda: sum(outcomes(cache).values()) == 20)
        inner.gate.set()
        texts = await asyncio.gather(*tasks)
        await cache.close()
        assert sorted(ctx.headers[HEADER] for ctx in contexts) == ["hit"] * 19 + ["miss"]
        return texts

    assert wait(run()) == ["t:p..."] * 20
    assert inner.num_calls == 1


def test_who_started_may_leave(tmp_path: Path) -> None:
    inner = echo(6)

    async def run() -> None:
        cache = cache_of(tmp_path, inner)
        inner.gate.clear()
        first, second = (asyncio.create_task(text(cache, chat("p"), context("t"))) for _ in range(2))
        await until(lambda: sum(outcomes(cache).values()) == 2)
        await until(lambda: inner.num_calls == 1)
        first.cancel()
        await asyncio.sleep(0)
        inner.gate.set()
        assert await second == "t:p..."
        assert inner.num_calls == 1 and inner.num_left == 0
        await cache.close()

    wait(run())


def test_when_all_leave_the_work_is_aborted_and_nothing_kept(tmp_path: Path) -> None:
    inner = echo(6)

    async def run() -> None:
        cache = cache_of(tmp_path, inner)
        inner.gate.clear()
        tasks = [asyncio.create_task(text(cache, chat("p"), context("t"))) for _ in range(3)]
        await until(lambda: sum(outcomes(cache).values()) == 3 and inner.num_running == 1)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await until(lambda: inner.num_left == 1 and inner.num_running == 0)
        inner.gate.set()
        ctx = context("t")
        assert await text(cache, chat("p"), ctx) == "t:p..."
        assert ctx.headers[HEADER] == "miss"
        await cache.close()

    wait(run())


def test_an_error_reaches_all_and_is_not_kept(tmp_path: Path) -> None:
    script: list[Any] = [APIError(503, "busy", "overloaded_error")]
    inner = Scripted(lambda request, _: script or chunks(request, ["x"]))

    async def run() -> None:
        cache = cache_of(tmp_path, inner)
        inner.gate.clear()  # the five look the request up in threads, and the first must not be over before the last
        tasks = [asyncio.create_task(error_of(cache, chat(), context())) for _ in range(5)]
        await until(lambda: sum(outcomes(cache).values()) == 5)
        inner.gate.set()
        assert {error.status for error in await asyncio.gather(*tasks)} == {503} and inner.num_calls == 1
        script.clear()
        assert await text(cache, chat(), context()) == "x"
        await cache.close()

    wait(run())


@pytest.mark.parametrize("end", [None, "content_filter", "error", "abort"])
def test_answers_without_a_good_end_are_not_kept(tmp_path: Path, end: str | None) -> None:
    cache = cache_of(tmp_path, saying("x", finish=end))
    assert said(cache, (chat(), context()), (chat(), context())) == ["miss", "miss"]


@pytest.mark.parametrize("when", ["during", "after", "on a hit"])
def test_what_a_guard_refused_is_not_kept(tmp_path: Path, when: str) -> None:
    inner = echo(6)

    async def run() -> str:
        cache = cache_of(tmp_path, inner)
        if when == "on a hit":
            await text(cache, chat("p"), context())
            await cache.flush()
        ctx = context()
        async for _ in cache.stream(chat("p"), ctx):
            if when == "during":
                for call in ctx.on_refusal:
                    call()
        if when != "during":
            for call in ctx.on_refusal:
                call()
        await cache.flush()
        last = context()
        await text(cache, chat("p"), last)
        await cache.close()
        return last.headers[HEADER]

    assert wait(run()) == "miss"


def test_another_models_answer_is_not_kept(tmp_path: Path) -> None:
    def answer(request: Any, ctx: Any) -> Any:
        ctx.cacheable = False
        ctx.headers["x-fastattn-model"] = "stand-in"
        return chunks(request, ["x"])

    cache, ctx = cache_of(tmp_path, Scripted(answer)), context()
    assert said(cache, (chat(), ctx), (chat(), context())) == ["miss", "miss"]
    assert ctx.headers["x-fastattn-model"] == "stand-in"


def test_the_model_that_answered_is_named_on_a_hit(tmp_path: Path) -> None:
    def answer(request: Any, ctx: Any) -> Any:
        ctx.headers["x-fastattn-model"] = "small"
        return chunks(request, ["x"])

    ctx = context()
    said(cache_of(tmp_path, Scripted(answer)), (chat(), context()), (chat(), ctx))
    assert ctx.headers == {HEADER: "hit", "x-fastattn-model": "small"}
