"""Guards made of patterns and words that the operator bans."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from fastattn.serve.guardrails.folding import fold
from fastattn.serve.guardrails.guard import Finding, Scan, finished
from fastattn.serve.patterns import compile_pattern

if sys.version_info >= (3, 11):
    from re import _parser
else:
    import sre_parse as _parser

_MAX_WIDTH = 4096


def longest_match(pattern: str) -> int | None:
    """Most characters that a match can have; None when there is no bound, or none that we can tell."""
    try:
        with warnings.catch_warnings():  # [[:digit:]] is a set in a set to Python; the width it gives is enough
            warnings.simplefilter("ignore")
            _, width = _parser.parse(pattern).getwidth()
    except (_parser.error, RecursionError, OverflowError, ValueError):  # RE2 knows more: \pL, \z, \Q
        return None
    return int(width) if width <= _MAX_WIDTH else None


class PatternGuard:
    """What a pattern of each label matches, whichever comes first. A match that may be of any length holds the whole answer
    back, unless `window` says how long one can get."""

    is_linear = True
    most_per_second: int | None = None

    def __init__(self, patterns: Mapping[str, str], *, case_sensitive: bool = True, window: int | None = None) -> None:
        self._patterns = [(label, compile_pattern(p, case_sensitive=case_sensitive)) for label, p in patterns.items()]
        widths = [longest_match(pattern) or window for pattern in patterns.values()]
        self.needs_whole_text = None in widths
        # And one more, which decides on \b and $.
        self._reach = 1 + max((width for width in widths if width is not None), default=0)

    def scan(self, text: str, start: int, final: bool) -> Scan:
        found = [
            Finding(match.start(), match.end(), label)
            for label, pattern in self._patterns
            for match in pattern.finditer(text, start)
            if match.end() > match.start()
        ]
        found.sort(key=lambda f: (f.start, -f.end))
        return finished(found, text, max(start, len(text) - self._reach), final)


class WordGuard:
    """Words and phrases as a reader sees them: case, accents, look-alikes and invisible characters do not matter, and a
    space in a phrase is any white space."""

    is_linear = True
    needs_whole_text = False
    most_per_second: int | None = None

    def __init__(self, words: Sequence[str]) -> None:
        folded = sorted({" ".join(fold(word).text.split()) for word in words} - {""}, key=len, reverse=True)
        spaced = [r"\s{1,8}".join(map(_escape, word.split())) for word in folded]
        self._pattern: Any = compile_pattern(rf"(?:{'|'.join(spaced)})") if spaced else None
        self._reach = 1 + max((len(word) + 7 * word.count(" ") for word in folded), default=0)

    def scan(self, text: str, start: int, final: bool) -> Scan:
        if self._pattern is None:
            return Scan([], len(text))
        plain, origins = fold(text)
        # The first folded character that comes of text[start:].
        first = start if isinstance(origins, range) else next(i for i, origin in enumerate(origins) if origin >= start)
        found = []
        for match in self._pattern.finditer(plain, first):
            begin, end = match.span()
            # \b of RE2 knows ASCII only; words of other scripts have borders too.
            whole = not (begin and _is_word(plain[begin - 1])) and not (end < len(plain) and _is_word(plain[end]))
            found.append(Finding(origins[begin], origins[end - 1] + 1, "word" if whole else None))
        settled = origins[max(first, len(plain) - self._reach)]
        return finished(found, text, max(start, settled), final)


def _escape(word: str) -> str:
    return "".join(c if c.isalnum() or ord(c) > 127 else f"\\x{ord(c):02x}" for c in word)


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"
