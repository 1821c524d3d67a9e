"""Signs of prompt injection: rules over the text as a reader sees it, and over what is hidden in it by encodings. It stops the
well-known and the lazy, nobody else: docs/guardrails.md has the rates."""

from __future__ import annotations

import base64
import codecs
import re
from collections.abc import Callable, Iterator
from urllib.parse import unquote

from fastattn.serve.guardrails.folding import fold, hidden
from fastattn.serve.guardrails.guard import Finding, Scan
from fastattn.serve.guardrails.injection_rules import RULES, Rule
from fastattn.serve.patterns import compile_pattern

# Runs that may be an encoding of something; whatever decodes to text is looked at like the text itself.
_URL_SAFE = str.maketrans("-_", "+/")
_ENCODINGS: tuple[tuple[re.Pattern[str], Callable[[str], bytes]], ...] = (
    (re.compile(r"[A-Za-z0-9+/_-]{16,}={0,2}"), lambda run: base64.b64decode(_padded(run.translate(_URL_SAFE), 4))),
    (re.compile(r"[A-Z2-7]{16,}={0,6}"), lambda run: base64.b32decode(_padded(run, 8))),
    (re.compile(r"(?:[0-9A-Fa-f]{2}[ :]?){8,}"), lambda run: bytes.fromhex(run.replace(":", " "))),
    (re.compile(r"(?:[01]{8}[ ,]?){6,}"), lambda run: bytes(int(byte, 2) for byte in re.findall("[01]{8}", run))),
    (re.compile(r"<~[!-uz\s]{10,}~>"), lambda run: base64.a85decode(run, adobe=True)),
)
_ESCAPES = re.compile(r"(?:\\u[0-9A-Fa-f]{4}|\\x[0-9A-Fa-f]{2}){4,}")
_ESCAPE = re.compile(r"\\u([0-9A-Fa-f]{4})|\\x([0-9A-Fa-f]{2})")
_LINE_BREAK = re.compile(r"[ \t]*\n[ \t]*")
_SPACED = re.compile(r"\b(?:\w[ .*_-]){3,}\w\b")
_LEET = str.maketrans("01345$7@", "oieasst" + "a")
_WORD = re.compile(r"[\w@$]+")
_MAX_DEPTH = 2
# Text that was turned round is looked at if one of these comes out; turning everything would double the cost.
_TELLTALE = ("instruction", "ignore", "prompt", "restrict", "disregard", "system", "developer mode", "password")
_MANY_INVISIBLE, _INVISIBLE_TEXT = 8, Rule("invisible_text", 0.5, "")


class InjectionGuard:
    """Flags a text as a whole when the weights of the rules that match add up to `threshold`."""

    is_linear = True
    needs_whole_text = True
    most_per_second: int | None = 2_000_000

    def __init__(self, threshold: float = 1.0) -> None:
        self._threshold = threshold
        # One by one: a re2.Set gives up without a word when its automaton outgrows its memory.
        self._rules = [(rule, compile_pattern(rule.pattern)) for rule in RULES]

    def scan(self, text: str, start: int, final: bool) -> Scan:
        label = self.judge(text[start:])
        return Scan([Finding(start, len(text), label)] if label else [], len(text))

    def judge(self, text: str) -> str | None:
        """The strongest rule's name if there is enough to flag the text."""
        views = list(dict.fromkeys(_views(text, _MAX_DEPTH)))
        hits = [rule for rule, pattern in self._rules if any(pattern.search(view) for view in views)]
        if hidden(text) >= _MANY_INVISIBLE:
            hits.append(_INVISIBLE_TEXT)
        if sum(rule.weight for rule in hits) < self._threshold:
            return None
        return max(hits, key=lambda rule: rule.weight).name


def _views(text: str, depth: int) -> Iterator[str]:
    """The text folded, and what else it may say."""
    plain = fold(text).text
    yield plain
    if "\n" in plain:
        yield _LINE_BREAK.sub(" ", plain)
    if _SPACED.search(plain):
        yield _SPACED.sub(lambda m: re.sub(r"[ .*_-]", "", m.group()), plain)
    yield _WORD.sub(lambda m: m.group().translate(_LEET), plain)  # digits that stand for letters
    for turned in (codecs.encode(plain, "rot13"), plain[::-1]):
        if any(word in turned for word in _TELLTALE):
            yield turned
    if depth:
        for hidden_text in _decoded(text):
            yield from _views(hidden_text, depth - 1)


def _decoded(text: str) -> Iterator[str]:
    for pattern, decode in _ENCODINGS:
        for match in pattern.finditer(text):
            try:
                found = decode(match.group()).decode()
            except ValueError:  # noise that only looked like it
                continue
            if len(found) >= 8 and sum(c.isprintable() or c.isspace() for c in found) >= 0.95 * len(found):
                yield found
    if "%" in text and (unquoted := unquote(text)) != text:
        yield unquoted
    if _ESCAPES.search(text):
        found = _ESCAPE.sub(lambda m: chr(int(m[1] or m[2], 16)), text)
        # The halves of a surrogate pair are one character, and one alone is no text.
        yield found.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _padded(run: str, block: int) -> str:
    run = run.rstrip("=")
    return run + "=" * (-len(run) % block)
