"""What a client may send, and what it gets: OpenAI's requests with vLLM's extensions, every number and list bounded.

Validation is strict: no "5" for 5, no unknown field, no NaN. What passes here is accepted by the engine as far as that can
be known without the model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from typing_extensions import Self

MAX_CHOICES = 128  # completions of one request, over all its prompts
MAX_LOGPROBS = 20
MAX_LIST = 2048
MAX_PARTS = 8192  # parts of contents and tool calls of one request, over all its messages
MAX_SCHEMA_BYTES = 256 << 10  # JSON of one schema, or of those of all tools
_INT32 = 2**31 - 1

TokenId = Annotated[int, Field(ge=0, le=_INT32)]
Text = Annotated[str, Field(max_length=16 * 2**20)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
# The first wrong one says enough: a million of them take a gigabyte and ten seconds to describe.
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=2**20, fail_fast=True)]


def _small(schema: dict[str, Any]) -> dict[str, Any]:
    """Schemas are copied and written again on many ways, whole, while everybody waits: 0.2 s each time for 6 MB."""
    if (size := len(msgspec.json.encode(schema))) > MAX_SCHEMA_BYTES:
        raise ValueError(f"it has {size} bytes of JSON, allowed are {MAX_SCHEMA_BYTES}")
    return schema


JSONObject = Annotated[dict[str, Any], AfterValidator(_small)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True)


# ---- parts of requests ----


class TextPart(Strict):
    type: Literal["text"]
    text: Text
    prompt_cache_breakpoint: JSONObject | None = None  # see prompt_cache_options


class FunctionCall(Strict):
    name: ToolName
    arguments: Text


class ToolCall(Strict):
    """index: of a streamed call, which many clients send back as it came; its place says the same."""

    index: int | None = Field(None, exclude=True)
    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    """A turn. The fields that can only be None are what the openai client sends back of an answer."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_LIST)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    refusal: Text | None = None
    reasoning_content: Text | None = None  # a model's thinking, as it came; and another name for it
    reasoning: Text | None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[JSONObject], Field(max_length=0)] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _parts_are_text(cls, content: Any) -> Any:
        """Said of a picture in one sentence, in place of all that a part is not."""
        for number, part in enumerate(content if isinstance(content, list) else ()):
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise ValueError(f"part {number} is of type {kind[:64]!r}, this server takes parts of type 'text' only")
        return content

    @model_validator(mode="after")
    def _has_what_its_role_needs(self) -> Self:
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.refusal)):
            raise ValueError(f"content is null, expected text for a message of role {self.role!r}")
        if (self.reasoning_content or self.reasoning) and self.role != "assistant":
            raise ValueError(f"reasoning_content in a message of role {self.role!r}, allowed is 'assistant'")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls in a message of role {self.role!r}, allowed is 'assistant'")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id belongs to messages of role 'tool', and only to them")
        return self

    @property
    def text(self) -> str | None:
        """The content as one text."""
        return "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content


class FunctionDefinition(Strict):
    name: ToolName
    description: Text | None = None
    parameters: JSONObject | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: FunctionDefinition


def _small_in_all(tools: list[Tool]) -> list[Tool]:
    size = sum(len(msgspec.json.encode(tool.function.parameters)) for tool in tools if tool.function.parameters)
    if size > MAX_SCHEMA_BYTES:
        raise ValueError(f"their parameters have {size} bytes of JSON, allowed are {MAX_SCHEMA_BYTES} in all")
    return tools


_PARTS = ("content", "tool_calls", "output", "summary")  # of a message, or an item of a response


def few_parts(messages: Any) -> Any:
    """Before they are looked at one by one, which takes a second for as many as fit into a body."""
    found = [m for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    lists = [m[name] for m in found for name in _PARTS if isinstance(m.get(name), list)]
    if (count := sum(map(len, lists))) > MAX_PARTS:
        raise ValueError(f"there are {count} parts of contents and tool calls, allowed are {MAX_PARTS} in all")
    return messages


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_LIST), BeforeValidator(few_parts)]
Tools = Annotated[list[Tool], Field(min_length=1, max_length=128), AfterValidator(_small_in_all)]


class NamedFunction(Strict):
    name: ToolName


class NamedToolChoice(Strict):
    type: Literal["function"]
    function: NamedFunction


class JSONSchemaFormat(Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    schema_: JSONObject = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is needed with type 'json_schema', and allowed only there")
        return self


class StructuredOutputs(Strict):
    """vLLM's extension: exactly one of these."""

    json_: JSONObject | Text | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: Annotated[str, Field(min_length=1, max_length=65536)] | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=10_000)] | None = None
    grammar: Annotated[str, Field(min_length=1, max_length=65536)] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [self.json_, self.json_object, self.regex, self.choice, self.grammar]
        if sum(value is not None for value in given) != 1:
            raise ValueError("expected exactly one of json, json_object, regex, choice, grammar")
        return self


TemplateKwargs = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^[a-zA-Z_][a-zA-Z0-9_]{0,63}$")],
        Annotated[str, Field(max_length=256)] | bool | Annotated[int, Field(ge=-(2**53), le=2**53)] | float | None,
    ],
    Field(max_length=16),
]


