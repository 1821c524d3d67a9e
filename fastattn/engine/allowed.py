"""What the fields of a configuration may be: a table of checks, each with the words for what it lets through."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

Check = Callable[[Any], bool]
Allowed = Mapping[str, tuple[Check, str]]


def integer(low: int, high: int) -> Check:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def number(low: float, high: float) -> Check:
    """A NaN is in no range."""
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def above_0(high: float, inclusive: bool = False) -> Check:
    in_range = number(0, high)
    return lambda value: in_range(value) and value > 0 and (inclusive or value < high)


def or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def each(check: Check, limit: int) -> Check:
    return lambda values: isinstance(values, Collection) and len(values) <= limit and all(map(check, values))


def text(value: Any) -> bool:
    return isinstance(value, str)


FLAG: tuple[Check, str] = (lambda value: isinstance(value, bool), "True or False")
OPTIONAL_SIZE: tuple[Check, str] = (or_none(integer(1, 2**31 - 1)), "None or an integer from 1 to 2**31 - 1")


def check_fields(config: object, allowed: Allowed, owner: str = "") -> None:
    """Raises ValueError for the first field that is not what the table lets through. owner: who the message says has the field."""
    for name, (check, words) in allowed.items():
        if not check(value := getattr(config, name)):
            raise ValueError(f"{owner}{name} is {value!r}, allowed is {words}")
