"""The cache's SQLite file, for one thread. It believes nothing that it reads: every row carries a digest of itself."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE entries (
    key BLOB PRIMARY KEY, created REAL NOT NULL, expires REAL NOT NULL, used REAL NOT NULL, bytes INTEGER NOT NULL,
    digest BLOB NOT NULL, value BLOB NOT NULL);
CREATE INDEX entries_by_use ON entries (used);
CREATE TABLE questions (
    key BLOB PRIMARY KEY REFERENCES entries ON DELETE CASCADE, partition BLOB NOT NULL, digest BLOB NOT NULL,
    signature BLOB NOT NULL, vector BLOB NOT NULL);
CREATE INDEX questions_by_partition ON questions (partition);
"""
_ROW_BYTES = 256  # about what a row costs beside its value
_TOUCHES_PER_WRITE = 64  # hits are noted together: a hit alone writes nothing


class Entry(msgspec.Struct, frozen=True):
    """An answer. created: Unix seconds. headers: which the parts below had set. chunks: msgpack, in their order."""

    created: float
    headers: dict[str, str]
    chunks: list[msgspec.Raw]


class Question(msgspec.Struct, frozen=True):
    """What semantic lookup compares. partition: hash of everything but the question's text. vector: float32."""

    partition: bytes
    signature: bytes
    vector: bytes


_decode_entry = msgspec.msgpack.Decoder(Entry).decode


class OldSchemaError(sqlite3.DatabaseError):
    """The file is another version's, or no cache at all."""


class Database:
    """Raises sqlite3.Error and OSError; of type sqlite3.DatabaseError itself, or OldSchemaError, when the file is damaged."""

    def __init__(
        self, path: Path, *, max_bytes: int, busy_seconds: float = 0.05, clock: Callable[[], float] = time.time
    ) -> None:
        self._max_bytes, self._clock = max_bytes, clock
        self._touched: dict[bytes, float] = {}
        self.num_damaged = self.num_evicted = 0
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # SQLite would make it with the umask's mode; its -wal takes over the mode that it finds.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
        self._sql = sqlite3.connect(path, timeout=busy_seconds, isolation_level=None, check_same_thread=False)
        try:
            self._prepare()
        except BaseException:
            self._sql.close()
            raise

    def _prepare(self) -> None:
        run = self._sql.execute
        # Exclusive: then WAL needs no shared memory file, which would end the process if somebody cut it short.
        for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON",
                       "trusted_schema = OFF", "cell_size_check = ON", "mmap_size = 0",
                       "journal_size_limit = 16777216"):  # fmt: skip
            run(f"PRAGMA {pragma}")
        run("BEGIN EXCLUSIVE")
        version, tables = (
            run("PRAGMA user_version").fetchone()[0],
            run("SELECT count(*) FROM sqlite_master").fetchone()[0],
        )
        if version == 0 and tables == 0:
            for statement in _SCHEMA.split(";"):
                run(statement)
            run(f"PRAGMA user_version = {SCHEMA_VERSION}")
        elif version != SCHEMA_VERSION:
            raise OldSchemaError(f"its version is {version}, expected {SCHEMA_VERSION}")
        run("COMMIT")
        self._bytes: int = run("SELECT coalesce(sum(bytes), 0) FROM entries").fetchone()[0]

    @property
    def num_bytes(self) -> int:
        return self._bytes

    def get(self, key: bytes, max_age: float | None = None) -> Entry | None:
        """The answer, unless it is too old or not what was stored."""
        row = self._sql.execute("SELECT created, expires, digest, value FROM entries WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        now = self._clock()
        try:
            created, expires, digest, value = row
            if _digest(key, created, expires, value) != digest:
                raise ValueError
            entry = _decode_entry(value)
        except (ValueError, TypeError, msgspec.MsgspecError):  # a damaged column can be of any type
            self.num_damaged += 1
            self.delete(key)
            return None
        if expires <= now:
            self.delete(key)
            return None
        if max_age is not None and now - created > max_age:
            return None
        self._touched[key] = now
        if len(self._touched) >= _TOUCHES_PER_WRITE:
            self._write(lambda: None)
        return entry

    def put(self, key: bytes, entry: Entry, ttl: float, question: Question | None = None) -> None:
        value = msgspec.msgpack.encode(entry)
        expires, size = entry.created + ttl, len(value) + _ROW_BYTES

        def write() -> None:
            self._remove([key])
            digest = _digest(key, entry.created, expires, value)
            row = (key, entry.created, expires, self._clock(), size, digest, value)
            self._sql.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            self._bytes += size
            if question is not None:
                q = question
                digest = _digest(key, q.partition, q.signature, q.vector)
                found = (key, q.partition, digest, q.signature, q.vector)
                self._sql.execute("INSERT OR REPLACE INTO questions VALUES (?, ?, ?, ?, ?)", found)
            self._evict()

        self._write(write)

    def questions(self, partition: bytes, limit: int) -> Iterator[tuple[bytes, Question]]:
        """(key, question) of the latest entries in a partition."""
        rows = self._sql.execute(
            "SELECT key, digest, signature, vector FROM questions WHERE partition = ? ORDER BY rowid DESC LIMIT ?",
            (partition, limit),
        )
        for key, digest, signature, vector in rows:
            try:
                intact = _digest(key, partition, signature, vector) == digest
            except TypeError:
                intact = False
            if intact:
                yield key, Question(partition, signature, vector)
            else:
                self.num_damaged += 1

    def delete(self, key: bytes) -> None:
        self._write(lambda: self._remove([key]))

    def close(self) -> None:
        """Notes the last hits and merges the log into the file."""
        try:
            self._write(lambda: None)
        finally:
            self._sql.close()

    def abandon(self) -> None:
        """Lets go of a file that has failed, without another write to it."""
        self._sql.close()

    def _write(self, change: Callable[[], None]) -> None:
        """One transaction: the change, and the hits since the last one. Undone as a whole if it fails."""
        before = self._bytes
        self._sql.execute("BEGIN IMMEDIATE")
        try:
            self._sql.executemany(
                "UPDATE entries SET used = ? WHERE key = ?", [(t, k) for k, t in self._touched.items()]
            )
            change()
            self._sql.execute("COMMIT")
        except BaseException:
            self._bytes = before
            if self._sql.in_transaction:
                self._sql.execute("ROLLBACK")
            raise
        self._touched.clear()

    def _evict(self) -> None:
        if self._bytes <= self._max_bytes:
            return
        self._bytes = self._sql.execute("SELECT coalesce(sum(bytes), 0) FROM entries").fetchone()[0]
        gone, free = [], self._bytes - self._max_bytes * 9 // 10  # some room, or each answer would evict one
        for key, size in self._sql.execute(
            "SELECT key, bytes FROM entries ORDER BY (expires > ?), used", (self._clock(),)
        ):
            if free <= 0:
                break
            gone.append(key)
            free -= size
        self._remove(gone)
        self.num_evicted += len(gone)

    def _remove(self, keys: list[bytes]) -> None:
        for key in keys:
            row = self._sql.execute("SELECT bytes FROM entries WHERE key = ?", (key,)).fetchone()
            if row is not None:
                self._sql.execute("DELETE FROM entries WHERE key = ?", (key,))
                self._bytes -= row[0]
            self._touched.pop(key, None)


def _digest(*parts: bytes | float) -> bytes:
    """Of a row, with its key: a value that slipped to another row is noticed too."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else repr(float(part)).encode()
        total.update(len(data).to_bytes(8, "little") + data)
    return total.digest()
