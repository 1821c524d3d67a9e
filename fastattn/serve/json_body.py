"""Request bodies as JSON, and as nothing looser than JSON: what Python's parser lets through beyond RFC 8259 is refused."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from fastattn.serve.contract import APIError

_MAX_DEPTH = 100


class _WrongError(ValueError):
    pass


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _WrongError(f"the key {twice[:100]!r} is there twice")
    return found


def _constant(name: str) -> NoReturn:
    raise _WrongError(f"{name} is not JSON")


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise _WrongError(f"{text[:40]} is too large")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float)


def parse_json(body: bytes) -> Any:
    """The value in the body. Raises APIError 400 for what is no JSON, repeats a key, or has half a surrogate pair."""
    try:
        text = body.decode("utf-8")
        if text.startswith("\ufeff"):
            raise _WrongError("it begins with a byte order mark")
        value = _DECODER.decode(text)
    except UnicodeDecodeError as error:
        raise _bad(f"it is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise _bad(f"it is nested deeper than {_MAX_DEPTH}") from None
    except ValueError as error:
        raise _bad(str(error).encode("utf-8", "replace").decode()) from None
    _check(value)
    return value


def parse_text(text: str) -> Any:
    """The JSON in a text of a model's or a client's, a tool's arguments say. Half of a surrogate pair, which an escape can bring and
    nobody can send on or store, is a question mark. Raises ValueError, RecursionError."""
    value = json.loads(text)
    if "\\u" not in text:
        return value
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def _check(value: Any) -> None:
    """Depth and texts, without recursion. Numbers are the most of a long list, and need no look."""
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                deeper += item.keys()
                deeper += item.values()
            elif isinstance(item, list):
                deeper += [part for part in item if not isinstance(part, int | float)]
            elif isinstance(item, str):
                try:
                    item.encode()
                except UnicodeEncodeError:
                    raise _bad("a text has half of a surrogate pair") from None
        if not deeper:
            return
        level = deeper
    raise _bad(f"it is nested deeper than {_MAX_DEPTH}")


def _bad(what: str) -> APIError:
    return APIError(400, f"the body is not usable as JSON: {what}", code="invalid_json")
