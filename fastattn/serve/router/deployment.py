"""One place where a model runs, with what is known of how it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastattn.serve.contract import APIError, Backend
from fastattn.serve.router.config import DeploymentConfig
from fastattn.serve.router.health import Breaker
from fastattn.serve.router.metrics import RouterMetrics
from fastattn.serve.router.upstream import UpstreamError

_RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})


@dataclass
class Deployment:
    """label: for metrics. num_in_flight: requests there now; the one with the fewest gets the next."""

    label: str
    config: DeploymentConfig
    backend: Backend
    breaker: Breaker
    metrics: RouterMetrics
    num_in_flight: int = 0

    def note(self, outcome: str, error: BaseException | None = None) -> None:
        """outcome: "alive" with its first words, then "ok", "failed", "refused" (the request was wrong) or "left"."""
        if outcome == "alive":
            self.breaker.alive()
        elif outcome == "ok":
            self.breaker.succeeded()
        elif outcome == "failed" and not self._is_only_full(error):
            self.breaker.failed(error.retry_after if isinstance(error, UpstreamError) else None)
        else:
            self.breaker.left()
        if outcome != "alive":
            self.metrics.attempts.labels(self.label, outcome).inc()
        self.metrics.breaker.labels(self.label).set(self.breaker.state != "closed")

    def count_usage(self, usage: dict[str, Any]) -> None:
        prompt, completion = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
        self.metrics.tokens.labels(self.config.model_name, "prompt").inc(prompt)
        self.metrics.tokens.labels(self.config.model_name, "completion").inc(completion)
        self.metrics.cost.labels(self.config.model_name).inc(cost(self.config, usage))

    def _is_only_full(self, error: BaseException | None) -> bool:
        """Our own engine refuses what does not fit its queue; it is well, and the next request may fit."""
        return self.config.engine is not None and isinstance(error, APIError) and error.type == "overloaded_error"


def cost(config: DeploymentConfig, usage: dict[str, Any]) -> float:
    prompt, completion = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    return (prompt * config.input_cost + completion * config.output_cost) / 1e6


def is_retryable(error: APIError) -> bool:
    """Whether another attempt, or another model, may do better."""
    return error.status in _RETRYABLE


def _count(usage: dict[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) and value >= 0 else 0
