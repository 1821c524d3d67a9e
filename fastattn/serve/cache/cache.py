"""The response cache: an answer that was given before is given again, to the same tenant for the same request."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from fastattn.serve.cache.config import CacheConfig
from fastattn.serve.cache.database import Entry
from fastattn.serve.cache.flight import Flight, decode_chunk
from fastattn.serve.cache.key import request_key
from fastattn.serve.cache.metrics import CacheMetrics
from fastattn.serve.cache.store import Store
from fastattn.serve.contract import Backend, Chunk, RequestContext

if TYPE_CHECKING:
    from fastattn.serve.cache.encoder import Encoder
    from fastattn.serve.cache.semantic import Asked, SemanticLookup
    from fastattn.serve.protocol import ChatCompletionRequest, CompletionRequest

logger = logging.getLogger("fastattn.serve.cache")

HEADER = "x-fastattn-cache"
# Of the parts below; what they say of an answer holds for its repeats.
_KEPT_HEADERS = ("x-fastattn-model",)


class ResponseCache:
    """A Backend around another.

    fingerprint: of what answers a model name (weights, template, router, version); None when it is not known, and then
    nothing is kept. Close it at the end: hits are noted, what is being stored is written.
    """

    def __init__(
        self,
        config: CacheConfig,
        inner: Backend,
        fingerprint: Callable[[str], str | None],
        *,
        encoder: Encoder | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self._config, self._inner, self._fingerprint = config, inner, fingerprint
        self._metrics = CacheMetrics(registry)
        self._store = Store(config, self._metrics)
        self._flights: dict[bytes, Flight] = {}
        self._running: set[Flight] = set()
        self._semantic: SemanticLookup | None = None
        if config.semantic and encoder:  # not before: it brings numpy, which nothing else of a front wants
            from fastattn.serve.cache.semantic import SemanticLookup

            self._semantic = SemanticLookup(config.semantic, encoder)

    async def stream(
        self, request: ChatCompletionRequest | CompletionRequest, context: RequestContext
    ) -> AsyncIterator[Chunk]:
        async with aclosing(self._stream(request, context)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                yield chunk

    async def _stream(
        self, request: ChatCompletionRequest | CompletionRequest, context: RequestContext
    ) -> AsyncIterator[Chunk]:
        key = self._key(request, context)
        if key is None:
            self._say(context, "bypass")
            async with aclosing(self._inner.stream(request, context)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    yield chunk
            return
        asked: Asked | None = None
        if self._joinable(key) is None and "no-cache" not in context.cache_control:
            max_age = _max_age(context.cache_control)
            served, entry, outcome = key, await self._store.get(key, max_age), "hit"
            if entry is None and self._semantic is not None:
                asked = await self._semantic.ask(request, self._fingerprint(request.model) or "", context)
                if asked is not None:
                    served, entry, outcome = await self._semantic_hit(asked, max_age)
            if entry is not None:
                self._say(context, outcome)
                context.on_refusal.append(lambda: self._store.delete(served))
                async for chunk in _replay(entry, context):
                    yield chunk
                return
        flight = self._joinable(key)
        self._say(context, "miss" if flight is None else "joined")
        if flight is None:
            flight = self._take_off(key, request, context, asked)
        context.on_refusal.append(lambda: self._refuse(key, flight))
        async with aclosing(flight.read(context.headers)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                context.usage = flight.context.usage
                yield chunk

    async def close(self) -> None:
        for flight in list(self._running):
            await flight.cancel()
        await self._store.close()
        if self._semantic is not None:
            self._semantic.close()

    async def flush(self) -> None:
        """Waits until what was answered so far is stored."""
        await self._store.flush()

    def _key(self, request: ChatCompletionRequest | CompletionRequest, context: RequestContext) -> bytes | None:
        if "no-store" in context.cache_control:
            return None
        if not self._config.cache_sampled and request.temperature != 0 and request.seed is None:
            return None
        fingerprint = self._fingerprint(request.model)
        if fingerprint is None:
            return None
        try:
            return request_key(request, fingerprint, context.tenant, context.request_headers)
        except UnicodeEncodeError:
            return None

    def _say(self, context: RequestContext, outcome: str) -> None:
        kind = outcome.partition(";")[0]
        self._metrics.lookups.labels(kind).inc()
        context.headers[HEADER] = "hit" if kind == "joined" else outcome

    def _joinable(self, key: bytes) -> Flight | None:
        flight = self._flights.get(key)
        return None if flight is None or flight.is_over else flight

    def _take_off(
        self,
        key: bytes,
        request: ChatCompletionRequest | CompletionRequest,
        context: RequestContext,
        asked: Asked | None,
    ) -> Flight:
        def land(flight: Flight) -> None:
            self._running.discard(flight)
            if self._flights.get(key) is flight:
                del self._flights[key]
            if flight.is_complete and flight.num_bytes <= self._config.max_entry_bytes:
                kept = {name: flight.context.headers[name] for name in _KEPT_HEADERS if name in flight.context.headers}
                self._store.put(key, Entry(time.time(), kept, flight.chunks), asked.question if asked else None)

        flight = self._flights[key] = Flight(self._inner, request, context, land)
        self._running.add(flight)
        return flight

    def _refuse(self, key: bytes, flight: Flight) -> None:
        if flight.is_over:
            self._store.delete(key)
        flight.refused = True

    async def _semantic_hit(self, asked: Asked, max_age: float | None) -> tuple[bytes, Entry | None, str]:
        """(the key under which it was found, the answer, how it is called)."""
        assert self._semantic is not None
        found = self._semantic.best(asked, await self._store.questions(asked.question.partition) or [])
        if found is None:
            return b"", None, ""
        key, score = found
        return key, await self._store.get(key, max_age), f"semantic;score={score:.3f}"


async def _replay(entry: Entry, context: RequestContext) -> AsyncIterator[Chunk]:
    """The answer in its original chunks, under the name and time of this request."""
    context.headers.update({name: value for name, value in entry.headers.items() if name not in context.headers})
    context.usage = decode_chunk(entry.chunks[-1]).get("usage") if entry.chunks else None
    created = int(time.time())
    for raw in entry.chunks:
        chunk = decode_chunk(raw)
        if isinstance(chunk.get("id"), str):
            chunk["id"] = f"{chunk['id'].partition('-')[0]}-{context.request_id}"
        chunk["created"] = created
        yield chunk
        await asyncio.sleep(0)  # others' turns between the chunks of a long answer


def _max_age(directives: frozenset[str]) -> float | None:
    """Seconds of `max-age=N`; None without one. What is no number is read as 0, the careful way."""
    for directive in directives:
        name, _, value = directive.partition("=")
        if name == "max-age":
            return float(value) if value.isascii() and value.isdigit() else 0.0
    return None


def build_cache(
    config: CacheConfig,
    inner: Backend,
    fingerprint: Callable[[str], str | None],
    *,
    registry: CollectorRegistry | None = None,
) -> ResponseCache:
    """The cache of a configuration; loads the encoder if semantic lookup is on.

    Raises ValueError for an encoder that cannot be loaded, ImportError naming the extra without `transformers`.
    """
    encoder = None
    if config.semantic is not None:
        from fastattn.serve.cache.encoder import load_encoder

        encoder = load_encoder(config.semantic.encoder)
        logger.warning("response cache: semantic lookup is on; an answer may be that to another question")
    return ResponseCache(config, inner, fingerprint, encoder=encoder, registry=registry)
