"""Puts together what answers: traces, guardrails, cache and router where they are configured, the engines behind them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from fastattn.serve.contract import Backend, Chunk, RequestContext
from fastattn.serve.protocol import ChatCompletionRequest, CompletionRequest
from fastattn.serve.state import ServerState


@dataclass(frozen=True)
class Chain:
    """front: what gets the requests. closers: of the parts, from front to back."""

    front: Backend
    closers: tuple[Callable[[], Awaitable[None]], ...] = ()

    async def close(self) -> None:
        for close in self.closers:
            await close()


class Engines:
    """The engine that a request names."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def stream(
        self, request: ChatCompletionRequest | CompletionRequest, context: RequestContext
    ) -> AsyncIterator[Chunk]:
        return self._state.engine(request.model).stream(request, context)


def build_chain(state: ServerState) -> Chain:
    """Raises ValueError or ImportError for a part that cannot be made as it is configured."""
    config, registry = state.config, state.metrics.registry
    closers: list[Callable[[], Awaitable[None]]] = []
    digests = {name: engine.info.digest for name, engine in state.engines.items()}
    backend: Backend = Engines(state)

    def fingerprint(model: str) -> str | None:
        engine = state.find_engine(model)
        return None if engine is None else engine.info.digest

    if config.router is not None:
        from fastattn.serve.router import build_router

        router = build_router(config.router, state.engines, digests, registry=registry)
        backend, fingerprint = router, router.fingerprint
        closers.insert(0, router.close)
    if config.cache is not None:
        from fastattn.serve.cache import build_cache

        cache = build_cache(config.cache, backend, fingerprint, registry=registry)
        backend = cache
        closers.insert(0, cache.close)
    if config.guardrails is not None:
        from fastattn.serve.guardrails import build_guardrails

        guards = build_guardrails(config.guardrails, backend, decode=_decoder(state), registry=registry)
        backend = guards
        closers.insert(0, guards.close)
    if config.otlp_traces_endpoint is not None:
        from fastattn.serve.tracing import Tracing

        traced = Tracing(backend, config.otlp_traces_endpoint)
        backend = traced
        closers.append(traced.close)
    return Chain(backend, tuple(closers))


def _decoder(state: ServerState) -> Callable[[str, list[int]], Awaitable[str]]:
    """Token ids to text, for guards that look at prompts of ids: by the tokenizer of the engine that a request names."""

    async def decode(model: str, token_ids: list[int]) -> str:
        engine = state.find_engine(model)
        if engine is None:
            raise ValueError(
                f"a prompt of token ids cannot be looked at for {model!r}, which is no engine of this server"
            )
        return await engine.renderer.decode(token_ids)

    return decode
