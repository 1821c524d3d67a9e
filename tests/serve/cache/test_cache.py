"""The response cache: what it shares, with whom, and what it does when its file is not well."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fastattn.serve.cache import CacheConfig, ResponseCache
from fastattn.serve.cache.database import Database, Entry
from fastattn.serve.cache.key import DELIVERY, request_key
from fastattn.serve.contract import APIError
from fastattn.serve.protocol import ChatCompletionRequest, CompletionRequest
from tests.serve.fakes import (
    Scripted,
    ask,
    chat,
    chunks,
    completion,
    context,
    error_of,
    saying,
    text,
    text_of,
    until,
    wait,
)

HEADER = "x-fastattn-cache"


def cache_of(path: Path, inner: Scripted, **fields: Any) -> ResponseCache:
    # whoever tests the answers must not test how fast the machine's disk is
    config = CacheConfig(path=path / "cache.sqlite", **{"lookup_timeout": 60.0} | fields)
    return ResponseCache(config, inner, lambda model: f"digest of {model}")


def echo(pieces: int = 3) -> Scripted:
    """Answers with the tenant and the prompt, so that a crossing shows."""

    def answer(request: Any, ctx: Any) -> Any:
        prompt = request.messages[-1].text if isinstance(request, ChatCompletionRequest) else request.prompt
        return chunks(request, [ctx.tenant, ":", str(prompt), *["."] * (pieces - 3)])

    return Scripted(answer)


def outcomes(cache: ResponseCache) -> dict[str, int]:
    (metric,) = cache._metrics.lookups.collect()
    return {s.labels["outcome"]: int(s.value) for s in metric.samples if s.name.endswith("_total") and s.value}


def test_a_repeat_is_a_hit_in_the_same_chunks(tmp_path: Path) -> None:
    inner = saying("one ", "two ", "three")

    async def twice() -> None:
        cache = cache_of(tmp_path, inner)
        first, second = context(request_id="a"), context(request_id="b")
        one = await ask(cache, chat(), first)
        await cache.flush()
        two = await ask(cache, chat(stream=True, stream_options={"include_usage": True}), second)
        await cache.close()
        assert (first.headers[HEADER], second.headers[HEADER]) == ("miss", "hit")
        assert text_of(one) == text_of(two) == "one two three"
        assert one["num_chunks"] == two["num_chunks"] == 6
        assert one["usage"] == two["usage"]
        assert (one["id"], two["id"]) == ("chatcmpl-1", "chatcmpl-b"), "a repeat has a name of its own"
        assert two["created"] >= time.time() - 60

    wait(twice())
    assert inner.num_calls == 1


def test_hits_survive_a_restart_and_are_private(tmp_path: Path) -> None:
    inner = saying("x")

    async def once() -> str:
        cache = cache_of(tmp_path, inner)
        ctx = context()
        await text(cache, chat(), ctx)
        await cache.close()
        return ctx.headers[HEADER]

    old = os.umask(0)
    try:
        assert [wait(once()), wait(once())] == ["miss", "hit"]
    finally:
        os.umask(old)
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


@pytest.mark.parametrize(
    ("request_", "kept"),
    [
        (chat(), True),
        (chat(temperature=None), False),
        (chat(temperature=0.7), False),
        (chat(temperature=0.7, seed=1), True),
        (completion(), True),
        (completion([1, 2]), True),
    ],
)
def test_only_what_is_not_random_is_kept(tmp_path: Path, request_: Any, kept: bool) -> None:
    async def twice() -> str:
        cache = cache_of(tmp_path, saying("x"))
        await text(cache, request_, context())
        await cache.flush()
        ctx = context()
        await text(cache, request_, ctx)
        await cache.close()
        return ctx.headers[HEADER]

    assert wait(twice()) == ("hit" if kept else "bypass")


def test_sampled_answers_are_kept_when_asked_for(tmp_path: Path) -> None:
    async def twice() -> str:
        cache = cache_of(tmp_path, saying("x"), cache_sampled=True)
        await text(cache, chat(temperature=1.0), context())
        await cache.flush()
        ctx = context()
        await text(cache, chat(temperature=1.0), ctx)
        await cache.close()
        return ctx.headers[HEADER]

    assert wait(twice()) == "hit"


@pytest.mark.parametrize(
    ("directives", "outcome", "calls"),
    [((), "hit", 1), (("no-store",), "bypass", 2), (("no-cache",), "miss", 2), (("max-age=60",), "hit", 1),
     (("max-age=0",), "miss", 2), (("max-age=soon",), "miss", 2)],
)  # fmt: skip
def test_cache_control(tmp_path: Path, directives: tuple[str, ...], outcome: str, calls: int) -> None:
    inner = saying("x")

    async def twice() -> str:
        cache = cache_of(tmp_path, inner)
        await text(cache, chat(), context())
        await cache.flush()
        await asyncio.sleep(0.01)
        ctx = context("", *directives)
        await text(cache, chat(), ctx)
        await cache.close()
        return ctx.headers[HEADER]

    assert wait(twice()) == outcome
    assert inner.num_calls == calls


def test_no_store_leaves_nothing_behind(tmp_path: Path) -> None:
    async def run() -> str:
        cache = cache_of(tmp_path, saying("x"))
        await text(cache, chat(), context("", "no-store"))
        await cache.flush()
        ctx = context()
        await text(cache, chat(), ctx)
        await cache.close()
        return ctx.headers[HEADER]

    assert wait(run()) == "miss"


def test_unknown_models_are_not_kept(tmp_path: Path) -> None:
    async def run() -> str:
        cache = ResponseCache(CacheConfig(path=tmp_path / "c"), saying("x"), lambda model: None)
        ctx = context()
        await text(cache, chat(), ctx)
        await cache.close()
        return ctx.headers[HEADER]

    assert wait(run()) == "bypass"


def test_entries_grow_old(tmp_path: Path) -> None:
    inner = saying("x")

    async def run() -> None:
        cache = cache_of(tmp_path, inner, ttl=0.05)
        await text(cache, chat(), context())
        await cache.flush()
        await asyncio.sleep(0.06)
        await text(cache, chat(), context())
        await cache.close()

    wait(run())
    assert inner.num_calls == 2


# ---- keys ----

BASE = {
    "model": "m", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}],
    "temperature": 0.0, "max_tokens": 5,
}  # fmt: skip
OTHER_VALUES: dict[str, Any] = {
    "model": "n", "messages": [{"role": "user", "content": "hello"}], "temperature": 0.5, "max_tokens": 6,
    "max_completion_tokens": 5, "frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty": 1.5,
    "logit_bias": {"3": 1.0}, "n": 2, "seed": 3, "stop": ["x"], "top_p": 0.5, "user": "u", "top_k": 4, "min_p": 0.1,
    "min_tokens": 1, "stop_token_ids": [1], "ignore_eos": True, "skip_special_tokens": False,
    "include_stop_str_in_output": True, "priority": 1, "structured_outputs": {"regex": "a+"}, "guided_json": {},
    "guided_regex": "a", "guided_choice": ["a"], "guided_grammar": "start: \"a\"", "logprobs": True,
    "response_format": {"type": "json_object"}, "parallel_tool_calls": True, "metadata": {"a": "b"},
    "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none", "modalities": ["text"],
    "store": False, "service_tier": "auto", "reasoning_effort": "low", "chat_template_kwargs": {"thinking": True},
    "verbosity": "medium", "prediction": {"type": "content", "content": "x"}, "prompt_cache_key": "k",
    "prompt_cache_options": {}, "prompt_cache_retention": "24h", "safety_identifier": "s",
}  # fmt: skip


def key(body: dict[str, Any], fingerprint: str = "f", tenant: str = "t", **headers: str) -> bytes:
    return request_key(ChatCompletionRequest.model_validate(body), fingerprint, tenant, headers)


def test_every_field_is_in_the_key() -> None:
    """A field that is new in the protocol fails here until this test has a value for it."""
    refused = {name for name, field in ChatCompletionRequest.model_fields.items() if field.annotation is type(None)}
    fields = set(ChatCompletionRequest.model_fields) - DELIVERY - refused
    keys = {"": key(BASE)}
    for name in fields:
        body = BASE | {name: OTHER_VALUES[name]} if name != "top_logprobs" else BASE | {"logprobs": True, name: 2}
        keys[name] = key(body)
    assert len(set(keys.values())) == len(fields) + 1
    assert key(BASE | {"stream": True, "stream_options": {"include_usage": True}}) == keys[""]


def test_model_tenant_and_kind_are_in_the_key() -> None:
    keys = {
        key(BASE),
        key(BASE, fingerprint="g"),
        key(BASE, tenant="u"),
        key(BASE, "ft", ""),
        key(BASE, **{"x-tier": "gold"}),
    }
    keys.add(request_key(CompletionRequest(model="m", prompt="hello", temperature=0.0, max_tokens=5), "f", "t", {}))
    assert len(keys) == 6


def test_defaults_and_their_values_have_one_key() -> None:
    assert key(BASE) == key(BASE | {"top_p": None, "stop": None})


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(a=TEXTS, b=TEXTS, c=TEXTS, d=TEXTS)
@settings(max_examples=200, deadline=None)
def test_texts_never_slip_from_one_message_into_another(a: str, b: str, c: str, d: str) -> None:
    def of(x: str, y: str) -> bytes:
        return key(BASE | {"messages": [{"role": "system", "content": x}, {"role": "user", "content": y}]})

    assert (of(a, b) == of(c, d)) == ((a, b) == (c, d))
    assert (key(BASE, tenant=a, fingerprint=b) == key(BASE, tenant=c, fingerprint=d)) == ((a, b) == (c, d))


def test_text_that_is_no_unicode_passes_by(tmp_path: Path) -> None:
    async def run() -> str:
        cache = cache_of(tmp_path, saying("x"))
        ctx = context()
        await text(cache, chat().model_copy(update={"user": "\ud800"}), ctx)
        await cache.close()
        return ctx.headers[HEADER]

    assert wait(run()) == "bypass"


# ---- tenants ----


def test_tenants_never_share(tmp_path: Path) -> None:
    """Canaries: every answer names its tenant, many requests are alike, in flight at the same time and later."""
    inner, draw = echo(), random.Random(0)

    async def run() -> int:
        cache = cache_of(tmp_path, inner)

        async def one(tenant: str, prompt: str) -> None:
            assert await text(cache, chat(prompt), context(tenant)) == f"{tenant}:{prompt}"

        for _ in range(40):
            await asyncio.gather(*(one(f"tenant {draw.randrange(5)}", f"p{draw.randrange(10)}") for _ in range(50)))
        counted = outcomes(cache)
        await cache.close()
        return counted["hit"] + counted["joined"]

    shared = wait(run())
    assert shared > 1800, "most were repeats"
    assert inner.num_calls == 2000 - shared <= 50 + 40, "one computation for each tenant and prompt"


# ---- requests in flight ----


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
    inner = saying("x", finish=end)

    async def run() -> None:
        cache = cache_of(tmp_path, inner)
        await text(cache, chat(), context())
        await cache.flush()
        await text(cache, chat(), context())
        await cache.close()

    wait(run())
    assert inner.num_calls == 2


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

    inner = Scripted(answer)

    async def run() -> None:
        cache = cache_of(tmp_path, inner)
        ctx = context()
        await text(cache, chat(), ctx)
        assert ctx.headers["x-fastattn-model"] == "stand-in"
        await cache.flush()
        await text(cache, chat(), context())
        await cache.close()

    wait(run())
    assert inner.num_calls == 2


def test_the_model_that_answered_is_named_on_a_hit(tmp_path: Path) -> None:
    def answer(request: Any, ctx: Any) -> Any:
        ctx.headers["x-fastattn-model"] = "small"
        return chunks(request, ["x"])

    async def run() -> dict[str, str]:
        cache = cache_of(tmp_path, Scripted(answer))
        await text(cache, chat(), context())
        await cache.flush()
        ctx = context()
        await text(cache, chat(), ctx)
        await cache.close()
        return ctx.headers

    assert wait(run()) == {HEADER: "hit", "x-fastattn-model": "small"}


# ---- sizes ----


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    now = [1000.0]
    database = Database(tmp_path / "c", max_bytes=10_000, clock=lambda: now[0])
    entry = Entry(1000.0, {"h": "x" * 700}, [])
    keys = [bytes([i]) * 32 for i in range(40)]
    for i, one in enumerate(keys):
        now[0] += 1
        assert i == 0 or database.get(keys[0]) is not None, "what is used stays"
        database.put(one, entry, ttl=1e6)
        assert database.num_bytes <= 10_000
    kept = [one for one in keys if database.get(one) is not None]
    assert kept[0] == keys[0] and kept[1:] == keys[len(keys) - len(kept) + 1 :]
    assert 5 < len(kept) < 12 and database.num_evicted == 40 - len(kept)
    database.close()


def test_long_answers_are_not_kept(tmp_path: Path) -> None:
    inner = saying("x" * 3000)

    async def run() -> None:
        cache = cache_of(tmp_path, inner, max_entry_bytes=2048)
        await text(cache, chat(), context())
        await cache.flush()
        await text(cache, chat(), context())
        await cache.close()

    wait(run())
    assert inner.num_calls == 2


# ---- a store that is not well ----


async def answers_all(cache: ResponseCache, prompts: int = 30) -> None:
    for i in range(prompts):
        assert await text(cache, chat(f"p{i % 7}"), context("t")) == f"t:p{i % 7}"


def test_bytes_overwritten_while_it_runs_cost_only_hits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Random damage in file and log under load: every answer is the right one."""
    draw, file = random.Random(1), tmp_path / "cache.sqlite"

    async def run() -> dict[str, int]:
        cache = cache_of(tmp_path, echo(), retry_seconds=0.01)

        async def damage() -> None:
            while not outcomes(cache).get("hit"):  # a file damaged twice is given up: there must have been hits before
                await asyncio.sleep(0.001)
            for _ in range(60):
                await asyncio.sleep(0.005)
                victim = draw.choice([file, Path(f"{file}-wal")])
                if victim.exists() and victim.stat().st_size > 200:
                    with victim.open("r+b") as f:
                        for _ in range(20):
                            f.seek(draw.randrange(victim.stat().st_size))
                            f.write(draw.randbytes(8))

        async def load(n: int) -> None:
            for i in range(150):
                prompt = f"p{(i * n) % 20}"
                assert await text(cache, chat(prompt), context(f"t{n}")) == f"t{n}:{prompt}"

        await asyncio.gather(damage(), *(load(n) for n in range(1, 4)))
        counted = outcomes(cache)
        await cache.close()
        return counted

    counted = wait(run(), 120)
    assert sum(counted.values()) == 450 and counted["hit"] > 0


