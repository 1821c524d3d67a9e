"""What an output may be held to: a JSON schema, a regular expression, a grammar, one of several texts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

MAX_BYTES = 64 * 1024
MAX_DEPTH = 64
MAX_CHOICES = 10_000

# llguidance's own limits. What one mask may cost is among them: past it the grammar is in error, and its request ends. The
# lexer's states are memory as well, one to two kB each.
COMPILE_LIMITS = {
    "max_items_in_row": 2000,
    "step_max_items": 10_000,
    "step_lexer_fuel": 200_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}

Kind = Literal["json_object", "json_schema", "regex", "grammar", "choice"]
_KINDS = ("json_object", "json_schema", "regex", "grammar", "choice")

# As much white space as pretty-printed JSON needs. Without a limit a model that is unsure writes blanks for ever.
_JSON = {"whitespace_pattern": r"[ \t\r\n]{1,64}"}
# Masks alone decide: llguidance would also force runs of tokens, and for "a{1000000}" that takes seconds in one step.
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'


@dataclass(frozen=True)
class StructuredOutput:
    """The form that each completion has when it ends by itself (``finish_reason`` "stop"); one that is cut by max_tokens
    or by a stop string is a beginning of it.

    kind and value: "json_object", any JSON object (no value); "json_schema", a JSON schema as text; "regex", the whole text
    matches it (Rust's syntax, no look-around); "grammar", in the Lark dialect of llguidance; "choice", a tuple of texts of
    which it is one.

    Up to 64 KiB; a schema up to 64 levels deep; up to 10,000 choices or values of an enum. Raises ValueError.
    """

    kind: Kind
    value: str | tuple[str, ...] = ""

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"StructuredOutput: kind is {self.kind!r}, allowed are {', '.join(map(repr, _KINDS))}")
        if self.kind == "choice":
            self._check_choice()
        elif not isinstance(self.value, str) or (self.kind == "json_object") != (self.value == ""):
            what = "no value" if self.kind == "json_object" else "a non-empty string"
            raise ValueError(f"StructuredOutput: value is {_short(self.value)}, allowed is {what} for {self.kind!r}")
        if self.num_bytes > MAX_BYTES:
            raise ValueError(f"StructuredOutput: value has {self.num_bytes} bytes, allowed are up to {MAX_BYTES}")
        if self.kind == "json_schema":
            _check_schema(self.text)

    def _check_choice(self) -> None:
        value = self.value
        if not isinstance(value, tuple) or not all(isinstance(text, str) and text for text in value):
            raise ValueError(f"StructuredOutput: value is {_short(value)}, allowed is a tuple of non-empty strings")
        if not 1 <= len(value) <= MAX_CHOICES:
            raise ValueError(f"StructuredOutput: value has {len(value)} choices, allowed are 1 to {MAX_CHOICES}")

    @property
    def text(self) -> str:
        return self.value if isinstance(self.value, str) else "\x00".join(self.value)

    @property
    def num_bytes(self) -> int:
        return len(self.text.encode("utf-8", "surrogatepass"))

    def to_lark(self) -> str:
        """The grammar that llguidance compiles."""
        if self.kind == "grammar":
            return self.text + _OPTIONS  # after it, so that positions in messages are the user's
        if self.kind == "choice":
            # json.dumps quotes as Lark does; in alternatives of one terminal the longest wins, whatever the order.
            return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(text) for text in self.value) + _OPTIONS
        if self.kind == "regex":
            from llguidance import regex_to_lark

            return f"start: TEXT\nTEXT: /{regex_to_lark(self.text, '')}/{_OPTIONS}"
        schema = {"type": "object"} if self.kind == "json_object" else json.loads(self.text)
        if isinstance(schema, dict):
            schema = {"x-guidance": _JSON} | schema
        return f"start: %json {json.dumps(schema)}{_OPTIONS}"


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"StructuredOutput: the JSON schema is no JSON: {error}") from None
    if not isinstance(schema, (dict, bool)):
        raise ValueError(
            f"StructuredOutput: the JSON schema is {_short(schema)}, allowed are an object, true and false"
        )
    pending: list[tuple[Any, int]] = [(schema, 1)]
    while pending:
        value, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise ValueError(
                f"StructuredOutput: the JSON schema is over {MAX_DEPTH} levels deep, allowed are {MAX_DEPTH}"
            )
        if isinstance(value, dict):
            enum = value.get("enum")
            if isinstance(enum, list) and len(enum) > MAX_CHOICES:
                raise ValueError(
                    f"StructuredOutput: the JSON schema has an enum of {len(enum)} values, allowed are {MAX_CHOICES}"
                )
            pending += [(child, depth + 1) for child in value.values()]
        elif isinstance(value, list):
            pending += [(child, depth + 1) for child in value]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
