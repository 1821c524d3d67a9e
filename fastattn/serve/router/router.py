"""One endpoint over several models: which one answers, and what happens when it does not."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import msgspec
from prometheus_client import CollectorRegistry

from fastattn import __version__
from fastattn.serve.contract import DELTA_TEXTS, APIError, Backend, Chunk, RequestContext
from fastattn.serve.router.confidence import Confidence, Request, with_logprobs, without_logprobs
from fastattn.serve.router.config import CascadeConfig, RouterConfig
from fastattn.serve.router.deployment import Deployment, cost, is_retryable
from fastattn.serve.router.health import Breaker, RetryBudget
from fastattn.serve.router.metrics import RouterMetrics
from fastattn.serve.router.rules import Route
from fastattn.serve.router.upstream import Upstream, UpstreamError

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger("fastattn.serve.router")

MODEL_HEADER, ROUTE_HEADER = "x-fastattn-model", "x-fastattn-route"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0  # seconds before a retry; it doubles


class Router:
    """A Backend over engines and upstreams. Close it at the end.

    engines: this server's own, by the names that model_list uses. digests: of their weights and templates, for the response
    cache. transport: of all upstreams, for tests.
    """

    def __init__(
        self,
        config: RouterConfig,
        engines: Mapping[str, Backend],
        digests: Mapping[str, str] | None = None,
        *,
        registry: CollectorRegistry | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.config, self.metrics = config, RouterMetrics(registry)
        self._digests: Mapping[str, str] = {} if digests is None else digests
        self._upstreams: list[Upstream] = []
        self._deployments: dict[str, list[Deployment]] = {name: [] for name in config.model_names}
        for number, entry in enumerate(config.model_list):
            if entry.engine is None:
                backend: Backend = Upstream(entry, transport)
                self._upstreams.append(backend)  # type: ignore[arg-type]
            elif entry.engine in engines:
                backend = engines[entry.engine]
            else:
                known = ", ".join(sorted(engines)) or "none"
                raise ValueError(f"router.model_list[{number}].engine is {entry.engine!r}, known are {known}")
            breaker = Breaker(config.allowed_fails, config.cooldown_time)
            label = f"{entry.model_name}#{len(self._deployments[entry.model_name])}"
            self._deployments[entry.model_name].append(Deployment(label, entry, backend, breaker, self.metrics))
        self._routes = {name: Route(route) for name, route in config.routes.items()}
        self._budget = RetryBudget(config.retry_budget)
        self._random = random.Random()  # noqa: S311 - spreads retries in time

    async def close(self) -> None:
        for upstream in self._upstreams:
            await upstream.close()

    @property
    def model_names(self) -> list[str]:
        """What a client may name."""
        return self.config.public_names

    def fingerprint(self, model: str) -> str | None:
        """Equal as long as the same request is answered by the same models in the same way; None for an unknown name."""
        if model not in self.model_names:
            return None
        places: list[list[Any]] = []
        for entry in self.config.model_list:
            if entry.engine is not None:
                if entry.engine not in self._digests:
                    return None
                places.append([entry.model_name, self._digests[entry.engine]])
            else:
                places.append([entry.model_name, entry.api_base, entry.model, entry.revision])
        ways = self.config.model_dump(mode="json", include={"routes", "cascades", "model_group_alias"})
        return msgspec.json.encode([__version__, places, ways]).decode()

    async def stream(self, request: Request, context: RequestContext) -> AsyncIterator[Chunk]:
        name = self.config.model_group_alias.get(request.model, request.model)
        why = "fixed"
        if name in self._routes:
            name, why = self._routes[name].choose(request, context)
        if name in self.config.cascades:
            answer = self._cascade(name, request, context, why)
        elif name in self._deployments:
            answer = self.answer(name, request, context, why)
        else:
            known = ", ".join(self.model_names)
            raise APIError(404, f"the model {request.model[:128]!r} does not exist, there are {known}", "not_found_error",
                           param="model", code="model_not_found")  # fmt: skip
        async with aclosing(answer) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                yield chunk

    async def answer(self, model: str, request: Request, context: RequestContext, why: str) -> AsyncIterator[Chunk]:
        """By this model or its fallbacks: the one retry loop. After the first words there is no other attempt."""
        self._budget.request()
        error: APIError | None = None
        for candidate in (model, *self.config.fallbacks.get(model, ())):
            tried: list[Deployment] = []
            for attempt in range(1 + self.config.num_retries):
                deployment = self._pick(candidate, tried)
                if deployment is None:
                    break
                if error is not None and not await self._may_retry(model, attempt, deployment):
                    raise error
                tried.append(deployment)
                try:
                    async with aclosing(self._attempt(deployment, request, context)) as chunks:  # type: ignore[type-var]
                        first = True
                        async for chunk in chunks:
                            if first:
                                self._say(context, model, candidate, why)
                                first, error = False, None
                            yield chunk
                    self.metrics.requests.labels(candidate, "ok").inc()
                    return
                except APIError as failure:
                    if not first or not is_retryable(failure):
                        self.metrics.requests.labels(candidate, "failed" if is_retryable(failure) else "refused").inc()
                        raise
                    error = failure
                    logger.info("request %s: %s: %s", context.request_id, deployment.label, failure.message)
        self.metrics.requests.labels(model, "unavailable").inc()
        raise error or self._all_rest(model)

    async def _attempt(self, deployment: Deployment, request: Request, context: RequestContext) -> AsyncIterator[Chunk]:
        """Nothing comes out before the first words, so whoever reads can still turn elsewhere until then."""
        request = request.model_copy(update={"model": deployment.config.engine or deployment.config.model_name})
        outcome = "left"
        error: APIError | None = None
        held: list[Chunk] | None = []
        deployment.num_in_flight += 1
        try:
            async with aclosing(deployment.backend.stream(request, context)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    chunk["model"] = deployment.config.model_name
                    if chunk.get("usage"):
                        deployment.count_usage(chunk["usage"])
                    if held is not None:
                        held.append(chunk)
                        if not _has_words(chunk):
                            continue
                        deployment.note("alive")
                        for early in held:
                            yield early
                        held = None
                    else:
                        yield chunk
            if held is not None:
                raise UpstreamError(f"model {deployment.config.model_name!r}: its answer was empty")
            outcome = "ok"
        except APIError as failure:
            outcome, error = "failed" if is_retryable(failure) else "refused", failure
            raise
        except Exception:
            outcome = "failed"
            raise
        finally:
            deployment.num_in_flight -= 1
            deployment.note(outcome, error)

    def _pick(self, model: str, tried: list[Deployment]) -> Deployment | None:
        """The least busy one that does not rest; those not yet tried for this request go first."""
        for deployment in sorted(self._deployments[model], key=lambda d: (tried.count(d), d.num_in_flight)):
            if deployment.breaker.acquire():
                return deployment
        return None

    async def _may_retry(self, model: str, attempt: int, deployment: Deployment) -> bool:
        if not self._budget.spend():
            deployment.breaker.left()
            self.metrics.no_budget.inc()
            return False
        self.metrics.retries.labels(model).inc()
        if attempt:  # another model is asked at once
            pause = min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE)
            try:
                await asyncio.sleep(pause * self._random.uniform(0.5, 1.5))
            except asyncio.CancelledError:
                deployment.breaker.left()
                raise
        return True

    def _say(self, context: RequestContext, model: str, answering: str, why: str) -> None:
        if answering != model:
            self.metrics.fallbacks.labels(answering).inc()
            context.cacheable = False
            why += f";fallback-for={model}"
        context.headers[MODEL_HEADER], context.headers[ROUTE_HEADER] = answering, why

    def _all_rest(self, model: str) -> APIError:
        names = (model, *self.config.fallbacks.get(model, ()))
        seconds = min(d.breaker.seconds_left for name in names for d in self._deployments[name])
        return APIError(
            503, f"model {model!r} cannot be had at the moment", "overloaded_error", code="model_unavailable",
            headers={"Retry-After": str(max(1, math.ceil(seconds)))},
        )  # fmt: skip

    async def _cascade(self, name: str, request: Request, context: RequestContext, why: str) -> AsyncIterator[Chunk]:
        """The first model's answer if it is sure of it, else the capable one's. Nothing is sent before that is known."""
        cascade = self.config.cascades[name]
        kept, confidence, is_whole = await self._first_answer(cascade, request, context, why)
        sure = confidence is not None and confidence >= cascade.threshold
        said = "none" if confidence is None else f"{confidence:.3f}"
        if is_whole and sure:
            self._count_kept(name, cascade, kept)
            context.headers[ROUTE_HEADER] = f"{why};cascade={name};confidence={said}"
            for chunk in kept:
                yield without_logprobs(chunk, request)
            return
        self.metrics.cascades.labels(name, "escalated").inc()
        started, context.cacheable = False, True
        try:
            why_then = f"{why};cascade={name};confidence={said};escalated"
            async with aclosing(self.answer(cascade.then, request, context, why_then)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    started = True
                    yield chunk
        except APIError as error:
            if started or not is_whole or cascade.if_unavailable == "error" or not is_retryable(error):
                raise
            self.metrics.cascades.labels(name, "unsure").inc()
            self._say(
                context,
                cascade.first,
                cascade.first,
                f"{why};cascade={name};confidence={said};unavailable={cascade.then}",
            )
            context.cacheable = False
            for chunk in kept:
                yield without_logprobs(chunk, request)

    async def _first_answer(
        self, cascade: CascadeConfig, request: Request, context: RequestContext, why: str
    ) -> tuple[list[Chunk], float | None, bool]:
        """(chunks, confidence, whether the answer is whole)."""
        kept: list[Chunk] = []
        meter = Confidence(cascade.confidence)
        if getattr(request, "echo", None):  # the prompt's log-probabilities would count as the answer's
            return kept, None, False
        try:
            async with aclosing(self.answer(cascade.first, with_logprobs(request), context, why)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    kept.append(chunk)
                    meter.add(chunk)
        except APIError as error:
            if not is_retryable(error):
                raise
            return kept, None, False
        return kept, meter.value, True

    def _count_kept(self, name: str, cascade: CascadeConfig, kept: list[Chunk]) -> None:
        self.metrics.cascades.labels(name, "kept").inc()
        usage: dict[str, Any] = next((chunk["usage"] for chunk in reversed(kept) if chunk.get("usage")), {})
        first, then = (self._deployments[model][0].config for model in (cascade.first, cascade.then))
        self.metrics.saved.labels(name).inc(max(0.0, cost(then, usage) - cost(first, usage)))


def _has_words(chunk: Chunk) -> bool:
    """Whether a client would see something of it, an end included."""
    for choice in chunk["choices"]:
        delta = choice.get("delta") or {}
        said = (choice.get("text"), choice.get("finish_reason"), *(delta.get(name) for name in DELTA_TEXTS))
        if any(said) or delta.get("tool_calls"):
            return True
    return False


def build_router(
    config: RouterConfig,
    engines: Mapping[str, Backend],
    digests: Mapping[str, str] | None = None,
    *,
    registry: CollectorRegistry | None = None,
) -> Router:
    """The router of a configuration. Raises ValueError for an engine that is not there, or a key file without a key."""
    return Router(config, engines, digests, registry=registry)
