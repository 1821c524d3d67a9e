"""What a user may ask of sampling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

MAX_LOGPROBS = 64
MAX_N = 256

OutputKind = Literal["cumulative", "delta", "final"]


def _check(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"SamplingParams: {name} is {value!r}, allowed is {allowed}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen; the names and meanings are vLLM's and OpenAI's.

    n: completions per prompt. temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. min_p: 0 is off.
    seed: same seed, same text, whatever else is in the batch; None draws one from the engine's own seed.
    max_tokens: at most so many new tokens (None: up to the model's length). min_tokens: no end before so many.
    stop: strings that end the text and are cut off. stop_token_ids: ids that end it. ignore_eos: go on after the end token.
    presence_penalty, frequency_penalty: subtracted for tokens already generated; repetition_penalty: divides (multiplies a
    negative) logit of tokens in prompt or output. logit_bias: {token id: value added to its logit}.
    logprobs: None, or how many of the most likely tokens to report beside the chosen one; prompt_logprobs likewise.
    output_kind: each output carries all text so far, only what is new, or comes once at the end.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: OutputKind = "cumulative"
    stop_strings: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check(_is_int(self.n) and 1 <= self.n <= MAX_N, "n", self.n, f"an integer from 1 to {MAX_N}")
        _check(
            _is_number(self.temperature) and 0 <= self.temperature <= 100,
            "temperature",
            self.temperature,
            "a number from 0 to 100",
        )
        _check(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "a number above 0 and up to 1")
        _check(_is_int(self.top_k) and -1 <= self.top_k < 2**31, "top_k", self.top_k, "an integer, 0 or -1 for off")
        _check(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "a number from 0 to 1")
        _check(
            self.seed is None or (_is_int(self.seed) and -(2**63) <= self.seed < 2**63),
            "seed",
            self.seed,
            "None or a 64-bit integer",
        )
        _check(
            self.max_tokens is None or (_is_int(self.max_tokens) and 1 <= self.max_tokens < 2**31),
            "max_tokens",
            self.max_tokens,
            "None or an integer from 1",
        )
        _check(
            _is_int(self.min_tokens) and 0 <= self.min_tokens < 2**31,
            "min_tokens",
            self.min_tokens,
            "an integer from 0",
        )
        if self.max_tokens is not None:
            _check(
                self.min_tokens <= self.max_tokens,
                "min_tokens",
                self.min_tokens,
                f"at most max_tokens = {self.max_tokens}",
            )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(_is_number(value) and -2 <= value <= 2, name, value, "a number from -2 to 2")
        _check(
            _is_number(self.repetition_penalty) and 0 < self.repetition_penalty <= 10,
            "repetition_penalty",
            self.repetition_penalty,
            "a number above 0 and up to 10",
        )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _check(
                value is None or (_is_int(value) and 0 <= value <= MAX_LOGPROBS),
                name,
                value,
                f"None or an integer from 0 to {MAX_LOGPROBS}",
            )
        _check(
            self.output_kind in ("cumulative", "delta", "final"),
            "output_kind",
            self.output_kind,
            "'cumulative', 'delta' or 'final'",
        )
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        _check(
            all(isinstance(s, str) and s for s in stop) and len(stop) <= 16,
            "stop",
            self.stop,
            "up to 16 non-empty strings",
        )
        object.__setattr__(self, "stop_strings", stop)
        ids = tuple(self.stop_token_ids or ())
        _check(
            all(_is_int(i) and 0 <= i < 2**31 for i in ids), "stop_token_ids", self.stop_token_ids, "token ids from 0"
        )
        for token, bias in (self.logit_bias or {}).items():
            _check(_is_int(token) and 0 <= token < 2**31, "logit_bias", token, "token ids from 0 as keys")
            _check(
                _is_number(bias) and -1000 <= bias <= 1000, "logit_bias", bias, "numbers from -1000 to 1000 as values"
            )

    @property
    def needs_logit_adjustment(self) -> bool:
        """Whether the logits must be changed before a token is drawn, for which the engine keeps counts of tokens."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or self.logit_bias
            or self.min_tokens
        )
