"""A griffe extension for the documentation: turns the parameter lines of our docstrings into a Markdown list.

Our docstrings say `x: (…, N), bf16.` at the beginning of a line. In Markdown such lines would run together.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_PARAMETER = re.compile(r"([a-z]\w*(?:, [a-z]\w*)*): ")


def as_list(text: str) -> str:
    """`x, y: what they are` at the start of a line → a list item, in a list of its own."""
    out: list[str] = []
    in_list = False
    for line in text.splitlines():
        match = _PARAMETER.match(line)
        if match:
            if not in_list and out and out[-1].strip():
                out.append("")
            names = ", ".join(f"`{name}`" for name in match[1].split(", "))
            line = f"- {names}: {line[match.end() :]}"
        in_list = bool(line.strip()) and (in_list or match is not None)
        out.append(line)
    return "\n".join(out)


class Parameters(griffe.Extension):
    """Applies `as_list` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_list(obj.docstring.value)
