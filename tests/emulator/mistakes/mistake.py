"""What a mistake in a kernel is: some text of one of its headers, and what stands there instead."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Header:
    path: str  # in csrc
    kernel: str  # whose calls go through it


@dataclass(frozen=True)
class Mistake:
    name: str
    header: Header
    before: str
    after: str
    unit: str  # that is compiled with it
    size: str  # of the calls: a head dim, or rows of a tile, or 1 for those with turns, 2 with stream-K, 3 in order
    finds: str  # what the report says, at least
    call: int = 0  # one that shows it, if the first few do not: only a hint, which saves a search of up to 300 calls
