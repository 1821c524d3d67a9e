"""Puts together what answers: guardrails, cache and router where they are configured, the engines behind them."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastattn.serve.contract import Backend, Chunk, RequestContext
from fastattn.serve.protocol import ChatCompletionRequest, CompletionRequest
from fastattn.serve.state import ServerState


class Engines:
    """The engine that a request names."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def stream(
        self, request: ChatCompletionRequest | CompletionRequest, context: RequestContext
    ) -> AsyncIterator[Chunk]:
        return self._state.engine(request.model).stream(request, context)


def build_chain(state: ServerState) -> Backend:
    return Engines(state)
