"""What was done to a model: a receipt.json beside its weights, so that nobody has to remember."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastattn
from fastattn.compress.output import RECEIPT
from fastattn.models.loader import ModelSource

_CHUNK = 1 << 22
_HASHED = (".json", ".safetensors", ".jinja")


def source_digest(source: ModelSource) -> str:
    """SHA-256 over a model's files, or over names and values of its tensors where it has none."""
    found = hashlib.sha256()
    path = Path(source.name)
    if path.exists():
        files = (
            [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in _HASHED and f.name != RECEIPT)
        )
        for file in files:
            found.update(file.name.encode() + b"\0" if path.is_dir() else b"")
            with file.open("rb") as stream:
                while block := stream.read(_CHUNK):
                    found.update(block)
    else:
        for name, info in sorted(source.tensors().items()):
            values = torch.empty(info.shape)
            source.read(name, values)
            found.update(f"{name} {info.shape}\0".encode())
            found.update(values.numpy().tobytes())
    return f"sha256:{found.hexdigest()}"


def versions() -> dict[str, str]:
    found = {"fastattn": fastattn.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read_receipt(folder: Path) -> dict[str, Any] | None:
    """The receipt of a model folder; None if it has none. Raises ValueError for one that is no JSON object."""
    path = folder / RECEIPT
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return found


def amend_receipt(folder: Path, more: Mapping[str, Any]) -> None:
    """Adds what became known later, such as an evaluation. The receipt is replaced whole."""
    path = folder / RECEIPT
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps({**(read_receipt(folder) or {}), **more}, indent=2) + "\n", encoding="utf-8")
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.rename(path)
