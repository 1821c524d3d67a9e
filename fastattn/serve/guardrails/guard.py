"""What a guard is: it finds spans in a text that may not be complete yet."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Finding(NamedTuple):
    """text[start:end]. label: what it is; None: it looked like something and is not, but must not be cut in two, or its
    halves might look like something else."""

    start: int
    end: int
    label: str | None


class Scan(NamedTuple):
    """findings: in order. settled: whatever text follows, no finding that starts before this position will come, go or
    change."""

    findings: list[Finding]
    settled: int


class Guard(Protocol):
    """needs_whole_text: nothing is settled before the end, so it is asked once. is_linear: its time is bounded by the
    text's length, so short texts are scanned on the spot; others run in a thread with a time limit. most_per_second: no more
    characters than that can be looked at in a second, so a longer text is not begun: a thread cannot be stopped, and other
    requests would wait for it. None: it is quick."""

    needs_whole_text: bool
    is_linear: bool
    most_per_second: int | None

    def scan(self, text: str, start: int, final: bool) -> Scan:
        """Findings that begin at `start` or later; what is before it was dealt with and is there as context. final: no more
        text follows, so everything is settled. May raise anything: the guard then counts as failed."""
        ...


def finished(findings: list[Finding], text: str, settled: int, final: bool) -> Scan:
    return Scan(findings, len(text) if final else settled)