class Prediction(Strict):
    """What the client expects to read, to be told faster; the answer is the same without."""

    type: Literal["content"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_LIST)]


class PromptCacheOptions(Strict):
    mode: Literal["implicit", "explicit"] | None = None
    ttl: Literal["30m"] | None = None


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis; we send none


# ---- requests ----


class Drawing(Strict):
    """Who answers, and how its tokens are drawn; the last five are vLLM's extensions."""

    model: Name
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None  # a label of the client's; nothing depends on it
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=_INT32)] | None = None


class Labels(Strict):
    """What changes no answer: labels and hints of the client's, or the one value that says what we do."""

    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None


class _Sampling(Drawing):
    """What chat and text completion have in common."""

    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=4096)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=4096)]], Field(max_length=16)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # vLLM's extensions
    min_tokens: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JSONObject | Text | None = None
    guided_regex: Annotated[str, Field(min_length=1, max_length=65536)] | None = None
    guided_choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=10_000)] | None = None  # fmt: skip
    guided_grammar: Annotated[str, Field(min_length=1, max_length=65536)] | None = None

    @field_validator("logit_bias")
    @classmethod
    def _keys_are_token_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for key in bias or ():
            if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= _INT32):
                raise ValueError(f"key {key[:20]!r} is not a token id")
        return bias

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is allowed only with stream: true")
        limit = self.max_new_tokens
        if limit is not None and (self.min_tokens or 0) > limit:
            raise ValueError(f"min_tokens is {self.min_tokens}, allowed is at most the token limit, {limit}")
        guided = (self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)
        if sum(g is not None for g in (self.structured_outputs, *guided)) > 1:
            raise ValueError("expected at most one of structured_outputs and the guided_ fields")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        raise NotImplementedError

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def structure(self) -> StructuredOutputs | None:
        """The extension in its present form, whichever way it was asked for."""
        for name in ("json", "regex", "choice", "grammar"):
            if (value := getattr(self, f"guided_{name}")) is not None:
                return StructuredOutputs.model_validate({name: value})
        return self.structured_outputs


class ChatCompletionRequest(_Sampling, Labels):
    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, le=_INT32)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=_INT32)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    # For the chat template, if it knows them; the second is vLLM's, with names that the operator allows.
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    # As labels, these change no answer.
    modalities: Annotated[list[Literal["text"]], Field(max_length=8, fail_fast=True)] | None = None
    verbosity: Literal["medium"] | None = None
    prediction: Prediction | None = None
    # OpenAI's, and not ours: an answer without them would be another than was asked for.
    audio: None = None
    function_call: None = None  # tools and tool_choice have replaced these two
    functions: None = None
    moderation: None = None
    web_search_options: None = None

    @model_validator(mode="after")
    def _chat_fields_agree(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is allowed only with logprobs: true")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools has a function name twice")
        if isinstance(self.tool_choice, NamedToolChoice) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not among the tools")
        if self.tool_choice in ("auto", "required") and not names:
            raise ValueError(f"tool_choice is {self.tool_choice!r}, but there are no tools")
        structured = self.structure is not None or (
            self.response_format is not None and self.response_format.type != "text"
        )
        if structured and self.forces_tool:
            raise ValueError("a structured response and a forced tool call exclude one another")
        if self.structure is not None and self.response_format is not None:
            raise ValueError("expected at most one of response_format and structured_outputs")
        if self.reasoning_effort is not None and "reasoning_effort" in (self.chat_template_kwargs or ()):
            raise ValueError("reasoning_effort is there twice, in chat_template_kwargs too")
        return self

    @property
    def template_variables(self) -> dict[str, Any]:
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return effort | (self.chat_template_kwargs or {})

    @property
    def forces_tool(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedToolChoice)

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionRequest(_Sampling):
    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    max_tokens: Annotated[int, Field(ge=1, le=_INT32)] | None = 16
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _completion_fields_agree(self) -> Self:
        if len(self.prompts) * (self.n or 1) > MAX_CHOICES:
            raise ValueError(f"{len(self.prompts)} prompts times n = {self.n}, allowed are {MAX_CHOICES} in all")
        if self.structure is not None and self.response_format is not None:
            raise ValueError("expected at most one of response_format and structured_outputs")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        return as_prompts(self.prompt)


class EmbeddingRequest(Strict):
    model: Name
    input: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_LIST)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_LIST)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = None  # no model of ours was trained to be cut
    user: Annotated[str, Field(max_length=512)] | None = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        return as_prompts(self.input)


class TokenizeRequest(Strict):
    """A text, or a conversation through the chat template."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected either prompt or messages")
        for name in ("tools", "chat_template_kwargs"):
            if getattr(self, name) is not None and self.messages is None:
                raise ValueError(f"{name} is allowed only with messages")
        return self


class DetokenizeRequest(Strict):
    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=2**20, fail_fast=True)]


def as_prompts(value: str | list[int] | list[str] | list[list[int]]) -> Sequence[str | list[int]]:
    """One prompt or several, as several."""
    if isinstance(value, str) or isinstance(value[0], int):
        return [value]
    return value


# ---- answers ----


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def now() -> int:
    return int(time.time())
