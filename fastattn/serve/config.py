"""Everything that a server can be told: the fields are its flags, the names in its YAML file and, in capitals with
FASTATTN_ in front, its environment variables. A flag goes before the environment, that before the file, that before the
default. All that is wrong is said at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from fastattn.serve.cache.config import CacheConfig
from fastattn.serve.guardrails.config import GuardrailsConfig
from fastattn.serve.router.config import RouterConfig
from fastattn.serve.yaml_file import load_yaml
from fastattn.sizes import parse_size


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


Size = Annotated[int, BeforeValidator(_size), Field(ge=1, le=2**31 - 1)]  # "32K" too
Seconds = Annotated[float, Field(gt=0, le=86400)]

SECTIONS = ("models", "router", "cache", "guardrails")  # only in the file


class EngineSettings(BaseModel):
    """What one engine is started with."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: Annotated[str, Field(min_length=1, description="Name, folder or .gguf file of the model.")]
    chat_template: Annotated[Path | None, Field(description="File with a chat template in place of the model's.")] = (
        None
    )
    device: Annotated[str, Field(description="auto, cpu, cuda or cuda:N.")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], Field(description="auto is bfloat16 on a GPU, else float32.")
    ] = "auto"
    max_model_len: Annotated[Size | None, Field(description="Longest prompt and answer together, in tokens.")] = None
    max_num_seqs: Annotated[Size | None, Field(description="Most sequences in one step.")] = None
    max_num_batched_tokens: Annotated[Size | None, Field(description="Most tokens in one step.")] = None
    block_size: Annotated[Size, Field(description="Tokens in a KV-cache block.")] = 16
    kv_cache_dtype: Annotated[
        Literal[
            "auto",
            "float32",
            "bfloat16",
            "float16",
            "fp8",
            "fp8_e4m3",
            "fp8_per_token_head",
            "int8",
            "int8_per_token_head",
        ],
        Field(
            description="Numbers in the KV cache: fp8 and int8 are of 8 bits; auto is what the model was quantized for, else its dtype."
        ),
    ] = "auto"
    kv_cache_scales: Annotated[
        str,
        Field(
            pattern=r"^(auto|dynamic|checkpoint|calculate|.+\.safetensors)$",
            description="Scales of a KV cache of 8 bits: dynamic, one for each token's head; or one for each KV head: checkpoint "
            "(the model's), calculate (calibrated on the first step's tokens) or a .safetensors file. auto: checkpoint where the "
            "model was quantized for such a cache, else dynamic.",
        ),
    ] = "auto"
    quantization: Annotated[
        Literal["int8", "fp8", "int4", "nvfp4", "mxfp4", "nvfp4-w4a8", "mxfp4-w4a8"] | None,
        Field(
            description="Round the weights as they are loaded; nvfp4-w4a8 and mxfp4-w4a8 also give FP8 activations to models in FP4."
        ),
    ] = None
    num_kv_blocks: Annotated[Size | None, Field(description="KV-cache blocks; as many as fit, if not given.")] = None
    kv_offloading_size: Annotated[
        float | None,
        Field(
            gt=0,
            lt=1e6,
            description="Host memory, GiB of all ranks together, that evicted KV blocks go to and come back from; none, if not given.",
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        float, Field(gt=0, le=1, description="Share of the GPU's memory to use at most.")
    ] = 0.9
    enable_prefix_caching: Annotated[
        bool, Field(description="Keep what was computed for prompts that begin alike.")
    ] = True
    enable_chunked_prefill: Annotated[bool, Field(description="Compute long prompts over several steps.")] = True
    scheduling_policy: Annotated[
        Literal["fcfs", "priority", "fair"],
        Field(description="Order of waiting requests: as they came, by priority, or fair to tenants."),
    ] = "fcfs"
    async_scheduling: Annotated[
        bool | None,
        Field(
            description="Queue a step while the one before it runs. If not given: on GPUs, but for several or with speculative decoding."
        ),
    ] = None
    batch_invariant: Annotated[
        bool,
        Field(
            description="A request's tokens and log-probabilities are the same bits whatever else is served; slower, see the docs."
        ),
    ] = False
    disable_cascade_attn: Annotated[
        bool, Field(description="Read what requests begin with for each of them, also where once for all is faster.")
    ] = False
    enforce_eager: Annotated[bool, Field(description="No CUDA graphs.")] = False
    tensor_parallel_size: Annotated[int, Field(ge=1, le=1024, description="GPUs (or CPU processes) that share the model.")] = 1  # fmt: skip
    speculative_config: Annotated[
        dict[str, Any] | None,
        Field(description='Speculative decoding, as JSON: {"method": "ngram", "num_speculative_tokens": 4}.'),
    ] = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1, description="Seed of the engine.")] = 0
    enable_sleep_mode: Annotated[
        bool, Field(description="POST /sleep and /wake_up: the engine gives its memory back while nobody needs it.")
    ] = False
    trace: Annotated[
        str | None,
        Field(
            description="File that takes what host and device do in every step, for Perfetto; compressed if it ends in .gz; "
            "begun anew with each start of the engine."
        ),
    ] = None

    @field_validator("speculative_config", mode="before")
    @classmethod
    def _parse_json(cls, value: object) -> object:
        return json.loads(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _can_sleep(self) -> Self:
        if self.enable_sleep_mode and self.tensor_parallel_size > 1:
            raise ValueError(
                f"enable_sleep_mode: tensor_parallel_size is {self.tensor_parallel_size}, allowed is 1: other ranks do not sleep"
            )
        if self.enable_sleep_mode and (self.speculative_config or {}).get("model") is not None:
            raise ValueError("enable_sleep_mode: speculative_config has a model, and a draft model does not sleep")
        return self

    def engine_options(self) -> dict[str, Any]:
        """Fields of EngineOptions, as JSON has them."""
        names = "device dtype max_model_len max_num_seqs max_num_batched_tokens block_size kv_cache_dtype kv_cache_scales quantization num_kv_blocks kv_offloading_size gpu_memory_utilization enable_prefix_caching enable_chunked_prefill tensor_parallel_size seed async_scheduling batch_invariant disable_cascade_attn trace"  # fmt: skip
        options = {name: getattr(self, name) for name in names.split()}
        options |= {"policy": self.scheduling_policy, "use_cuda_graphs": not self.enforce_eager}
        if self.speculative_config is not None:
            options["speculative"] = self.speculative_config
        return options


class ServeConfig(EngineSettings):
    served_model_name: Annotated[
        list[str], Field(description="Names that requests may give for the model; the model's own by default.")
    ] = []
    # ---- the network ----
    host: Annotated[str, Field(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port; 0 takes a free one.")] = 8000
    uds: Annotated[Path | None, Field(description="Unix socket to listen on, in place of host and port.")] = None
    allowed_hosts: Annotated[
        list[str],
        Field(description="Names that requests may call this server by (Host); * allows all. On a loopback address only its own names are allowed, elsewhere all."),
    ] = []  # fmt: skip
    cors_origins: Annotated[
        list[str], Field(description="Web pages of these origins may call this server; none may by default.")
    ] = []
    root_path: Annotated[
        str,
        Field(
            pattern=r"^(/[A-Za-z0-9._~-]+)*$", description="Prefix of a proxy that takes it off paths, such as /llm."
        ),
    ] = ""
    ssl_certfile: Annotated[Path | None, Field(description="Certificate for HTTPS.")] = None
    ssl_keyfile: Annotated[Path | None, Field(description="Its key.")] = None

    # ---- who may ask, and how much ----
    api_key: Annotated[
        list[SecretStr], Field(description="Key that clients must send; may be repeated. Every route but /health needs it.")
    ] = []  # fmt: skip
    api_keys_file: Annotated[
        Path | None, Field(description="YAML file of keys as SHA-256 digests, with tenant, scopes, priority and limits.")
    ] = None  # fmt: skip
    requests_per_minute: Annotated[
        int | None, Field(ge=1, le=10**9, description="Limit for each tenant whose key has none.")
    ] = None
    tokens_per_minute: Annotated[
        int | None, Field(ge=1, le=10**12, description="Limit for each tenant whose key has none, prompt and answer.")
    ] = None
    limit_concurrency: Annotated[Size, Field(description="Most connections at a time.")] = 4096
    max_num_waiting: Annotated[
        Size, Field(description="Sequences that may wait for a place; further requests get 503 and Retry-After.")
    ] = 1024
    max_body_bytes: Annotated[Size, Field(description="Largest request body.")] = 8 << 20
    header_timeout: Annotated[Seconds, Field(description="Seconds for a request's headers to arrive.")] = 10.0
    body_timeout: Annotated[Seconds, Field(description="Seconds for its body.")] = 30.0
    write_timeout: Annotated[
        Seconds, Field(description="Seconds that a client may take none of its stream before it is cut off.")
    ] = 30.0
    stream_keep_alive: Annotated[
        Seconds, Field(description="Seconds of silence after which a stream gets a comment, so that no proxy cuts it.")
    ] = 15.0
    keep_alive_timeout: Annotated[int, Field(ge=1, le=3600, description="Seconds that an idle connection is kept.")] = 5

    template_kwargs: Annotated[
        list[Annotated[str, Field(pattern=r"^[a-zA-Z_][a-zA-Z0-9_]{0,63}$")]],
        Field(description="Variables of chat templates that requests may set in chat_template_kwargs."),
    ] = ["enable_thinking", "thinking", "reasoning_effort"]

    otlp_traces_endpoint: Annotated[
        str | None,
        Field(
            pattern=r"^https?://\S+$",
            description="Where OpenTelemetry traces of answers go, OTLP over HTTP: http://HOST:4318/v1/traces.",
        ),
    ] = None

    # ---- how it lives ----
    shutdown_timeout: Annotated[
        float, Field(ge=0, le=86400, description="Seconds that running answers get to finish after SIGTERM.")
    ] = 30.0
    engine_timeout: Annotated[
        Seconds, Field(description="Seconds without a sign of life after which the engine is restarted.")
    ] = 60.0
    health_timeout: Annotated[
        Seconds, Field(description="Seconds without a sign of life after which /health says 503.")
    ] = 20.0
    render_workers: Annotated[
        int, Field(ge=1, le=64, description="Processes that render chat templates and tokenize.")
    ] = 2

    # ---- sections of the file ----
    models: Annotated[
        dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")], EngineSettings],
        Field(description="Further engines by name, each with an engine's settings."),
    ] = {}
    router: Annotated[RouterConfig | None, Field(description="One endpoint over several models.")] = None
    cache: Annotated[CacheConfig | None, Field(description="Answers are kept and given again.")] = None
    guardrails: Annotated[GuardrailsConfig | None, Field(description="What may go in and come out.")] = None

    @field_validator("allowed_hosts", "cors_origins", "api_key", "served_model_name", "template_kwargs", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("api_key")
    @classmethod
    def _keys_are_keys(cls, keys: list[SecretStr]) -> list[SecretStr]:
        if any(not key.get_secret_value().isascii() or len(key.get_secret_value()) < 8 for key in keys):
            raise ValueError("a key has fewer than 8 characters, or others than ASCII")
        return keys

    @field_validator("template_kwargs")
    @classmethod
    def _names_are_free(cls, names: list[str]) -> list[str]:
        if taken := sorted(
            {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"}.intersection(names)
        ):
            raise ValueError(f"{', '.join(taken)}: what the server itself gives to templates is not a request's to set")
        return names

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ValueError("ssl_keyfile and ssl_certfile are needed together")
        for name in ("chat_template", "api_keys_file", "ssl_keyfile", "ssl_certfile"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise ValueError(f"{name}: {path}: no such file")
        for number, entry in enumerate(self.router.model_list if self.router is not None else ()):
            if entry.engine is not None and entry.engine not in (known := [self.names[0], *self.models]):
                raise ValueError(f"router.model_list.{number}.engine is {entry.engine!r}, known are {', '.join(known)}")
        return self

    @property
    def names(self) -> list[str]:
        return self.served_model_name or [self.model]


def load(flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None) -> ServeConfig:
    """The configuration of these sources. Raises ValueError in one line that lists everything that is wrong."""
    merged = _read_file(file) if file is not None else {}
    merged = merged | dict(environment) | {name: value for name, value in flags.items() if value is not None}
    try:
        return ServeConfig.model_validate(merged)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        raise ValueError("; ".join(_describe(item) for item in found)) from None


def _describe(item: Any) -> str:
    name = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        return f"{name} is not a setting"
    if item["type"] == "missing":
        return f"{name} is not given"
    message = item["msg"].removeprefix("Value error, ")
    if not name:
        return str(message)
    # What a secret was is not for the log, nor what holds one.
    hidden = "key" in name or isinstance(item["input"], dict | list)
    given = "" if hidden else f", got {repr(item['input'])[:100]}"
    return f"{name}: {message}{given}"


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config: {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        values = load_yaml(text)
    except ValueError as error:
        raise ValueError(f"config: {path}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"config: {path}: expected settings by name")
    # Both spellings, as vLLM has them.
    return {key.replace("-", "_"): value for key, value in values.items()}


def environment_names() -> Sequence[str]:
    """Settings that have an environment variable: all but the sections."""
    return [name for name in ServeConfig.model_fields if name not in SECTIONS]
