"""A griffe extension for the documentation: turns the parameter lines of our docstrings into a Markdown list.

Our docstrings say `x: (…, N), bf16.` at the beginning of a line. In Markdown such lines would run together.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_NAMES = r"[a-z]\w*(?:, [a-z]\w*)*"
_PARAMETER = re.compile(rf"({_NAMES}): ")
_NEXT = re.compile(rf"(?<=[.;]) (?={_NAMES}: )")  # "… is greedy. top_k: 0 is off": another one in the same line


def as_list(text: str) -> str:
    """`x, y: what they are` at the start of a line → a list item, in a list of its own."""
    out: list[str] = []
    in_list = False
    for line in text.splitlines():
        begins = _PARAMETER.match(line) is not None
        if begins and not in_list:
            out.append("")
        in_list = begins or (in_list and bool(line.strip()))
        out += [_item(part) for part in _NEXT.split(line)] if in_list else [line]
    return "\n".join(out)


def _item(text: str) -> str:
    match = _PARAMETER.match(text)
    if match is None:
        return text
    return f"- {', '.join(f'`{name}`' for name in match[1].split(', '))}: {text[match.end() :]}"


class Parameters(griffe.Extension):
    """Applies `as_list` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_list(obj.docstring.value)
