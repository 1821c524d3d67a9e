"""Patterns that a configuration gives: RE2, linear in the text whatever the pattern."""

from __future__ import annotations

from typing import Annotated, Any

import re2
from pydantic import AfterValidator, Field


def compile_pattern(pattern: str, *, case_sensitive: bool = True) -> Any:
    """With the methods of `re.Pattern`. Raises ValueError for what RE2 has not: look-around, references back."""
    options = re2.Options()
    options.log_errors, options.case_sensitive, options.max_mem = False, case_sensitive, 16 << 20
    try:
        return re2.compile(pattern, options)  # type: ignore[no-untyped-call]
    except re2.error as error:
        why = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
        raise ValueError(f"pattern {pattern!r}: {why}") from None


def _checked(text: str) -> str:
    compile_pattern(text)
    return text


Pattern = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_checked)]
