"""What a user may ask of speculation; vLLM's names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

Method = Literal["ngram", "draft_model"]
DraftSampleMethod = Literal["greedy", "probabilistic"]

MAX_SPECULATIVE_TOKENS = 32
MAX_NGRAM = 64  # of _runtime.NgramIndex


@dataclass(frozen=True)
class SpeculativeConfig:
    """Who guesses the next tokens, and how many at a time.

    method: "ngram" looks the last tokens up in the request's own text, "draft_model" asks a smaller model; None is
    "draft_model" if there is a model, else "ngram". num_speculative_tokens: most guesses a step, 1 to 32.
    model: name or path of the draft model; its tokenizer must be the target's.
    prompt_lookup_max, prompt_lookup_min: longest and shortest run of tokens that is looked up; given one, the other is the
    same; given none, 5 and 2.
    draft_sample_method: "greedy" guesses the draft model's likeliest tokens, and the text is what it is without speculation;
    "probabilistic" draws them and keeps the distribution, not the text (`ops.speculative_sample`).
    adaptive_draft_length: guess less, and for a while nothing, for a request whose guesses keep being rejected, and for all
    no more than pays by what guesses and steps are measured to cost.
    """

    method: Method | None = None
    num_speculative_tokens: int = 4
    model: str | None = None
    prompt_lookup_max: int | None = None
    prompt_lookup_min: int | None = None
    draft_sample_method: DraftSampleMethod = "greedy"
    adaptive_draft_length: bool = True

    def __post_init__(self) -> None:
        if self.method is None:
            object.__setattr__(self, "method", "ngram" if self.model is None else "draft_model")
        for name, allowed in (
            ("method", ("ngram", "draft_model")),
            ("draft_sample_method", ("greedy", "probabilistic")),
        ):
            if getattr(self, name) not in allowed:
                raise _refusal(name, getattr(self, name), " and ".join(map(repr, allowed)))
        _check_integer("num_speculative_tokens", self.num_speculative_tokens, 1, MAX_SPECULATIVE_TOKENS)
        if not isinstance(self.adaptive_draft_length, bool):
            raise _refusal("adaptive_draft_length", self.adaptive_draft_length, "True and False")
        if self.method == "ngram":
            self._check_ngram()
        else:
            self._check_draft_model()

    def _check_ngram(self) -> None:
        if self.model is not None:
            raise _refusal("model", self.model, "None with method 'ngram', which has no model")
        if self.draft_sample_method != "greedy":
            raise _refusal("draft_sample_method", self.draft_sample_method, "'greedy' with method 'ngram'")
        longest, shortest = self.prompt_lookup_max, self.prompt_lookup_min
        if longest is None and shortest is None:
            longest, shortest = 5, 2
        longest, shortest = (shortest if longest is None else longest), (longest if shortest is None else shortest)
        _check_integer("prompt_lookup_max", longest, 1, MAX_NGRAM)
        _check_integer("prompt_lookup_min", shortest, 1, longest)
        object.__setattr__(self, "prompt_lookup_max", longest)
        object.__setattr__(self, "prompt_lookup_min", shortest)

    def _check_draft_model(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise _refusal("model", self.model, "a model's name or path with method 'draft_model'")
        for name in ("prompt_lookup_max", "prompt_lookup_min"):
            if getattr(self, name) is not None:
                raise _refusal(name, getattr(self, name), "None with method 'draft_model'")

    @property
    def is_probabilistic(self) -> bool:
        return self.draft_sample_method == "probabilistic"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SpeculativeConfig:
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"speculative config: unknown key {name!r}, allowed are {', '.join(known)}")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> SpeculativeConfig:
        """From what follows --speculative-config: a JSON object of this class's fields."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"speculative config is not JSON: {error}: {text[:100]!r}") from None
        if not isinstance(values, dict):
            raise ValueError(f"speculative config is {text[:100]!r}, expected a JSON object")
        return cls.from_dict(values)


def _refusal(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"SpeculativeConfig: {name} is {value!r}, allowed are {allowed}")


def _check_integer(name: str, value: object, low: int, high: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise _refusal(name, value, f"integers from {low} to {high}")
