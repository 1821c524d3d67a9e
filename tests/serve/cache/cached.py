"""A response cache before a scripted backend, and what its tests count."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastattn.serve.cache import CacheConfig, ResponseCache
from fastattn.serve.contract import RequestContext
from fastattn.serve.protocol import ChatCompletionRequest
from tests.serve.fakes import Scripted, chat, chunks, context, text, wait

HEADER = "x-fastattn-cache"


def cache_of(path: Path, inner: Scripted, **fields: Any) -> ResponseCache:
    # whoever tests the answers must not test how fast the machine's disk is
    config = CacheConfig(path=path / "cache.sqlite", **{"lookup_timeout": 60.0} | fields)
    return ResponseCache(config, inner, lambda model: f"digest of {model}")


def echo(pieces: int = 3) -> Scripted:
    """Answers with the tenant and the prompt, so that a crossing shows."""

    def answer(request: Any, ctx: Any) -> Any:
        prompt = request.messages[-1].text if isinstance(request, ChatCompletionRequest) else request.prompt
        return chunks(request, [ctx.tenant, ":", str(prompt), *["."] * (pieces - 3)])

    return Scripted(answer)


def outcomes(cache: ResponseCache) -> dict[str, int]:
    (metric,) = cache._metrics.lookups.collect()
    return {s.labels["outcome"]: int(s.value) for s in metric.samples if s.name.endswith("_total") and s.value}


def said(cache: ResponseCache, *asked: tuple[Any, RequestContext], pause: float = 0.0) -> list[str]:
    """What the cache says of each of these requests, which come one after the other, so many seconds apart; the cache is closed."""

    async def run() -> list[str]:
        for request, ctx in asked:
            await text(cache, request, ctx)
            await cache.flush()
            await asyncio.sleep(pause)
        await cache.close()
        return [ctx.headers[HEADER] for _, ctx in asked]

    return wait(run())


async def answers_all(cache: ResponseCache, prompts: int = 30) -> None:
    for i in range(prompts):
        assert await text(cache, chat(f"p{i % 7}"), context("t")) == f"t:p{i % 7}"
