"""A model folder in the making: whole or not there, and never lost halfway.

Everything is written into ``OUT.partial`` beside OUT, each file under another name first, synced, then renamed. A shard that
stands under its own name is whole, so the shards themselves say how far a job got, and the same job started again goes on
after the last one. At the end the folder is renamed to OUT. Where OUT is replaced it first steps aside to ``.OUT.replaced``,
and steps back if the program ends between the two renames.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

logger = logging.getLogger("fastattn.compress")

INDEX = "model.safetensors.index.json"
RECEIPT = "receipt.json"
_JOB = "job.json"
_LOCK = "lock"


class OutputFolder:
    """out: the folder to make. job: what is being done, as JSON; only the same job is resumed, another starts over.
    num_shards: how many there will be. force: replace a model folder that is there.

    Use as a context manager: it holds a lock, since two writers would mix their files. Raises ValueError for a folder that
    may not be written.
    """

    def __init__(self, out: Path, job: Mapping[str, Any], num_shards: int, force: bool = False) -> None:
        self.out = Path(os.path.realpath(out))  # what a link leads to is made, so that the link stays
        self.partial = self.out.with_name(self.out.name + ".partial")
        self._replaced = self.out.with_name(f".{self.out.name}.replaced")
        self._job, self.num_shards = json.loads(json.dumps(job)), num_shards
        self._lock: int | None = None
        self.resumed = False
        if self._replaced.exists() and not self.out.exists():
            self._replaced.rename(self.out)  # killed between the two renames: what was there is there again
        check_free(self.out, force)

    def __enter__(self) -> OutputFolder:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.partial.mkdir(exist_ok=True)
        self._lock = os.open(self.partial / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._resume()
        except BaseException as error:
            os.close(self._lock)
            if isinstance(error, BlockingIOError):
                raise ValueError(f"{self.partial}: another process is writing there") from None
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        assert self._lock is not None
        os.close(self._lock)

    def _resume(self) -> None:
        path = self.partial / _JOB
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                found = None
            if found == self._job:
                self.resumed = True
                for entry in self.partial.iterdir():  # files that a kill cut short; safetensors calls its own .tmp…
                    if entry.name.startswith(".tmp") or entry.suffix == ".tmp":
                        entry.unlink()
                if done := sum(self.has_shard(i) for i in range(self.num_shards)):
                    logger.warning("%s: going on after %d of %d shards", self.partial, done, self.num_shards)
                return
            logger.warning("%s: left by a job with other settings, starting over", self.partial)
        elif foreign := sorted({entry.name for entry in self.partial.iterdir()} - {_LOCK, f"{_JOB}.tmp"}):
            raise ValueError(f"{self.partial}: is no job of ours (it has {foreign[0]} and no {_JOB}), move it away")
        for entry in self.partial.iterdir():
            if entry.name not in (_LOCK, _JOB):  # the job is replaced last: with it the folder is known as ours
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self.write_text(_JOB, json.dumps(self._job, indent=2) + "\n")

    # ---- shards ----

    def shard_name(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{self.num_shards:05d}.safetensors"

    def has_shard(self, index: int) -> bool:
        return (self.partial / self.shard_name(index)).is_file()

    def write_shard(self, index: int, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
        """record: what the receipt will say of these tensors; it lives in the shard, so that both are there or neither."""
        # Copies: stacked matrices are views of one memory, and a scale may stand under several names.
        whole = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        metadata = {"format": "pt", "fastattn": json.dumps(record)}
        self._write(self.shard_name(index), lambda path: save_file(whole, path, metadata))

    def read_shard(self, index: int) -> dict[str, torch.Tensor]:
        with safe_open(self.partial / self.shard_name(index), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping

    def records(self) -> list[dict[str, Any]]:
        """What was recorded with each shard, in order."""
        found = []
        for index in range(self.num_shards):
            with safe_open(self.partial / self.shard_name(index), framework="pt") as file:
                found.append(json.loads(file.metadata()["fastattn"]))
        return found

    # ---- files ----

    def write_text(self, name: str, text: str) -> None:
        self._write(name, lambda path: Path(path).write_text(text, encoding="utf-8"))

    def write_tensors(self, name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        """Tensors that a job needs to go on, and that its output does not hold; see `discard`."""
        self._write(name, lambda path: save_file(dict(tensors), path, dict(metadata)))

    def discard(self, name: str) -> None:
        (self.partial / name).unlink(missing_ok=True)

    def _write(self, name: str, write: Callable[[str], Any]) -> None:
        assert self._lock is not None
        temporary = self.partial / f"{name}.tmp"
        try:
            write(str(temporary))
        except SafetensorError as error:  # what the library makes of a full disk
            raise OSError(f"{temporary}: {error}") from None
        # It also keeps its files from everybody else; the lock has the mode that new files have here.
        temporary.chmod(os.fstat(self._lock).st_mode & 0o777)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(self.partial / name)
        _sync_folder(self.partial)

    # ---- the end ----

    def finish(self, files: Mapping[str, str], receipt: Mapping[str, Any]) -> Path:
        """Writes the index, ``files`` and the receipt, and puts the folder in its place. Every shard must be there."""
        weight_map: dict[str, str] = {}
        total = 0
        for index in range(self.num_shards):
            name = self.shard_name(index)
            with safe_open(self.partial / name, framework="pt") as file:
                weight_map |= dict.fromkeys(file.keys(), name)
            total += _tensor_bytes(self.partial / name)
        self.write_text(INDEX, _json({"metadata": {"total_size": total}, "weight_map": weight_map}))
        for name, text in files.items():
            self.write_text(name, text)
        self.write_text(RECEIPT, _json({**receipt, "bytes": {**receipt.get("bytes", {}), "after": total}}))
        if self.out.exists():
            if self._replaced.exists():
                shutil.rmtree(self._replaced)
            self.out.rename(self._replaced)
        self.partial.rename(self.out)
        _sync_folder(self.out.parent)
        for name in (_JOB, _LOCK):
            (self.out / name).unlink()
        if self._replaced.exists():
            shutil.rmtree(self._replaced)
        return self.out


def check_free(out: Path, force: bool, *read: str) -> None:
    """Raises ValueError if ``out`` is there and may not be replaced. read: paths of the models that the job reads."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise ValueError(f"{out}: is there already; --force replaces it when the new one is whole")
    if not (out / "config.json").is_file():
        raise ValueError(f"{out}: is not a model folder (it has no config.json), so it is not replaced")
    for path in read:
        if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(out)):
            raise ValueError(
                f"{out}: holds the model that is read ({path}), so it is not replaced; write to another folder"
            )


def _tensor_bytes(path: Path) -> int:
    """Bytes of the tensors in a safetensors file: all but the header."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
