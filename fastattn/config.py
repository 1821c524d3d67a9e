"""Environment variables, read here and nowhere else, parsed strictly: a typo is an error, never a silent default."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
D = TypeVar("D")
logger = logging.getLogger("fastattn")

_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def _parse_bool(text: str) -> bool:
    if text in ("0", "1"):
        return text == "1"
    raise ValueError("expected 0 or 1")


def _parse_log_level(text: str) -> str:
    if text.upper() in _LOG_LEVELS:
        return text.upper()
    raise ValueError(f"expected one of {', '.join(_LOG_LEVELS)}")


def _parse_path(text: str) -> Path:
    with suppress(RuntimeError):  # of a home that there is not
        path = Path(text).expanduser()
        if path.is_absolute():
            return path
    raise ValueError("expected an absolute path")


def _parse_text(text: str) -> str:
    if text.strip() and text.isprintable():
        return text.strip()
    raise ValueError("expected a text without line breaks, or no such variable")


def _parse_count(text: str) -> int:
    if text.isascii() and text.isdigit():
        return int(text)
    raise ValueError("expected a whole number")


def _read(name: str, parse: Callable[[str], T], default: D) -> T | D:
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"environment variable {name} is {text!r}, {error}") from None


@functools.cache
def validate_inputs() -> bool:
    """FASTATTN_VALIDATE_INPUTS=1: check the values in CUDA index tensors too. Each check waits for the GPU.

    Cached because it is asked on every operator call: the variable is read once per process.
    """
    return _read("FASTATTN_VALIDATE_INPUTS", _parse_bool, False)


@functools.cache
def log_level() -> str:
    """FASTATTN_LOGLEVEL: one of Python's level names, WARNING when unset."""
    return _read("FASTATTN_LOGLEVEL", _parse_log_level, "WARNING")


def serve_settings(names: Iterable[str]) -> dict[str, str]:
    """FASTATTN_PORT and its like: for each setting of `fastattn serve` the variable of its name in capitals, if it is set.

    Kubernetes sets FASTATTN_PORT to an address for a service named fastattn: that is not meant for us, and is left out.
    """
    found = {name: os.environ[f"FASTATTN_{name.upper()}"] for name in names if f"FASTATTN_{name.upper()}" in os.environ}
    if "://" in found.get("port", ""):
        logger.warning("FASTATTN_PORT is %r, which is no number: ignored, Kubernetes sets it", found.pop("port"))
    return found


@functools.cache
def cache_dir() -> Path:
    """FASTATTN_CACHE_DIR: where fetched models are kept, and what Python compiled of torch; `~/.cache/fastattn` when unset. Raises
    FileNotFoundError without both."""
    given = _read("FASTATTN_CACHE_DIR", _parse_path, None)
    if given is not None:
        return given
    try:
        return Path.home() / ".cache" / "fastattn"
    except RuntimeError:  # a user of a container, known to nobody
        raise FileNotFoundError(
            "this user has no home directory: set environment variable FASTATTN_CACHE_DIR to an absolute path"
        ) from None


def torchrun_place() -> tuple[int, int] | None:
    """RANK and WORLD_SIZE, as torchrun sets them: this process's rank, and how many there are. None outside of torchrun."""
    rank, size = _read("RANK", _parse_count, None), _read("WORLD_SIZE", _parse_count, None)
    if rank is None or size is None:
        return None
    if rank >= size:
        raise ValueError(f"environment variable RANK is {rank}, expected less than WORLD_SIZE = {size}")
    return rank, size


def openai_base_url() -> str | None:
    """OPENAI_BASE_URL: the server that our client commands talk to, such as http://127.0.0.1:8000/v1."""
    return _read("OPENAI_BASE_URL", _parse_text, None)


def openai_api_key() -> str | None:
    """OPENAI_API_KEY: what our client commands show that server."""
    try:
        return _read("OPENAI_API_KEY", _parse_text, None)
    except ValueError:  # the message must not quote a secret
        raise ValueError("environment variable OPENAI_API_KEY is no text without line breaks") from None
