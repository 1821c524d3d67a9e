"""Greedy texts of two backends: whether they part only where two tokens are as good as equal, and no more often than chance
has it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

# Of bf16's steps at those logits. Where two texts part, each backend puts its own token in front of the other's; the two
# distances add up to the errors of four logits. Each may be off by one step: half of it its own rounding to bf16, the other
# half what the hidden states behind it, which are bf16 too, bring.
NEAR_TIE = 4.0


class Text(TypedDict):
    tokens: list[int]
    best: list[list[tuple[int, float]]]  # at each token the best ones and their logits, the largest first


@dataclass(frozen=True)
class Parting:
    """Two texts' first different token; steps: by how much they disagree on the two, in steps of bf16."""

    at: int
    tokens: tuple[int, int]
    steps: float


def _ahead(text: Text, at: int, other: int) -> float:
    """Of a text's token to another one, in steps; inf if that is not among the best."""
    logits = dict(text["best"][at])
    if other not in logits:
        return math.inf
    own = logits[text["tokens"][at]]
    largest = max(abs(own), abs(logits[other]), 2.0**-126)
    return (own - logits[other]) / 2.0 ** (math.floor(math.log2(largest)) - 7)


def parting(a: Text, b: Text) -> Parting | None:
    """None if they are the same."""
    for at, (x, y) in enumerate(zip(a["tokens"], b["tokens"], strict=True)):
        if x != y:
            return Parting(at, (x, y), _ahead(a, at, y) + _ahead(b, at, x))
    return None


def partings(ours: list[Text], theirs: list[Text]) -> list[Parting]:
    return [found for a, b in zip(ours, theirs, strict=True) if (found := parting(a, b)) is not None]


def least_same(yardstick: int, texts: int) -> int:
    """How many of ours must be the same, if of another backend so many are: three standard deviations of the difference of
    two such counts below, by the rule of succession, since of few texts all may be the same by chance."""
    share = (yardstick + 1) / (texts + 2)
    return math.ceil(yardstick - 3 * math.sqrt(2 * texts * share * (1 - share)))


def complaint(ours: list[Text], theirs: list[Text], yardstick: list[Text]) -> str | None:
    """What is wrong with ours beside theirs, if anything is. yardstick: of another backend."""
    found = partings(ours, theirs)
    for p in found:
        if p.steps > NEAR_TIE:
            return (
                f"token {p.at} is {p.tokens[0]} and {p.tokens[1]}, {p.steps} steps apart, expected at most {NEAR_TIE}"
            )
    same, least = len(ours) - len(found), least_same(len(ours) - len(partings(yardstick, theirs)), len(ours))
    return f"{same} of {len(ours)} texts are the same, expected at least {least}" if same < least else None
