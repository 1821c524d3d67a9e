"""A store that is not well: damaged, locked, full, slow, killed, poisoned. Every request is answered all the same."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastattn.serve.cache.database import Database, Entry
from tests.serve.cache.cached import HEADER, answers_all, cache_of, echo, outcomes
from tests.serve.fakes import (
    chat,
    context,
    text,
    wait,
)


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
from tests.serve.cache.cached import answers_all, cache_of, echo, outcomes
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
