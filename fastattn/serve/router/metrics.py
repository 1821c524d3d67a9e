"""What the router counts. Labels are names of the configuration and words of the code, never of a request."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class RouterMetrics:
    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"fastattn:router_{name}", text, labels, registry=registry)

        self.requests = counter("requests", "Requests by the model that answered and how it ended.", "model", "outcome")
        self.attempts = counter("attempts", "Attempts at a deployment.", "deployment", "outcome")
        self.retries = counter("retries", "Attempts after the first.", "model")
        self.fallbacks = counter("fallbacks", "Requests answered by another model than the one chosen.", "model")
        self.no_budget = counter("retry_budget_exhausted", "Retries that were left out for want of budget.")
        self.cascades = counter("cascade", "Cascades by their decision.", "cascade", "decision")
        self.tokens = counter("tokens", "Tokens by model, those of discarded answers included.", "model", "kind")
        self.cost = counter("cost", "Price of all answers, in the operator's currency.", "model")
        self.saved = counter(
            "saved_cost", "Price of kept cascade answers at the capable model, less their own.", "cascade"
        )
        self.breaker = Gauge(
            "fastattn:router_breaker_open",
            "1 while a deployment rests.",
            ["deployment"],
            registry=registry,
        )
