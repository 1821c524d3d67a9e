"""How the parts of the server fit together: everything that answers is a `Backend`, and an answer is a stream of chunks.

    guardrails ──► response cache ──► router ──► engine client   (our engine process)
                                          └────► upstream        (another OpenAI-compatible server)

Each box is a Backend that wraps the next. A request that was not to be streamed runs the same way, and its chunks are
folded into one answer at the end: there is one path to test. Chunks always carry what the client may not have asked for
(the last one has `usage`); the front drops it on the way out.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from fastattn.serve.protocol import ChatCompletionRequest, CompletionRequest

# A `chat.completion.chunk` or streamed `text_completion` object of OpenAI's API, ready for JSON.
Chunk = dict[str, Any]
# Texts in the delta of a chat's chunk; the last two are what servers call a model's thinking.
DELTA_TEXTS = ("content", "refusal", "reasoning_content", "reasoning")

ErrorType = Literal[
    "invalid_request_error", "authentication_error", "permission_error", "not_found_error", "rate_limit_error",
    "content_policy_error", "overloaded_error", "server_error",
]  # fmt: skip


class APIError(Exception):
    """An answer that is an error, in OpenAI's shape: {"error": {message, type, param, code}} with an HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        type: ErrorType = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code
        self.headers = headers or {}  # such as Retry-After

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


@dataclass
class RequestContext:
    """What is known of a request beside its body. Made by the front, passed down, never global.

    request_id: made by the server, 128 random bits; a client's own id is only a label in the log. tenant: from the API key;
    "" without keys. priority: lower goes first. cache_control: the request's Cache-Control directives, lower case.
    request_headers: by lower-case name; the front fills in those that a rule of the router names, and no others.
    headers: response headers that the parts add (x-fastattn-model, x-fastattn-route, x-fastattn-cache); sent with the
    first chunk, so they must be set before it is given out. on_refusal: a guard that blocks or redacts an answer calls
    these, so that what it kept from the client is not kept elsewhere. cacheable: the router says no when another model than
    the chosen one had to answer. trace: W3C's trace headers, as they came and as they go on to another server. usage: of the
    answer so far, where its maker counts; for a guard that ends it early.
    """

    request_id: str
    tenant: str = ""
    priority: int = 0
    cache_control: frozenset[str] = frozenset()
    request_headers: Mapping[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    on_refusal: list[Callable[[], None]] = field(default_factory=list)
    cacheable: bool = True
    trace: dict[str, str] = field(default_factory=dict)
    usage: dict[str, Any] | None = None


class Backend(Protocol):
    def stream(
        self, request: ChatCompletionRequest | CompletionRequest, context: RequestContext
    ) -> AsyncIterator[Chunk]:
        """Answers a validated request. Closing the iterator early aborts the work; whoever wraps a stream closes it.

        Raises APIError, before the first chunk wherever that is possible.
        """
        ...
