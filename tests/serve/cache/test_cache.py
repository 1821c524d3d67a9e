"""The response cache: what it shares, with whom, and for how long."""

from __future__ import annotations

import asyncio
import os
import random
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fastattn.serve.cache import CacheConfig, ResponseCache
from fastattn.serve.cache.database import Database, Entry
from tests.serve.cache.cached import HEADER, cache_of, echo, outcomes, said
from tests.serve.fakes import (
    ask,
    chat,
    completion,
    context,
    saying,
    text,
    text_of,
    wait,
)


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
    outcomes = said(cache_of(tmp_path, saying("x")), (request_, context()), (request_, context()))
    assert outcomes == (["miss", "hit"] if kept else ["bypass", "bypass"])


def test_sampled_answers_are_kept_when_asked_for(tmp_path: Path) -> None:
    cache, request = cache_of(tmp_path, saying("x"), cache_sampled=True), chat(temperature=1.0)
    assert said(cache, (request, context()), (request, context())) == ["miss", "hit"]


@pytest.mark.parametrize(
    ("directives", "outcome", "calls"),
    [((), "hit", 1), (("no-store",), "bypass", 2), (("no-cache",), "miss", 2), (("max-age=60",), "hit", 1),
     (("max-age=0",), "miss", 2), (("max-age=soon",), "miss", 2)],
)  # fmt: skip
def test_cache_control(tmp_path: Path, directives: tuple[str, ...], outcome: str, calls: int) -> None:
    inner = saying("x")

    asked = (chat(), context()), (chat(), context("", *directives))
    assert said(cache_of(tmp_path, inner), *asked, pause=0.01) == ["miss", outcome]
    assert inner.num_calls == calls


def test_no_store_leaves_nothing_behind(tmp_path: Path) -> None:
    asked = (chat(), context("", "no-store")), (chat(), context())
    assert said(cache_of(tmp_path, saying("x")), *asked) == ["bypass", "miss"]


def test_unknown_models_are_not_kept(tmp_path: Path) -> None:
    cache = ResponseCache(CacheConfig(path=tmp_path / "c"), saying("x"), lambda model: None)
    assert said(cache, (chat(), context())) == ["bypass"]


def test_entries_grow_old(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, saying("x"), ttl=0.05)
    assert said(cache, (chat(), context()), (chat(), context()), pause=0.06) == ["miss", "miss"]


def test_text_that_is_no_unicode_passes_by(tmp_path: Path) -> None:
    request = chat().model_copy(update={"user": "\ud800"})
    assert said(cache_of(tmp_path, saying("x")), (request, context())) == ["bypass"]


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
    cache = cache_of(tmp_path, saying("x" * 3000), max_entry_bytes=2048)
    assert said(cache, (chat(), context()), (chat(), context())) == ["miss", "miss"]


def test_configuration_says_all_that_is_wrong() -> None:
    with pytest.raises(ValidationError) as caught:
        CacheConfig.model_validate({"path": "x", "ttl": -1, "max_bytes": "big", "colour": 1})
    assert {error["loc"][0] for error in caught.value.errors()} == {"ttl", "max_bytes", "colour"}
    with pytest.raises(ValidationError, match="max_entry_bytes is 1048576, allowed is at most max_bytes = 65536"):
        CacheConfig(path=Path("x"), max_bytes=65536)
