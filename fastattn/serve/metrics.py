"""Prometheus metrics under the names that vLLM's dashboards use, with `fastattn:` in front.

Labels come from closed sets only: what a client sends never makes a new series.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import methodcaller
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_LENGTH = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

_MODEL = ("model_name",)  # the label of what is an engine's
F = TypeVar("F", CounterMetricFamily, GaugeMetricFamily)

# Metric → the engine's counter.
_COUNTERS = {
    "prompt_tokens": ("num_prompt_tokens", "Prompt tokens computed."),
    "generation_tokens": ("num_generated_tokens", "Tokens generated."),
    "num_preemptions": ("num_preemptions", "Times that a request had to give way."),
    "prefix_cache_queries": ("num_prefix_queried_tokens", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("num_prefix_hit_tokens", "Prompt tokens found in the prefix cache."),
    "external_prefix_cache_hits": ("num_host_hit_tokens", "Of those, tokens that came back from host memory."),
    "kv_offload_store_bytes": ("num_bytes_to_host", "KV blocks copied to host memory, bytes."),
    "kv_offload_load_bytes": ("num_bytes_from_host", "KV blocks copied back from host memory, bytes."),
    "engine_steps": ("num_steps", "Steps of the engine."),
    "spec_decode_num_draft_tokens": ("num_draft_tokens", "Tokens proposed by speculation."),
    "spec_decode_num_accepted_tokens": ("num_accepted_tokens", "Proposed tokens that the model confirmed."),
}
_SLEEP = ("awake", "weights_offloaded", "discard_all")  # vLLM's names of the levels 0, 1 and 2
_GAUGES = {
    "num_requests_running": ("num_running", "Sequences that take part in steps."),
    "num_requests_waiting": ("num_waiting", "Sequences that wait for a place."),
}


class EngineNumbers:
    """An engine's own counters. Another process after a restart counts from 0; what is shown never falls."""

    def __init__(self) -> None:
        self.sleep_level = 0
        self._now: dict[str, float] = {}
        self._before: dict[str, float] = {}

    def update(self, values: Mapping[str, float]) -> None:
        self._now = dict(values)

    def restarted(self) -> None:
        for name, _ in _COUNTERS.values():
            self._before[name] = self.total(name)
        self._now = {}

    def total(self, name: str) -> float:
        return self._before.get(name, 0) + self._now.get(name, 0)

    def now(self, name: str) -> float:
        return self._now.get(name, 0)


class _Engines(Collector):
    """Of every engine, by the name of its model."""

    def __init__(self) -> None:
        self.numbers: dict[str, EngineNumbers] = {}

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        for metric, (name, text) in _COUNTERS.items():
            yield self._filled(
                CounterMetricFamily(f"fastattn:{metric}", text, labels=_MODEL), methodcaller("total", name)
            )
        for metric, (name, text) in _GAUGES.items():
            yield self._filled(GaugeMetricFamily(f"fastattn:{metric}", text, labels=_MODEL), methodcaller("now", name))
        text = "Share of the KV cache in use, 0 to 1."
        yield self._filled(GaugeMetricFamily("fastattn:kv_cache_usage_perc", text, labels=_MODEL), _kv_usage)
        text = "Share of the host memory for KV blocks in use, 0 to 1."
        name = "fastattn:kv_offload_cpu_cache_usage_perc"
        yield self._filled(GaugeMetricFamily(name, text, labels=_MODEL), _host_usage)

        text = "1 for what the engine is, 0 for the others: awake, or at which level it sleeps."
        asleep = GaugeMetricFamily("fastattn:engine_sleep_state", text, labels=(*_MODEL, "sleep_state"))
        for model, numbers in self.numbers.items():
            for level, name in enumerate(_SLEEP):
                asleep.add_metric([model, name], float(numbers.sleep_level == level))
        yield asleep

    def _filled(self, family: F, value: Callable[[EngineNumbers], float]) -> F:
        for model, numbers in self.numbers.items():
            family.add_metric([model], value(numbers))
        return family


def _kv_usage(numbers: EngineNumbers) -> float:
    total = numbers.now("num_kv_blocks")
    return 1 - numbers.now("num_usable_kv_blocks") / total if total else 0.0


def _host_usage(numbers: EngineNumbers) -> float:
    total = numbers.now("num_host_kv_blocks")
    return numbers.now("num_used_host_kv_blocks") / total if total else 0.0


@dataclass(frozen=True)
class EngineMetrics:
    """What is counted of one engine. success: by finish_reason."""

    numbers: EngineNumbers
    ttft: Histogram
    itl: Histogram
    e2e: Histogram
    queue_time: Histogram
    num_prompt_tokens: Histogram
    num_generated_tokens: Histogram
    success: Mapping[str, Counter]


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._engines = _Engines()
        self.registry.register(self._engines)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"fastattn:{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"fastattn:{name}", text, _MODEL, registry=self.registry, buckets=buckets)

        self._success = counter("request_success", "Completions that ended.", (*_MODEL, "finished_reason"))
        self._histograms = {
            "ttft": histogram("time_to_first_token_seconds", "From a request's arrival to its first token.", _LATENCY),
            "itl": histogram("inter_token_latency_seconds", "From a token to the next.", _TOKEN),
            "e2e": histogram("e2e_request_latency_seconds", "From a request's arrival to its end.", _LATENCY),
            "queue_time": histogram("request_queue_time_seconds", "Waiting for the first step.", _LATENCY),
            "num_prompt_tokens": histogram("request_prompt_tokens", "Prompt tokens of a request.", _LENGTH),
            "num_generated_tokens": histogram("request_generation_tokens", "Tokens of its answer.", _LENGTH),
        }
        self.rejections = counter("admission_rejections", "Requests refused before work began.", ("reason",))
        self.corrupted = counter("corrupted_requests", "Requests that the model answered with no numbers.")
        self.restarts = counter("engine_restarts", "Engine processes that died and were replaced.")
        self.invalid_messages = counter("invalid_messages", "Messages on the internal socket that made no sense.")
        self.http = counter("http_requests", "Answers by route and status class.", ("route", "status"))
        self.disconnects = counter("client_disconnects", "Requests that their client left before the end.")
        self.loop_lag = Gauge(
            "fastattn:event_loop_lag_seconds", "How late the front's loop runs.", registry=self.registry
        )
        for reason in ("queue", "rate_limit", "draining", "concurrency", "asleep"):
            self.rejections.labels(reason)

    def of(self, model: str) -> EngineMetrics:
        """An engine's, by the name that its model is configured under."""
        return EngineMetrics(
            self._engines.numbers.setdefault(model, EngineNumbers()),
            success={reason: self._success.labels(model, reason) for reason in ("stop", "length", "abort", "error")},
            **{name: histogram.labels(model) for name, histogram in self._histograms.items()},
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)
