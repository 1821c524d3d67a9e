"""Reads the header of a GGUF file, trusting nothing in it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count, length, offset and size is checked against
the file before it is used: a file from the internet is hostile until it has been measured. Python's integers do not
overflow, and nothing here indexes memory that was not checked, so the worst outcome is a ModelFileError.
"""

from __future__ import annotations

import mmap
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from fastattn.models.loader.errors import ModelFileError
from fastattn.models.loader.gguf_blocks import BLOCK_TYPES, BlockType

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMPY = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    10: "<u8",
    11: "<i8",
    12: "<f8",
    _BOOL: "<u1",
}

# Far above every real model; a file that claims more is damaged, and believing it would cost memory.
_MAX_ENTRIES = 1 << 16
_MAX_ARRAY = 1 << 22
_MAX_STRING = 1 << 24
_MAX_NAME = 1 << 12
_MAX_DIMS = 4


@dataclass(frozen=True)
class GGUFTensor:
    """shape: rows first, as torch has it. data: the stored bytes, (rows, bytes per row) uint8, a view of the file: not to be
    written to."""

    name: str
    shape: tuple[int, ...]
    block_type: BlockType
    data: torch.Tensor


@dataclass(frozen=True)
class GGUFFile:
    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]


class _Cursor:
    """Walks through the header; every step forward is checked."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path, self.buffer, self.size = path, buffer, len(buffer)
        self.at = 0

    def fail(self, what: str) -> NoReturn:
        raise ModelFileError(f"{self.path}: {what}")

    def take(self, num_bytes: int, what: str) -> int:
        """Start of the next ``num_bytes``, which are skipped."""
        start = self.at
        if num_bytes > self.size - start:
            self.fail(f"{what} at byte {start} needs {num_bytes} bytes, the file has {self.size - start} left")
        self.at += num_bytes
        return start

    def scalar(self, code: str, what: str) -> Any:
        return struct.unpack_from(code, self.buffer, self.take(struct.calcsize(code), what))[0]

    def count(self, what: str, limit: int) -> int:
        value: int = self.scalar("<Q", what)
        if value > limit:
            self.fail(f"{what} is {value}, allowed is up to {limit}")
        return value

    def string(self, what: str, limit: int = _MAX_STRING) -> str:
        length = self.count(f"length of {what}", limit)
        start = self.take(length, what)
        try:
            return self.buffer[start : start + length].decode()
        except UnicodeDecodeError:
            self.fail(f"{what} at byte {start} is not UTF-8")

    def value(self, what: str) -> Any:
        kind = self.scalar("<I", f"type of {what}")
        if kind == _STRING:
            return self.string(what)
        if kind == _BOOL:
            return bool(self.scalar("<B", what))
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what)
        if kind != _ARRAY:
            self.fail(f"type of {what} is {kind}, allowed is 0 to 12")
        item = self.scalar("<I", f"item type of {what}")
        length = self.count(f"length of {what}", _MAX_ARRAY)
        if item == _STRING:
            return self.strings(length, what)
        if item not in _NUMPY:  # arrays of arrays are in the format, but no model uses them
            self.fail(f"item type of {what} is {item}, supported are numbers and strings")
        dtype = np.dtype(_NUMPY[item])
        start = self.take(length * dtype.itemsize, what)
        return np.frombuffer(self.buffer, dtype, length, start).copy()

    def strings(self, length: int, what: str) -> list[str]:
        # A vocabulary has a quarter of a million of them: the loop is as short as it can be, with the same checks.
        out: list[str] = []
        buffer, size, at, unpack = self.buffer, self.size, self.at, struct.Struct("<Q").unpack_from
        for _ in range(length):
            if at + 8 > size or (end := at + 8 + unpack(buffer, at)[0]) > size:
                self.fail(f"{what}[{len(out)}] at byte {at} goes past the end of the file, {size} bytes")
            try:
                out.append(buffer[at + 8 : end].decode())
            except UnicodeDecodeError:
                self.fail(f"{what}[{len(out)}] at byte {at} is not UTF-8")
            at = end
        self.at = at
        return out


def read_gguf(path: Path) -> GGUFFile:
    """Maps the file and reads its header. Raises ModelFileError, naming what was expected and found."""
    try:
        with path.open("rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ModelFileError(f"{path}: cannot be read ({error})") from None
    cursor = _Cursor(path, buffer)
    magic = bytes(buffer[:4])
    if magic != b"GGUF":
        cursor.fail(f"begins with {magic!r}, expected b'GGUF'")
    cursor.at = 4
    version = cursor.scalar("<I", "version")
    if version not in (2, 3):
        cursor.fail(f"GGUF version is {version}, supported are 2 and 3 (little endian)")
    num_tensors = cursor.count("number of tensors", _MAX_ENTRIES)
    num_entries = cursor.count("number of metadata entries", _MAX_ENTRIES)
    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        key = cursor.string("a metadata key", _MAX_NAME)
        if key in metadata:
            cursor.fail(f"metadata {key!r} stands twice")
        metadata[key] = cursor.value(f"metadata {key!r}")
    return GGUFFile(path, metadata, _read_tensors(cursor, num_tensors, metadata))


def _read_tensors(cursor: _Cursor, num_tensors: int, metadata: Mapping[str, Any]) -> dict[str, GGUFTensor]:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        cursor.fail(f"general.alignment is {alignment!r}, allowed is a power of two from 8 to 65536")
    headers = []
    for _ in range(num_tensors):
        name = cursor.string("a tensor name", _MAX_NAME)
        num_dims = cursor.scalar("<I", f"dimensions of {name}")
        if not 1 <= num_dims <= _MAX_DIMS:
            cursor.fail(f"tensor {name} has {num_dims} dimensions, allowed is 1 to {_MAX_DIMS}")
        shape = tuple(cursor.scalar("<Q", f"shape of {name}") for _ in range(num_dims))[::-1]
        kind, offset = cursor.scalar("<I", f"type of {name}"), cursor.scalar("<Q", f"offset of {name}")
        headers.append((name, shape, kind, offset))
    data_start = -(-cursor.at // alignment) * alignment
    with warnings.catch_warnings():  # torch has no read-only tensors; nobody writes to this one
        warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
        file = torch.frombuffer(cursor.buffer, dtype=torch.uint8)
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in headers:
        if name in tensors:
            cursor.fail(f"tensor {name} stands twice")
        block_type = BLOCK_TYPES.get(kind)
        if block_type is None:
            cursor.fail(f"tensor {name} has unknown type {kind}")
        if 0 in shape or shape[-1] % block_type.numbers:
            cursor.fail(
                f"tensor {name} has shape {shape}, expected rows of a multiple of {block_type.numbers} for {block_type.name}"
            )
        row_bytes = shape[-1] // block_type.numbers * block_type.nbytes
        num_rows = prod(shape[:-1])
        if offset % alignment:
            cursor.fail(f"tensor {name} has offset {offset}, expected a multiple of {alignment}")
        start, num_bytes = data_start + offset, num_rows * row_bytes
        if start + num_bytes > cursor.size:
            cursor.fail(f"tensor {name} ends at byte {start + num_bytes}, the file has {cursor.size}")
        data = file[start : start + num_bytes].view(num_rows, row_bytes)
        tensors[name] = GGUFTensor(name, shape, block_type, data)
    return tensors
