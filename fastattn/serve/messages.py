"""What front and engine process say to one another: msgpack of these types and nothing else, over a Unix socket."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class EngineSpec(msgspec.Struct, forbid_unknown_fields=True):
    """How to start an engine process: its first line on stdin, as JSON.

    options: fields of EngineOptions, as JSON has them. heartbeat: seconds between signs of life.
    """

    address: str
    identity: str
    model: str
    options: dict[str, Any]
    heartbeat: float


# ---- front to engine ----


class Structure(msgspec.Struct):
    """See StructuredOutput."""

    kind: Literal["json_object", "json_schema", "regex", "grammar", "choice"]
    value: str | list[str] = ""


class Sampling(msgspec.Struct, omit_defaults=True):
    """SamplingParams' fields of the same names. seed is always there: a request that is resumed must go on alike."""

    seed: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_output: Structure | None = None


class Generate(msgspec.Struct, tag="generate", array_like=True):
    """resume: the tokens of each completion so far, if another engine process began them."""

    id: str
    prompt_token_ids: list[int]
    sampling: Sampling
    priority: int = 0
    tenant: str = ""
    resume: list[list[int]] | None = None


class Embed(msgspec.Struct, tag="embed", array_like=True):
    id: str
    prompt_token_ids: list[int]
    priority: int = 0
    tenant: str = ""


class Abort(msgspec.Struct, tag="abort", array_like=True):
    id: str


class Sleep(msgspec.Struct, tag="sleep", array_like=True):
    """Give memory back; what was running was aborted before. Answered with `Switched`."""

    level: int


class WakeUp(msgspec.Struct, tag="wake_up", array_like=True):
    """Take it again, of these parts, or of all. Answered with `Switched`."""

    tags: list[str]


class Stop(msgspec.Struct, tag="stop", array_like=True):
    """End now, and cleanly."""


ToEngine = Generate | Embed | Abort | Sleep | WakeUp | Stop


# ---- engine to front ----


class TokenizerParts(msgspec.Struct):
    """All that makes a Tokenizer; pipeline is the library's own JSON."""

    pipeline: str
    bos_token_id: int | None
    eos_token_ids: list[int]
    add_bos: bool
    add_eos: bool
    chat_template: str | None


class Ready(msgspec.Struct, tag="ready", array_like=True):
    model: str
    device: str
    max_model_len: int
    vocab_size: int
    max_num_seqs: int
    digest: str  # of what decides about answers: files, options
    tokenizer: TokenizerParts


class StartFailed(msgspec.Struct, tag="failed", array_like=True):
    """Nothing that a second try could change: a wrong option, a broken file, too little memory."""

    message: str
    exit_code: int


class TokenLogprob(msgspec.Struct, array_like=True):
    token_id: int
    logprob: float
    rank: int
    text: str
    raw: bytes


class Choice(msgspec.Struct, array_like=True):
    """What is new of one completion. Each entry of logprobs begins with the token that was chosen."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[list[TokenLogprob]] | None = None
    finish_reason: Literal["stop", "length", "abort", "error"] | None = None
    stop_reason: int | str | None = None


class Output(msgspec.Struct, array_like=True):
    id: str
    choices: list[Choice]
    finished: bool
    num_cached_tokens: int = 0
    queue_seconds: float = 0.0
    prompt_logprobs: list[list[TokenLogprob]] | None = None
    embedding: list[float] | None = None


class Outputs(msgspec.Struct, tag="outputs", array_like=True):
    """Of one step."""

    outputs: list[Output]


class Refused(msgspec.Struct, tag="refused", array_like=True):
    """invalid: the request can never run. busy: the queue is full."""

    id: str
    kind: Literal["invalid", "busy"]
    message: str


class Stats(msgspec.Struct, tag="stats", array_like=True):
    """EngineStats' numbers by name, and the sign of life: it is sent between steps, by the thread that makes them."""

    values: dict[str, float]


class Switched(msgspec.Struct, tag="switched", array_like=True):
    """asleep: the parts that sleep now. error: why they are not those that were asked for."""

    asleep: list[str]
    error: str | None = None


FromEngine = Ready | StartFailed | Outputs | Refused | Stats | Switched
