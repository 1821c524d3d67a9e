"""OpenAI's Responses: what a client may send, as a conversation; nothing is kept here, so that each request brings all of it.

The items of a conversation become the messages of a chat, and so an answer passes the same guards, cache and router.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError, model_validator
from typing_extensions import Self

from fastattn.serve.contract import APIError
from fastattn.serve.protocol import (
    MAX_LIST,
    MAX_LOGPROBS,
    ChatCompletionRequest,
    Drawing,
    JSONObject,
    Labels,
    Strict,
    TemplateKwargs,
    Text,
    ToolName,
    few_parts,
)
from fastattn.serve.validation import validation_error

LOGPROBS = "message.output_text.logprobs"
_INT32 = 2**31 - 1

Id = Annotated[str, Field(max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]


# The first wrong one says enough, as of token ids; log-probabilities of an answer are as many as its tokens.
_Objects = Annotated[list[JSONObject], Field(max_length=2**17, fail_fast=True)]


class TextPart(Strict):
    """annotations, logprobs: of an answer that is sent back as it came."""

    type: Literal["input_text", "output_text"]
    text: Text
    annotations: _Objects | None = None
    logprobs: _Objects | None = None
    prompt_cache_breakpoint: JSONObject | None = None


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: Text


class ReasoningPart(Strict):
    type: Literal["reasoning_text", "summary_text"]
    text: Text


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class MessageItem(Strict):
    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: Text | Annotated[list[Part], Field(max_length=MAX_LIST)]
    id: Id | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class CallItem(Strict):
    type: Literal["function_call"]
    call_id: Id
    name: ToolName
    arguments: Text
    id: Id | None = None
    status: Status | None = None


class OutputItem(Strict):
    type: Literal["function_call_output"]
    call_id: Id
    output: Text | Annotated[list[TextPart], Field(max_length=MAX_LIST)]
    id: Id | None = None
    status: Status | None = None


class ReasoningItem(Strict):
    type: Literal["reasoning"]
    id: Id | None = None
    summary: Annotated[list[ReasoningPart], Field(max_length=MAX_LIST)] | None = None
    content: Annotated[list[ReasoningPart], Field(max_length=MAX_LIST)] | None = None
    encrypted_content: None = None
    status: Status | None = None


Item = Annotated[MessageItem | CallItem | OutputItem | ReasoningItem, Field(discriminator="type")]


def _with_types(items: Any) -> Any:
    """A message may leave its type out."""
    if not isinstance(items, list):
        return items
    return [{"type": "message", **i} if isinstance(i, dict) and "role" in i else i for i in items]


Items = Annotated[
    list[Item], Field(min_length=1, max_length=MAX_LIST), BeforeValidator(_with_types), BeforeValidator(few_parts)
]


class FunctionTool(Strict):
    type: Literal["function"]
    name: ToolName
    description: Text | None = None
    parameters: JSONObject | None = None
    strict: bool | None = None
    defer_loading: Literal[False] | None = None


class ChosenFunction(Strict):
    type: Literal["function"]
    name: ToolName


class TextFormat(Strict):
    type: Literal["text", "json_object"]


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    schema_: JSONObject = Field(alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    format: Annotated[TextFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(Strict):
    """summary: "auto" may be none, and is."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class StreamOptions(Strict):
    include_obfuscation: bool | None = None  # padding against traffic analysis; we send none


