"""When greedy texts of two backends count as the same."""

from __future__ import annotations

import math

from bench.harness.greedy import Text, complaint, least_same, parting


def text(*best: list[tuple[int, float]]) -> Text:
    return {"tokens": [rows[0][0] for rows in best], "best": list(best)}


FIRST = [(7, 5.0), (8, 1.0)]


def test_the_same_texts() -> None:
    assert parting(text(FIRST), text(FIRST)) is None
    assert complaint([text(FIRST)], [text(FIRST)], [text(FIRST)]) is None


def test_distances_of_both_add_up() -> None:
    """From 2 to 4 a step of bf16 is 1/64, from 16 on 1/8."""
    a, b = text(FIRST, [(1, 3.5), (2, 3.484375)]), text(FIRST, [(2, 3.5), (1, 3.46875)])
    found = parting(a, b)
    assert found is not None
    assert (found.at, found.tokens, found.steps) == (1, (1, 2), 3.0)
    assert complaint([a], [b], [a]) is None
    found = parting(text([(1, 17.0), (2, 16.875)]), text([(2, 17.0), (1, 17.0)]))
    assert found is not None
    assert found.steps == 1.0


def test_what_is_no_near_tie_is_said() -> None:
    """Even where one of the two has a tie."""
    tie, clear = text([(1, 3.5), (2, 3.5)]), text([(2, 3.5), (1, 3.40625)])
    assert complaint([tie], [clear], [clear]) == "token 0 is 1 and 2, 6.0 steps apart, expected at most 4.0"
    found = parting(text([(1, 3.5), (9, 3.5)]), clear)
    assert found is not None
    assert math.isinf(found.steps), "the other's token is not among the best"


def test_texts_part_no_more_often_than_another_backends() -> None:
    tie, other = text([(1, 3.5), (2, 3.5)]), text([(2, 3.5), (1, 3.5)])
    assert least_same(32, 32) == 28
    assert least_same(20, 32) == 9  # 20 less three times 3.89
    assert complaint([other] * 24 + [tie] * 8, [tie] * 32, [other] * 12 + [tie] * 20) == (
        "8 of 32 texts are the same, expected at least 9"
    )
    assert complaint([other] * 23 + [tie] * 9, [tie] * 32, [other] * 12 + [tie] * 20) is None
