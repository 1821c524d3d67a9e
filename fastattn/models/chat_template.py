"""Chat templates: jinja2 programs that come with a model, so they run in jinja2's sandbox and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplateError(ValueError):
    """A model has no chat template, or it does not take this conversation."""


def _raise_exception(message: str) -> NoReturn:
    raise ChatTemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own filter escapes HTML, which is wrong for a prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A compiled template, with the variables and helpers that transformers gives to its templates."""

    def __init__(self, source: str) -> None:
        self.source = source
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # jinja2's own errors, and Python's for the code that jinja2 made of the template
            raise ChatTemplateError(f"the model's chat template cannot be compiled: {error}") from None

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ChatTemplateError(
                    f"messages[{index}] is {message!r}, expected a mapping with a string 'role' and 'content'"
                )
        try:
            return self._template.render(messages=list(messages), **variables)
        except ChatTemplateError:
            raise
        except Exception as error:  # a template is a program and can fail in any way
            raise ChatTemplateError(f"the model's chat template failed: {type(error).__name__}: {error}") from None