@pytest.mark.parametrize("content", [b"", b"not a database, but long enough to be looked at" * 50, bytes(8192)])
def test_a_file_that_is_no_database_is_renamed_aside_once(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache.sqlite").write_bytes(content)

    async def run() -> None:
        cache = cache_of(tmp_path, echo())
        await answers_all(cache)
        assert outcomes(cache)["hit"] >= 20
        await cache.close()

    wait(run())
    aside = [p for p in tmp_path.iterdir() if "damaged" in p.name]
    assert [p.read_bytes() for p in aside] == ([content] if content else [])
    assert len(caplog.records) == len(aside)


def test_an_old_schema_is_renamed_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with sqlite3.connect(tmp_path / "cache.sqlite") as old:
        old.execute("CREATE TABLE entries (key TEXT)")
        old.execute("PRAGMA user_version = 99")
    old.close()

    async def run() -> None:
        cache = cache_of(tmp_path, echo())
        await answers_all(cache)
        assert outcomes(cache)["hit"] >= 20
        await cache.close()

    wait(run())
    assert len([p for p in tmp_path.iterdir() if "damaged" in p.name]) == 1
    assert "its version is 99, expected 1" in caplog.text


def test_damage_that_comes_back_turns_it_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise sqlite3.DatabaseError("database disk image is malformed")

    monkeypatch.setattr("fastattn.serve.cache.store.Database", broken)
    (tmp_path / "cache.sqlite").write_bytes(b"x")

    async def run() -> None:
        cache = cache_of(tmp_path, echo(), retry_seconds=0.001)
        await answers_all(cache)
        await cache.close()

    wait(run())
    assert len(caplog.records) == 2, caplog.text
    assert "a new one is begun" in caplog.text and "until the next start" in caplog.text


def test_a_locked_file_is_left_alone_and_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = sqlite3.connect(tmp_path / "cache.sqlite", isolation_level=None)
    other.execute("PRAGMA journal_mode = WAL")
    other.execute("BEGIN EXCLUSIVE")

    async def run() -> None:
        cache = cache_of(tmp_path, echo(), retry_seconds=0.2)
        begun = time.monotonic()
        await answers_all(cache)
        assert time.monotonic() - begun < 5
        assert "hit" not in outcomes(cache)
        other.execute("ROLLBACK")
        other.close()
        await asyncio.sleep(0.25)
        await answers_all(cache)
        await cache.flush()
        await answers_all(cache)
        assert outcomes(cache)["hit"] >= 20
        await cache.close()

    wait(run())
    assert len(caplog.records) == 1 and "locked" in caplog.text


def test_a_place_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache.sqlite").mkdir()

    async def run() -> None:
        cache = cache_of(tmp_path, echo())
        await answers_all(cache)
        assert outcomes(cache) == {"miss": 30}
        await cache.close()

    wait(run())
    assert len(caplog.records) == 1 and "requests go on without it" in caplog.text


class FaultyConnection(sqlite3.Connection):
    """Fails at the nth statement from now."""

    left = 10**9
    error: Exception = sqlite3.OperationalError("database or disk is full")

    def execute(self, *args: Any) -> Any:
        self._count()
        return super().execute(*args)

    def executemany(self, *args: Any) -> Any:
        self._count()
        return super().executemany(*args)

    @classmethod
    def _count(cls) -> None:
        cls.left -= 1
        if cls.left == 0:
            raise cls.error


@pytest.mark.parametrize(
    "error",
    [
        sqlite3.OperationalError("database or disk is full"),
        sqlite3.DatabaseError("database disk image is malformed"),
        RuntimeError("a bug of ours"),
    ],
    ids=str,
)
def test_every_statement_fails_once(tmp_path: Path, monkeypatch: Any, error: Exception) -> None:
    """Each call in turn: no request notices, and afterwards the cache works again."""
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, factory=FaultyConnection, **k))
    monkeypatch.setattr(FaultyConnection, "error", error)

    async def run(nth: int) -> bool:
        folder = tmp_path / str(nth)
        FaultyConnection.left = nth
        cache = cache_of(folder, echo(), retry_seconds=1e-6)
        for _ in range(2):
            for i in range(3):
                assert await text(cache, chat(f"p{i}"), context("t")) == f"t:p{i}"
            await cache.flush()
        fell = FaultyConnection.left <= 0
        FaultyConnection.left = 10**9
        for _ in range(2):
            ctx = context("t")
            assert await text(cache, chat("again"), ctx) == "t:again"
            await cache.flush()
        assert ctx.headers[HEADER] == "hit"
        await cache.close()
        return fell

    nth = 1
    while wait(run(nth)):
        nth += 1
    assert nth > 25


