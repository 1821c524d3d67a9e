"""Where the time from a process's start to its first token goes."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

logger = logging.getLogger("fastattn.engine")


class Startup:
    """The phases of an engine's start in order, with the seconds that each took.

    "process": until the engine was asked for, which is Python and its imports. "open": the model's header. "device": the CUDA
    context, and how much memory there is. "tokenizer", "draft" (of speculation), "weights". "kv_cache": that, and the step's
    buffers. "first_token": from the first request's arrival to its first token, so that a server's wait for it does not count.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"process": process_seconds()}
        self.weight_bytes = 0  # of the file
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Ends a phase, which began where the one before it ended."""
        now = time.perf_counter()
        self.seconds[phase] = now - self._last
        self._last = now

    @property
    def engine_seconds(self) -> float:
        """From the engine being asked for to its being ready for requests; what vLLM calls the start-up time."""
        return sum(seconds for phase, seconds in self.seconds.items() if phase not in ("process", "first_token"))

    @property
    def total_seconds(self) -> float:
        """From the process's start to the first token, or to where it has come."""
        return sum(self.seconds.values())

    @property
    def weight_rate(self) -> float:
        """Bytes a second of loading weights."""
        return self.weight_bytes / max(self.seconds.get("weights", 0.0), 1e-9)

    def end(self, first_token_seconds: float) -> None:
        """Called at the first token: says in the log where the time went."""
        self.seconds["first_token"] = first_token_seconds
        logger.info("first token %.2f s after the process began: %s", self.total_seconds, self)

    def __str__(self) -> str:
        parts = [f"{phase} {seconds:.2f} s" for phase, seconds in self.seconds.items()]
        return ", ".join(parts).replace(
            f"weights {self.seconds.get('weights', 0.0):.2f} s",
            f"weights {self.seconds.get('weights', 0.0):.2f} s ({self.weight_rate / 1e9:.1f} GB/s)",
        )


def process_seconds(proc: Path = Path("/proc")) -> float:
    """How long this process has been there; where the kernel does not say, how much it has computed."""
    try:
        # The name, in brackets, may hold anything; the start is field 22, in clock ticks since the machine began.
        fields = (proc / "self" / "stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.process_time()
