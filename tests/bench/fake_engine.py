"""An engine for tests of what starts engines: it loads nothing, so that its process is there at once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastattn.benchmarks.engines import Request, Running


def fake(model: str, options: Mapping[str, Any]) -> Running:
    """An engine of a known speed: 10 ms a request. At its third request of 5 tokens it does what it is told to."""
    seen = []

    def generate(requests: Sequence[Request]) -> tuple[float, str]:
        seen.append([new for _, new in requests])
        if seen.count([5]) == 3:
            if options["at_third"] == "hang":
                time.sleep(60)
            raise ValueError("out of tokens\nsecond line")
        return 0.01 * len(requests), "estimated: half" if len(requests) == 2 else ""

    return Running("1.2", generate)