FULL_DISK = """
import asyncio, resource, signal, sys
from pathlib import Path
from tests.serve.cache.test_cache import answers_all, cache_of, echo, outcomes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
async def run():
    cache = cache_of(Path(sys.argv[1]), echo())
    await answers_all(cache, 60)
    print(sum(outcomes(cache).values()))
    await cache.close()
asyncio.run(run())
"""


@pytest.mark.parametrize("size", [0, 30_000])
def test_a_disk_that_takes_no_more(tmp_path: Path, size: int) -> None:
    """Real failing writes: the process may write files of so many bytes only."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "60"), done.stderr


WRITER = """
import sys, time
from pathlib import Path
import msgspec
from fastattn.serve.cache.database import Database, Entry
database = Database(Path(sys.argv[1]), max_bytes=1 << 20)
print("go", flush=True)
for i in range(10**9):
    name = str(i % 50)
    chunk = msgspec.Raw(msgspec.msgpack.encode({"n": name, "pad": "x" * (i % 700)}))
    database.put(name.encode().ljust(32), Entry(time.time(), {"n": name}, [chunk] * 5), 1e6)
"""


@pytest.mark.parametrize("seed", range(5))
def test_kill_while_writing(tmp_path: Path, seed: int) -> None:
    """kill -9 at some moment: the file can be read, and whatever is in it is what was put."""
    path = tmp_path / "c"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None and writer.stdout.readline() == b"go\n"
    time.sleep(random.Random(seed).uniform(0, 0.1))
    writer.kill()
    writer.wait()
    database = Database(path, max_bytes=1 << 20)
    for i in range(50):
        entry = database.get(str(i).encode().ljust(32))
        assert entry is None or (entry.headers == {"n": str(i)} and len(entry.chunks) == 5)
    assert database.num_damaged == 0
    database.close()


def test_a_poisoned_value_is_a_miss(tmp_path: Path) -> None:
    """CVE-2025-69872's class: a value that was put there by another is not believed, whatever it says."""
    path = tmp_path / "c"
    database = Database(path, max_bytes=1 << 20)
    name = b"k" * 32
    database.put(name, Entry(time.time(), {}, []), 1e6)
    database.close()
    with sqlite3.connect(path) as other:
        other.execute("UPDATE entries SET value = ?", (b"\x80\x04cos\nsystem\n.",))
    other.close()
    database = Database(path, max_bytes=1 << 20)
    assert database.get(name) is None and database.num_damaged == 1
    database.close()


