"""Many answers at once on one screen: the first unfinished one streams, the others wait for their turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class OrderedWriter:
    """Writes the texts of several answers in a fixed order, whatever order they come in.

    headers: a line above each answer, None for none (a single answer). The output depends only on the texts, not on
    timing, so it can be compared and piped.
    """

    def __init__(self, headers: Sequence[str | None], write: Callable[[str], None]) -> None:
        self._headers, self._write = headers, write
        self._waiting = [""] * len(headers)
        self._finished = [False] * len(headers)
        self._current = 0
        self._open = False  # the current answer's header is written
        self._ends_line = True  # what was written last ends in a line break

    def push(self, slot: int, text: str, finished: bool = False) -> None:
        """Adds text to an answer, and says whether that was its end."""
        self._waiting[slot] += text
        self._finished[slot] = finished
        while self._current < len(self._headers):
            self._show(self._current)
            if not self._finished[self._current]:
                break
            self._end_answer()

    def close(self) -> None:
        """After an interrupt: ends the line, and shows the answers that were complete but had not had their turn."""
        if self._open:
            self._end_answer()
        for slot in range(self._current, len(self._headers)):
            self._current = slot
            if self._finished[slot]:
                self._show(slot)
                self._end_answer()

    def _show(self, slot: int) -> None:
        text, self._waiting[slot] = self._waiting[slot], ""
        if not self._open and (text or self._finished[slot]):
            self._open = True
            header = self._headers[slot]
            if header is not None:
                self._put(header + "\n")
        self._put(text)

    def _end_answer(self) -> None:
        if not self._ends_line:
            self._put("\n")
        if self._headers[self._current] is not None and self._current + 1 < len(self._headers):
            self._put("\n")
        self._open = False
        self._current += 1

    def _put(self, text: str) -> None:
        if text:
            self._write(text)
            self._ends_line = text.endswith("\n")
