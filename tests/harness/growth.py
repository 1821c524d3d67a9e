"""How the time of something grows with its size, on a machine that others use too."""

from __future__ import annotations

import math
from collections.abc import Callable


def assert_grows_less(seconds: Callable[[int], float], small: int, large: int, factor: float) -> None:
    """The large size takes less than `factor` times as long as the small one: the best of rounds, in which both take turns."""
    few = many = math.inf
    for _ in range(6):
        few = min(few, *(seconds(small) for _ in range(5)))
        many = min(many, seconds(large))
        if many < factor * few:
            break
    assert many < factor * few, f"{small}: {few:.5f} s, {large}: {many:.5f} s"
