"""Control tokens, such as <|im_start|>: the template writes them, and what people wrote never becomes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as Pipeline

# A noncharacter, so no text has a use for it. It breaks a spelling on its way through the template, and is then taken out.
MARK = "\ufdd0"


def find_control_tokens(pipeline: Pipeline, template: str | None) -> dict[int, str]:
    """{id: spelling} of the special tokens, and of those others that the chat template writes but does not look for in a
    message (some models forgot to call their turn markers special; but </think> is a part of messages)."""
    found = {}
    for token_id, token in pipeline.get_added_tokens_decoder().items():
        text = str(token.content)
        quoted = rf"['\"]{re.escape(text)}['\"]"
        looked_for = rf"{quoted}\s+(not\s+)?in\b|\.\w+\(\s*{quoted}"
        is_marker = template is not None and text.strip() and text in template and not re.search(looked_for, template)
        if text and (token.special or is_marker):
            found[int(token_id)] = text
    return found


class Marker:
    """Marks the spellings of control tokens in what people wrote."""

    def __init__(self, spellings: frozenset[str]) -> None:
        longest_first = sorted((s for s in spellings if len(s) > 1), key=lambda s: (-len(s), s))
        # Looks ahead, so that one that begins inside another is found too.
        self._beginning = (
            re.compile(rf"(?=(?:{'|'.join(map(re.escape, longest_first))}))(.)", re.S) if longest_first else None
        )
        self._prefixes = frozenset(s[:length] for s in longest_first for length in range(1, len(s)))
        self._longest = max(map(len, self._prefixes), default=0)

    def mark(self, value: Any) -> Any:
        """The same value with every string in it marked, keys too."""
        if isinstance(value, str):
            return self._mark_text(value)
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark(item) for item in value]
        return value

    def _mark_text(self, text: str) -> str:
        text = text.replace(MARK, "\ufffd")
        if self._beginning is None:
            return text
        text = self._beginning.sub(rf"\1{MARK}", text)
        # Templates put texts together, and trim them: the end may be the beginning of what the next text completes.
        end = len(text.rstrip())
        for start in range(max(0, end - self._longest), end):
            if text[start:end] in self._prefixes:
                return text[: start + 1] + MARK + text[start + 1 :]
        return text
