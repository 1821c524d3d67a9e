"""How sure a model was of its own answer: the log-probabilities of the tokens that it chose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from fastattn.serve.contract import Chunk
from fastattn.serve.protocol import ChatCompletionRequest, CompletionRequest

Request = ChatCompletionRequest | CompletionRequest


class Confidence:
    """mean: of all tokens of all choices; min: of the least likely one. None without tokens."""

    def __init__(self, kind: Literal["mean", "min"]) -> None:
        self._kind = kind
        self._sum, self._count, self._min = 0.0, 0, 0.0

    def add(self, chunk: Chunk) -> None:
        for value in _logprobs(chunk):
            self._sum, self._count, self._min = self._sum + value, self._count + 1, min(self._min, value)

    @property
    def value(self) -> float | None:
        if not self._count:
            return None
        return self._sum / self._count if self._kind == "mean" else self._min


def with_logprobs(request: Request) -> Request:
    if isinstance(request, ChatCompletionRequest):
        return request if request.logprobs else request.model_copy(update={"logprobs": True})
    return request if request.logprobs is not None else request.model_copy(update={"logprobs": 0})


def without_logprobs(chunk: Chunk, request: Request) -> Chunk:
    """The chunk as it would be if we had not asked for more than the client did."""
    asked = bool(request.logprobs) if isinstance(request, ChatCompletionRequest) else request.logprobs is not None
    if asked:
        return chunk
    return {**chunk, "choices": [{**choice, "logprobs": None} for choice in chunk["choices"]]}


def _logprobs(chunk: Chunk) -> Iterator[float]:
    for choice in chunk["choices"]:
        found = choice.get("logprobs") or {}
        rows: list[Any] = [row.get("logprob") for row in found.get("content") or () if isinstance(row, dict)]
        for value in rows + list(found.get("token_logprobs") or ()):
            if isinstance(value, int | float):
                yield max(float(value), -9999.0)  # what OpenAI says for "hardly ever"
