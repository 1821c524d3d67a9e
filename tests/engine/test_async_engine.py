"""The front for servers: streams side by side, requests that are left, errors that reach whom they concern."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from fastattn import AsyncEngine, SamplingParams
from fastattn.engine.async_engine import EngineDeadError
from fastattn.engine.engine import Engine, EngineBusyError
from tests.engine.tiny import run

PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture
def front(make_engine: Callable[..., Engine]) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(make_engine(max_num_seqs=8))
    yield engine
    engine.close()


@pytest.fixture
def slow_front(make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> Iterator[AsyncEngine]:
    """20 ms a step: a request that nobody ends runs on for longer than a busy machine makes anyone wait."""
    engine = make_engine(max_num_seqs=8)
    step = engine.step

    def slow() -> Any:
        time.sleep(0.02)
        return step()

    monkeypatch.setattr(engine, "step", slow)
    front = AsyncEngine(engine)
    yield front
    front.close()


def wait(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def text_of(front: AsyncEngine, prompt: str, request_id: str, params: SamplingParams = PARAMS) -> str:
    text = ""
    async for output in front.generate(prompt, params, request_id):
        text = output.outputs[0].text
    return text


def test_many_streams_side_by_side(front: AsyncEngine, make_engine: Callable[..., Engine]) -> None:
    prompts = [f"prompt {i} " + "ab" * (i % 7) for i in range(40)]
    alone = [output.outputs[0].text for output in run(make_engine(), prompts, PARAMS)]

    async def all_at_once() -> list[str]:
        return await asyncio.gather(*(text_of(front, p, str(i)) for i, p in enumerate(prompts)))

    assert wait(all_at_once()) == alone


def test_outputs_come_one_by_one(front: AsyncEngine) -> None:
    async def lengths() -> list[int]:
        return [len(o.outputs[0].token_ids) async for o in front.generate("hello", PARAMS, "a")]

    assert wait(lengths()) == list(range(1, 25))


@pytest.mark.parametrize("how", ["break", "cancel"])
def test_a_reader_that_leaves_aborts_its_request(slow_front: AsyncEngine, how: str) -> None:
    long = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)

    async def leave() -> Any:
        async def reader() -> None:
            stream = slow_front.generate("hello", long, "a")
            async for _ in stream:
                if how == "break":
                    break
            await stream.aclose()  # type: ignore[attr-defined]

        task = asyncio.create_task(reader())
        if how == "cancel":
            await asyncio.sleep(0.02)
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for _ in range(200):
            stats = await slow_front.stats()
            if stats.num_running + stats.num_waiting == 0:
                return stats
            await asyncio.sleep(0.005)
        raise AssertionError("the request runs on")

    stats = wait(leave())
    assert stats.num_generated_tokens < 200


def test_a_bad_request_hurts_nobody_else(front: AsyncEngine) -> None:
    async def both() -> list[Any]:
        return await asyncio.gather(
            text_of(front, "hello", "good"),
            text_of(front, "x" * 1000, "long"),
            text_of(front, "", "id", SamplingParams(stop_token_ids=[10**6])),
            return_exceptions=True,
        )

    good, long, foreign = wait(both())
    assert isinstance(good, str) and good
    assert isinstance(long, ValueError) and "allowed are up to 255" in str(long)
    assert isinstance(foreign, ValueError)


def test_an_id_in_use_is_refused_and_its_owner_goes_on(slow_front: AsyncEngine) -> None:
    async def twice() -> list[Any]:
        first = asyncio.create_task(text_of(slow_front, "hello", "same"))
        await asyncio.sleep(0)
        return await asyncio.gather(first, text_of(slow_front, "hello", "same"), return_exceptions=True)

    first, second = wait(twice())
    assert isinstance(first, str) and first
    assert isinstance(second, ValueError) and "already in use" in str(second)


def test_a_full_queue_says_so(make_engine: Callable[..., Engine]) -> None:
    front = AsyncEngine(make_engine(max_num_seqs=1, max_num_waiting=2))

    async def crowd() -> list[Any]:
        return await asyncio.gather(*(text_of(front, "hello", str(i)) for i in range(12)), return_exceptions=True)

    results = wait(crowd())
    front.close()
    refused = [r for r in results if isinstance(r, EngineBusyError)]
    assert 0 < len(refused) < 12
    assert all(isinstance(r, str) for r in results if r not in refused)


def test_a_step_that_breaks_reaches_every_reader(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    step, count = engine.step, 0

    def broken() -> Any:
        nonlocal count
        count += 1
        if count > 5:
            raise MemoryError("no more")
        return step()

    monkeypatch.setattr(engine, "step", broken)
    front = AsyncEngine(engine)

    async def readers() -> list[Any]:
        return await asyncio.gather(*(text_of(front, "hello", str(i)) for i in range(5)), return_exceptions=True)

    results = wait(readers())
    assert all(isinstance(r, EngineDeadError) and "no more" in str(r) for r in results), results
    assert not front.is_alive
    with pytest.raises(EngineDeadError, match="no more"):
        wait(text_of(front, "hello", "late"))


def test_close_ends_unfinished_streams(slow_front: AsyncEngine) -> None:
    long = SamplingParams(temperature=0.0, max_tokens=240, ignore_eos=True)

    async def closed() -> Any:
        task = asyncio.create_task(text_of(slow_front, "hello", "a", long))
        await asyncio.sleep(0.02)
        slow_front.close()
        return (await asyncio.gather(task, return_exceptions=True))[0]

    result = wait(closed())
    assert isinstance(result, EngineDeadError) and "closed" in str(result)
    assert not slow_front.is_alive
    with pytest.raises(EngineDeadError):
        wait(slow_front.stats())


def test_a_loop_that_is_gone_does_not_stop_the_engine(front: AsyncEngine) -> None:
    """A reader's event loop that ended without a goodbye: the engine has nobody to tell, and answers the next."""
    loop = asyncio.new_event_loop()
    stream = front.generate("hello", SamplingParams(max_tokens=200, ignore_eos=True), "a")
    loop.run_until_complete(anext(stream))
    loop.close()
    assert wait(text_of(front, "hello", "b"))


