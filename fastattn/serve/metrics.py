"""Prometheus metrics under the names that vLLM's dashboards use, with `fastattn:` in front.

Labels come from closed sets only: what a client sends never makes a new series.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

# Metric → the engine's counter.
_COUNTERS = {
    "prompt_tokens": ("num_prompt_tokens", "Prompt tokens computed."),
    "generation_tokens": ("num_generated_tokens", "Tokens generated."),
    "num_preemptions": ("num_preemptions", "Requests that had to give way and were computed again."),
    "prefix_cache_queries": ("num_prefix_queried_tokens", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("num_prefix_hit_tokens", "Prompt tokens found in the prefix cache."),
    "engine_steps": ("num_steps", "Steps of the engine."),
    "spec_decode_num_draft_tokens": ("num_draft_tokens", "Tokens proposed by speculation."),
    "spec_decode_num_accepted_tokens": ("num_accepted_tokens", "Proposed tokens that the model confirmed."),
}
_GAUGES = {
    "num_requests_running": ("num_running", "Sequences that take part in steps."),
    "num_requests_waiting": ("num_waiting", "Sequences that wait for a place."),
}


class EngineNumbers(Collector):
    """The engine's own counters. Another process after a restart counts from 0; what is shown never falls."""

    def __init__(self) -> None:
        self._now: dict[str, float] = {}
        self._before: dict[str, float] = {}

    def update(self, values: Mapping[str, float]) -> None:
        self._now = dict(values)

    def restarted(self) -> None:
        for name, _ in _COUNTERS.values():
            self._before[name] = self._before.get(name, 0) + self._now.get(name, 0)
        self._now = {}

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        for metric, (name, text) in _COUNTERS.items():
            value = self._before.get(name, 0) + self._now.get(name, 0)
            yield CounterMetricFamily(f"fastattn:{metric}", text, value=value)
        for metric, (name, text) in _GAUGES.items():
            yield GaugeMetricFamily(f"fastattn:{metric}", text, value=self._now.get(name, 0))
        total, usable = self._now.get("num_kv_blocks", 0), self._now.get("num_usable_kv_blocks", 0)
        used = 1 - usable / total if total else 0.0
        yield GaugeMetricFamily("fastattn:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", value=used)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.engine = EngineNumbers()
        self.registry.register(self.engine)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"fastattn:{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"fastattn:{name}", text, registry=self.registry, buckets=buckets)

        self.success = counter("request_success", "Completions that ended.", ("finished_reason",))
        self.ttft = histogram("time_to_first_token_seconds", "From a request's arrival to its first token.", _LATENCY)
        self.itl = histogram("inter_token_latency_seconds", "From a token to the next.", _TOKEN)
        self.e2e = histogram("e2e_request_latency_seconds", "From a request's arrival to its end.", _LATENCY)
        self.queue_time = histogram("request_queue_time_seconds", "Waiting for the first step.", _LATENCY)
        self.rejections = counter("admission_rejections", "Requests refused before work began.", ("reason",))
        self.corrupted = counter("corrupted_requests", "Requests that the model answered with no numbers.")
        self.restarts = counter("engine_restarts", "Engine processes that died and were replaced.")
        self.invalid_messages = counter("invalid_messages", "Messages on the internal socket that made no sense.")
        self.http = counter("http_requests", "Answers by route and status class.", ("route", "status"))
        self.disconnects = counter("client_disconnects", "Requests that their client left before the end.")
        self.loop_lag = Gauge(
            "fastattn:event_loop_lag_seconds", "How late the front's loop runs.", registry=self.registry
        )
        for reason in ("stop", "length", "abort", "error"):
            self.success.labels(reason)
        for reason in ("queue", "rate_limit", "draining", "concurrency"):
            self.rejections.labels(reason)

    def text(self) -> bytes:
        return generate_latest(self.registry)
