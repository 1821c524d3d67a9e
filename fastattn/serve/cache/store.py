"""The database behind a thread, so that neither a slow disk nor a broken file is ever felt by a request."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from fastattn.serve.cache.config import CacheConfig
from fastattn.serve.cache.database import Database, Entry, Question
from fastattn.serve.cache.metrics import CacheMetrics

logger = logging.getLogger("fastattn.serve.cache")
T = TypeVar("T")
_MAX_PENDING = 256  # calls that wait for the disk; more are left out


class Store:
    """Answers None whatever goes wrong: too slow, locked, full, read-only, damaged. What failed is left alone for
    `retry_seconds`. A damaged file is renamed aside, once; if the next one is damaged as well, the cache stays off."""

    def __init__(self, config: CacheConfig, metrics: CacheMetrics) -> None:
        self._config, self._metrics = config, metrics
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastattn-cache")
        self._database: Database | None = None  # the thread's
        self._off_until = 0.0
        self._renamed = False
        self._warned: set[str] = set()
        self._lock, self._pending = threading.Lock(), 0
        self._closed = False

    async def get(self, key: bytes, max_age: float | None = None) -> Entry | None:
        return await self._ask(lambda db: db.get(key, max_age))

    async def questions(self, partition: bytes) -> list[tuple[bytes, Question]] | None:
        semantic = self._config.semantic
        assert semantic is not None
        return await self._ask(lambda db: list(db.questions(partition, semantic.max_candidates)))

    def put(self, key: bytes, entry: Entry, question: Question | None = None) -> None:
        """Soon; nobody waits for it."""
        self._submit(lambda db: db.put(key, entry, self._config.ttl, question))

    def delete(self, key: bytes) -> None:
        self._submit(lambda db: db.delete(key))

    async def flush(self) -> None:
        """Waits for what was put before."""
        if (future := self._submit(lambda db: None)) is not None:
            await asyncio.wrap_future(future)

    async def close(self) -> None:
        self._closed = True
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown()

    @property
    def is_off(self) -> bool:
        return time.monotonic() < self._off_until

    async def _ask(self, call: Callable[[Database], T]) -> T | None:
        future = self._submit(call)
        if future is None:
            return None
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._config.lookup_timeout)
        except asyncio.TimeoutError:
            self._fail("slow", f"it took more than {self._config.lookup_timeout} s to answer")
            return None

    def _submit(self, call: Callable[[Database], T]) -> Future[T | None] | None:
        if self._closed or self.is_off or self._pending >= _MAX_PENDING:
            return None
        with self._lock:
            self._pending += 1
        future = self._thread.submit(self._run, call)
        future.add_done_callback(self._one_less)
        return future

    def _one_less(self, _: object) -> None:
        with self._lock:
            self._pending -= 1

    def _run(self, call: Callable[[Database], T]) -> T | None:
        if self.is_off:  # it failed while this waited
            return None
        try:
            if self._database is None:
                self._database = Database(self._config.path, max_bytes=self._config.max_bytes)
            result = call(self._database)
        except (sqlite3.Error, OSError) as error:
            self._broken(error)
            return None
        except Exception:  # a bug of ours, which is no reason to fail a request either
            logger.exception("response cache %s", self._config.path)
            self._fail("internal error", "see above")
            return None
        self._metrics.observe(self._database)
        return result

    def _broken(self, error: Exception) -> None:
        if self._database is not None:
            try:
                self._database.abandon()
            except sqlite3.Error as again:
                logger.debug("response cache %s: while closing it: %s", self._config.path, again)
            self._database = None
        if not _is_damage(error):
            self._fail("unusable", str(error))
        elif self._renamed:
            self._fail("damaged again", str(error), seconds=float("inf"))
        else:
            self._renamed = True
            self._rename_aside(error)

    def _rename_aside(self, why: Exception) -> None:
        path = self._config.path
        aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        try:
            for suffix in ("", "-wal", "-journal"):
                part = Path(f"{path}{suffix}")
                if part.exists():
                    part.rename(f"{aside}{suffix}")
        except OSError as error:
            self._fail("damaged", f"{why}; it could not be renamed: {error}", seconds=float("inf"))
            return
        self._metrics.failures.labels("damaged").inc()
        logger.warning("response cache %s: %s; it is kept as %s, a new one is begun", path, why, aside.name)

    def _fail(self, kind: str, why: str, seconds: float | None = None) -> None:
        self._off_until = time.monotonic() + (self._config.retry_seconds if seconds is None else seconds)
        self._metrics.failures.labels("damaged" if kind.startswith("damaged") else kind).inc()
        level = logging.DEBUG if kind in self._warned else logging.WARNING
        self._warned.add(kind)
        how_long = "until the next start" if seconds is not None else f"for {self._config.retry_seconds:g} s"
        logger.log(level, "response cache %s: %s; requests go on without it %s", self._config.path, why, how_long)

    def _close(self) -> None:
        if self._database is not None:
            try:
                self._database.close()
            except (sqlite3.Error, OSError) as error:
                logger.warning("response cache %s: while closing it: %s", self._config.path, error)
            self._database = None


def _is_damage(error: Exception) -> bool:
    """Whether the file's content is wrong. Locked, full, read-only and lost disks are OperationalErrors."""
    if isinstance(error, sqlite3.OperationalError):
        return str(error).startswith("no such")  # table or column, in a file that claims our version
    return isinstance(error, sqlite3.DatabaseError)