def test_progress_can_be_watched(make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that hangs shows from another thread; an idle engine is not ill."""
    engine = make_engine()
    step, go_on, hangs = engine.step, threading.Event(), threading.Event()

    def stuck() -> Any:
        if hangs.is_set():
            go_on.wait(30)
        return step()

    monkeypatch.setattr(engine, "step", stuck)
    front = AsyncEngine(engine)
    assert wait(text_of(front, "hello", "a"))
    deadline = time.monotonic() + 10
    while front.seconds_without_step and time.monotonic() < deadline:
        time.sleep(0.005)
    assert front.seconds_without_step == 0
    assert front.num_steps >= 24
    last = front.last_step_time
    assert last is not None and last <= time.monotonic()
    hangs.set()

    async def hang() -> str:
        answer = asyncio.create_task(text_of(front, "hello", "b"))
        while front.seconds_without_step < 0.1:
            await asyncio.sleep(0.005)
        go_on.set()
        return await answer

    assert wait(hang())
    assert front.last_step_time is not None and front.last_step_time > last
    front.close()


def test_one_request_s_bad_luck_is_its_own(make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong with the text of one, in the tokenizer for instance, ends that one."""
    engine = make_engine()
    front = AsyncEngine(engine)
    expected = wait(text_of(front, "good", "before"))
    make_stream = engine._processor.make_stream

    def sometimes(request: Any) -> Any:
        stream = make_stream(request)
        if request.request_id == "bad":
            monkeypatch.setattr(stream, "push", lambda *_: 1 / 0)
        return stream

    monkeypatch.setattr(engine._processor, "make_stream", sometimes)

    async def reason_of(request_id: str) -> Any:
        async for output in front.generate(request_id, PARAMS, request_id):
            last = output.outputs[0]
        return last.finish_reason, last.stop_reason, last.text

    async def both() -> Any:
        return await asyncio.gather(reason_of("bad"), reason_of("good"))

    bad, good = wait(both())
    assert bad[:2] == ("error", "ZeroDivisionError: division by zero")
    assert good == ("length", None, expected)
    front.close()
