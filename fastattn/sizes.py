"""Counts as vLLM writes them on its command line."""

from __future__ import annotations

import re

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kmgtKMGT]?)")


def parse_size(text: str | int) -> int:
    """Small letters are powers of 1000 ("1.5m" = 1500000), capitals of 1024 ("32K" = 32768). Raises ValueError."""
    match = _SIZE.fullmatch(str(text).strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size, expected a number such as 4096, 32K, 1k or 1.5m")
    value = float(match[1]) * _FACTORS[match[2]] if "." in match[1] else int(match[1]) * _FACTORS[match[2]]
    if value != int(value) or value < 1:
        raise ValueError(f"{text!r} is not a positive whole number")
    return int(value)