@given(st.binary(max_size=200), st.integers(0, 200))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_in_a_row_are_a_miss(tmp_path_factory: Any, junk: bytes, at: int) -> None:
    path = tmp_path_factory.mktemp("junk") / "c"
    database = Database(path, max_bytes=1 << 20)
    name = b"k" * 32
    database.put(name, Entry(1e9, {"a": "b"}, []), 1e12)
    value = database._sql.execute("SELECT value FROM entries").fetchone()[0]
    poisoned = value[:at] + junk + value[at + len(junk) :]
    database._sql.execute("UPDATE entries SET value = ?", (poisoned,))
    entry = database.get(name)
    assert (entry is not None) == (poisoned == value)
    database.abandon()


def test_no_time_in_the_event_loop(tmp_path: Path, monkeypatch: Any) -> None:
    """A disk that takes 2 s for everything delays nobody else's chunks."""
    real: Callable[..., Any] = Database.get

    def slow(self: Database, *args: Any) -> Any:
        time.sleep(2)
        return real(self, *args)

    monkeypatch.setattr(Database, "get", slow)

    async def run() -> float:
        cache = cache_of(tmp_path, echo())
        task = asyncio.create_task(text(cache, chat(), context()))
        worst = 0.0
        while not task.done():
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            worst = max(worst, time.perf_counter() - before)
        await cache.close()
        return worst

    assert wait(run()) < 1.9


def test_a_slow_store_is_given_up(tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(Database, "get", lambda self, *a: time.sleep(5))

    async def run() -> float:
        cache = cache_of(tmp_path, echo(), lookup_timeout=0.05)
        before = time.monotonic()
        await answers_all(cache)
        took = time.monotonic() - before
        await cache.close()
        return took

    assert wait(run()) < 4.5
    assert len(caplog.records) == 1


def test_configuration_says_all_that_is_wrong() -> None:
    with pytest.raises(ValidationError) as caught:
        CacheConfig.model_validate({"path": "x", "ttl": -1, "max_bytes": "big", "colour": 1})
    assert {error["loc"][0] for error in caught.value.errors()} == {"ttl", "max_bytes", "colour"}
    with pytest.raises(ValidationError, match="max_entry_bytes is 1048576, allowed is at most max_bytes = 65536"):
        CacheConfig(path=Path("x"), max_bytes=65536)