class ResponsesRequest(Drawing, Labels):
    # Tags in capitals are no part of a field's name in errors.
    input: Annotated[
        Annotated[Text, Tag("Text")] | Annotated[Items, Tag("Items")],
        Discriminator(lambda value: "Text" if isinstance(value, str) else "Items"),
    ]
    instructions: Text | None = None
    include: (
        Annotated[list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]], Field(max_length=8)]
        | None
    ) = None
    max_output_tokens: Annotated[int, Field(ge=1, le=_INT32)] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: TemplateKwargs | None = None  # vLLM's extension
    # As labels, these change no answer.
    background: Literal[False] | None = None
    stream_options: StreamOptions | None = None
    truncation: Literal["disabled"] | None = None
    # OpenAI's, and not ours: they want what is kept between requests, or tools of the server's own.
    access_programs: None = None
    background_options: None = None
    context_management: None = None
    conversation: None = None
    image: None = None
    max_tool_calls: None = None
    moderation: None = None
    previous_response_id: None = None
    prompt: None = None

    @model_validator(mode="after")
    def _asks_for_logprobs_once(self) -> Self:
        if self.top_logprobs is not None and not self.wants_logprobs:
            raise ValueError(f"top_logprobs is allowed only with include: [{LOGPROBS!r}]")
        return self

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    def as_chat(self) -> ChatCompletionRequest:
        """The same as a chat. Raises APIError for what is wrong in one, such as a tool_choice that is no tool."""
        names = (*Drawing.model_fields, "parallel_tool_calls", "top_logprobs", "chat_template_kwargs", "stream")
        chat: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        chat["messages"] = self._messages()
        if self.max_output_tokens is not None:
            chat["max_completion_tokens"] = self.max_output_tokens
        if self.wants_logprobs:
            chat["logprobs"] = True
        if self.reasoning is not None and self.reasoning.effort is not None:
            chat["reasoning_effort"] = self.reasoning.effort
        if self.text is not None and self.text.format is not None:
            given = self.text.format.model_dump(by_alias=True, exclude_none=True)
            kind = given.pop("type")
            chat["response_format"] = {"type": kind, **({"json_schema": given} if given else {})}
        if self.tools:
            chat["tools"] = [
                {"type": "function", "function": tool.model_dump(exclude={"type", "defer_loading"}, exclude_none=True)}
                for tool in self.tools
            ]
        if isinstance(self.tool_choice, ChosenFunction):
            chat["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        elif self.tool_choice is not None:
            chat["tool_choice"] = self.tool_choice
        if self.tool_choice == "auto" and not self.tools:  # some clients always say it
            del chat["tool_choice"]
        try:
            return ChatCompletionRequest.model_validate(chat)
        except ValidationError as error:
            found = validation_error(error)
            if (found.param or "").startswith("messages"):
                found = APIError(400, f"input: {found.message.partition(': ')[2]}", param="input", code=found.code)
            raise found from None

    def _messages(self) -> list[dict[str, Any]]:
        """A turn of the assistant's is one message: what it thought, what it said, and what it called."""
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        turn: dict[str, Any] = {}
        for item in self.input:
            if isinstance(item, OutputItem) or (isinstance(item, MessageItem) and item.role != "assistant"):
                turn = {}
                messages.append(_message(item))
                continue
            # What comes between calls and what they gave belongs to the calls' turn; else words end one, and thoughts begin one.
            if not turn or ("content" in turn and "tool_calls" not in turn and not isinstance(item, CallItem)):
                turn = {"role": "assistant"}
                messages.append(turn)
            for name, value in _of_turn(item).items():
                turn[name] = turn[name] + value if name in turn else value
        for message in messages:
            if message["role"] == "assistant" and not message.keys() & {"content", "tool_calls", "refusal"}:
                message["content"] = ""
        return messages


def _message(item: MessageItem | OutputItem) -> dict[str, Any]:
    if isinstance(item, OutputItem):
        return {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
    return {"role": item.role, "content": _text(item.content)}


def _of_turn(item: MessageItem | CallItem | ReasoningItem) -> dict[str, Any]:
    """What an item adds to the assistant's message."""
    if isinstance(item, CallItem):
        function = {"name": item.name, "arguments": item.arguments}
        return {"tool_calls": [{"id": item.call_id, "type": "function", "function": function}]}
    if isinstance(item, ReasoningItem):
        thought = "".join(part.text for part in item.content or item.summary or ())
        return {"reasoning_content": thought} if thought else {}
    refusals = [] if isinstance(item.content, str) else [p.refusal for p in item.content if isinstance(p, RefusalPart)]
    said: dict[str, Any] = {"content": _text(item.content)}
    return said | ({"refusal": "".join(refusals)} if refusals else {})


def _text(content: str | list[TextPart] | list[Part]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.text for part in content if isinstance(part, TextPart))
