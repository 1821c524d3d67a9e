"""What a user may ask of sampling."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from fastattn.engine.allowed import FLAG, Allowed, above_0, check_fields, each, integer, number, or_none
from fastattn.engine.structured_output import StructuredOutput

MAX_LOGPROBS = 64
MAX_N = 256

OutputKind = Literal["cumulative", "delta", "final"]

_TOKEN_ID = integer(0, 2**31 - 1)
# The bounds that are neither a probability's nor a counter's keep every logit finite in fp32.
_ALLOWED: Allowed = {
    "n": (integer(1, MAX_N), f"an integer from 1 to {MAX_N}"),
    "temperature": (number(0, 100), "a number from 0 to 100"),
    "top_p": (above_0(1, inclusive=True), "a number above 0 and up to 1"),
    "top_k": (integer(-1, 2**31 - 1), "an integer, 0 or -1 for off"),
    "min_p": (number(0, 1), "a number from 0 to 1"),
    "seed": (or_none(integer(-(2**63), 2**63 - 1)), "None or a 64-bit integer"),
    "max_tokens": (or_none(integer(1, 2**31 - 1)), "None or an integer from 1"),
    "min_tokens": (integer(0, 2**31 - 1), "an integer from 0"),
    "stop": (or_none(each(lambda s: isinstance(s, str) and s != "", 16)), "up to 16 non-empty strings"),
    "stop_token_ids": (or_none(each(_TOKEN_ID, 1024)), "up to 1024 token ids from 0"),
    "ignore_eos": FLAG,
    "presence_penalty": (number(-2, 2), "a number from -2 to 2"),
    "frequency_penalty": (number(-2, 2), "a number from -2 to 2"),
    "repetition_penalty": (number(0.01, 10), "a number from 0.01 to 10"),
    "logit_bias": (
        or_none(
            lambda bias: (
                isinstance(bias, Mapping)
                and each(_TOKEN_ID, 1024)(bias)
                and all(map(number(-1000, 1000), bias.values()))
            )
        ),
        "up to 1024 token ids from 0, each with a number from -1000 to 1000",
    ),
    "logprobs": (or_none(integer(0, MAX_LOGPROBS)), f"None or an integer from 0 to {MAX_LOGPROBS}"),
    "prompt_logprobs": (or_none(integer(0, MAX_LOGPROBS)), f"None or an integer from 0 to {MAX_LOGPROBS}"),
    "skip_special_tokens": FLAG,
    "include_stop_str_in_output": FLAG,
    "structured_output": (or_none(lambda value: isinstance(value, StructuredOutput)), "None or a StructuredOutput"),
    "output_kind": (lambda kind: kind in ("cumulative", "delta", "final"), "'cumulative', 'delta' or 'final'"),
}


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
    structured_output: the form that each completion is held to, by leaving out all tokens that would break it.
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
    stop: str | Collection[str] | None = None
    stop_token_ids: Collection[int] | None = None
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_output: StructuredOutput | None = None
    output_kind: OutputKind = "cumulative"
    stop_strings: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        check_fields(self, _ALLOWED, "SamplingParams: ")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"SamplingParams: min_tokens is {self.min_tokens}, allowed is at most max_tokens = {self.max_tokens}"
            )
        # Copies: what their owner changes later changes no running request.
        object.__setattr__(self, "stop_strings", tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change the logits, for which the engine counts them."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)
