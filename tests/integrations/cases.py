"""Families of cases: each names its axes and checks one case; cases are drawn from the axes, or all of them are taken."""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

Case = dict[str, Any]
Check = Callable[..., None]
FAMILIES: dict[str, tuple[dict[str, list[Any]], Check]] = {}

MEMORY = 2**28  # elements of the score matrix that the reference may make


def family(**axes: list[Any]) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        FAMILIES[check.__name__] = axes, check
        return check

    return register


def size(case: Case) -> int:
    num_queries, num_keys = case["seqlens"] if "seqlens" in case else (case["seqlen"], case["seqlen"])
    return int(num_queries * num_keys)


def exists(case: Case) -> bool:
    """Pages exclude rows of the cache and left padding, and rotation wants new keys."""
    paged = case.get("block_size") is not None and (case.get("batch_idx") or case.get("leftpad"))
    return not paged and (case.get("new_kv", True) or case.get("rotary_fraction", 0) == 0)


def whole(name: str) -> Iterator[Case]:
    axes, _ = FAMILIES[name]
    for values in itertools.product(*axes.values()):
        case = dict(zip(axes, values, strict=True))
        if exists(case) and size(case) * 24 <= MEMORY:
            yield case


def drawn(name: str, count: int, largest: int, dtypes: list[torch.dtype]) -> list[Case]:
    """Every value of an axis about as often as the others."""
    axes, _ = FAMILIES[name]
    rng, out = random.Random(zlib.crc32(name.encode())), []
    while len(out) < count:
        case = {axis: rng.choice(dtypes if axis == "dtype" else values) for axis, values in axes.items()}
        if exists(case) and size(case) <= largest:
            out.append(case)
    return out


def seeded(case: Case) -> random.Random:
    seed = zlib.crc32(repr(sorted(case.items(), key=lambda item: item[0])).encode())
    torch.manual_seed(seed)
    return random.Random(seed)


def label(case: Case) -> str:
    return " ".join(f"{axis}={value}" for axis, value in case.items()).replace("torch.", "")
