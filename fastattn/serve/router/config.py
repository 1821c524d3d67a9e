"""The `router:` section, in LiteLLM's words where it has one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, model_validator
from typing_extensions import Self

from fastattn.serve.patterns import Pattern
from fastattn.serve.router.language import LANGUAGES
from fastattn.serve.settings import Label, Seconds, Section


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{text!r} is no address, expected http://HOST:PORT/v1 or https://HOST/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("an address has no user, query or fragment; a key goes into api_key_file")
    return text.rstrip("/")


class DeploymentConfig(Section):
    """One place where a model runs. Several with the same model_name share its requests.

    model_name: its name here. engine: a model of this server's `models:`; or api_base: another server's address up to and
    including /v1, with model: its name there (as here when absent), api_key_file: a file that holds its key, timeout:
    seconds without a sign of life. input_cost, output_cost: price of a million tokens, in any currency, for the metrics and
    for `fastattn router evaluate`. revision: changed by the operator when the other server's model changes, so that cached
    answers of the old one are not given out.
    """

    model_name: Label
    engine: Label | None = None
    api_base: Annotated[str, AfterValidator(_url)] | None = None
    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    api_key: SecretStr | None = None
    api_key_file: Annotated[Path, Field(strict=False)] | None = None
    timeout: Seconds = 60.0
    connect_timeout: Seconds = 5.0
    input_cost: Annotated[float, Field(ge=0)] = 0.0
    output_cost: Annotated[float, Field(ge=0)] = 0.0
    revision: str = ""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.engine is None) == (self.api_base is None):
            raise ValueError(f"model {self.model_name!r}: expected either engine or api_base")
        if self.engine is not None and (self.model or self.api_key or self.api_key_file):
            raise ValueError(f"model {self.model_name!r}: model and api_key are allowed only with api_base")
        if self.api_key is not None and self.api_key_file is not None:
            raise ValueError(f"model {self.model_name!r}: expected at most one of api_key and api_key_file")
        return self


class Condition(Section):
    """All that is given must hold. Lengths are characters of the prompt. matches: anywhere in the user's last message.
    headers: patterns that a request header must match as a whole."""

    min_prompt_chars: Annotated[int, Field(ge=0)] | None = None
    max_prompt_chars: Annotated[int, Field(ge=0)] | None = None
    tools: bool | None = None
    structured: bool | None = None
    languages: Annotated[list[Literal[LANGUAGES]], Field(min_length=1)] | None = None  # type: ignore[valid-type]
    matches: Pattern | None = None
    headers: dict[Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")], Pattern] | None = None
    tenants: Annotated[list[str], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("a condition without any field holds always; put that model into `default`")
        return self


class RuleConfig(Section):
    name: Label
    when: Condition
    use: Label


class RouteConfig(Section):
    """A name that clients ask for and that stands for several models: the first rule that holds decides, else default."""

    rules: list[RuleConfig] = Field(default_factory=list)
    default: Label


class CascadeConfig(Section):
    """first answers; if its confidence is below the threshold, then answers anew.

    confidence: mean or min of the log-probabilities of the answer's tokens, at most 0. threshold: `fastattn router
    evaluate` shows what each costs. if_unavailable: give the first's answer, or the error, when `then` cannot be had.
    """

    first: Label
    then: Label
    confidence: Literal["mean", "min"] = "mean"
    threshold: Annotated[float, Field(le=0)]
    if_unavailable: Literal["first", "error"] = "first"


class RouterConfig(Section):
    """model_list: what there is. routes, cascades: names that stand for several. model_group_alias: other names for any of
    these. fallbacks: for a model, those that are asked in its place when it cannot answer.

    num_retries: more attempts at the same model. retry_budget: attempts after the first, as a share of requests.
    allowed_fails: failures in a row after which a deployment rests for cooldown_time seconds.
    """

    model_list: Annotated[list[DeploymentConfig], Field(min_length=1)]
    routes: dict[Label, RouteConfig] = Field(default_factory=dict)
    cascades: dict[Label, CascadeConfig] = Field(default_factory=dict)
    model_group_alias: dict[Label, Label] = Field(default_factory=dict)
    fallbacks: dict[Label, list[Label]] = Field(default_factory=dict)
    num_retries: Annotated[int, Field(ge=0, le=10)] = 2
    retry_budget: Annotated[float, Field(ge=0, le=1)] = 0.2
    allowed_fails: Annotated[int, Field(ge=1, le=1000)] = 3
    cooldown_time: Seconds = 30.0

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        wrong = list(self._mistakes())
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    @property
    def model_names(self) -> list[str]:
        return list(dict.fromkeys(deployment.model_name for deployment in self.model_list))

    @property
    def public_names(self) -> list[str]:
        return [*self.model_names, *self.cascades, *self.routes, *self.model_group_alias]

    def engine_of(self, name: str) -> str | None:
        """The engine of this server that a name stands for, if it stands for that one alone."""
        name = self.model_group_alias.get(name, name)
        engines = {entry.engine for entry in self.model_list if entry.model_name == name}
        return engines.pop() if len(engines) == 1 else None

    @property
    def header_names(self) -> set[str]:
        """Request headers that rules look at."""
        return {name for route in self.routes.values() for rule in route.rules for name in rule.when.headers or ()}

    def _mistakes(self) -> Iterator[str]:
        names = self.public_names
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"{name!r} is the name of several things among model_list, cascades, routes and model_group_alias"
        models, targets = set(self.model_names), {*self.model_names, *self.cascades}
        for name, cascade in self.cascades.items():
            for field in ("first", "then"):
                if (used := getattr(cascade, field)) not in models:
                    yield f"cascades.{name}.{field} is {used!r}, {_known(models)}"
        for name, route in self.routes.items():
            for where, used in [(f"rules.{rule.name}.use", rule.use) for rule in route.rules] + [
                ("default", route.default)
            ]:
                if used not in targets:
                    yield f"routes.{name}.{where} is {used!r}, {_known(targets)}"
        for name, used in self.model_group_alias.items():
            if used not in {*targets, *self.routes}:
                yield f"model_group_alias.{name} is {used!r}, {_known({*targets, *self.routes})}"
        for name, others in self.fallbacks.items():
            for used in (name, *others):
                if used not in models:
                    yield f"fallbacks.{name} names {used!r}, {_known(models)}"


def _known(names: set[str]) -> str:
    return f"known are {', '.join(sorted(names))}"
