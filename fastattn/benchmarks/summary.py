"""From the outcomes of a load to the figures and names of vLLM's result files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastattn.benchmarks.load import Outcome

# In the order they are shown; the names are those of --percentile-metrics.
METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}


def seconds_of(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """metric → seconds of each request (itl: of each gap). A single token has no time per output token."""
    return {
        "ttft": [o.ttft for o in outcomes],
        "tpot": [(o.latency - o.ttft) / (o.num_output_tokens - 1) for o in outcomes if o.num_output_tokens > 1],
        "itl": [gap for o in outcomes for gap in o.itls],
        "e2el": [o.latency for o in outcomes],
    }


def summarize(
    outcomes: Sequence[Outcome],
    duration: float,
    *,
    metrics: Sequence[str] = ("ttft", "tpot", "itl", "e2el"),
    percentiles: Sequence[float] = (99.0,),
    goodput: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """duration: seconds. goodput: metric → milliseconds that a request must stay below to count as good.

    Means and medians are always there for every metric; percentiles for `metrics`. All are of the requests that succeeded.
    """
    good = [o for o in outcomes if o.error is None]
    num_output = sum(o.num_output_tokens for o in good)
    num_input = sum(o.prompt_len for o in good)
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(good) / duration,
        "request_goodput": _num_within(good, goodput) / duration if goodput else None,
        "output_throughput": num_output / duration,
        "total_token_throughput": (num_input + num_output) / duration,
        "max_concurrent_requests": most_at_once(good),
        "num_cache_hits": sum(o.cache.startswith(("hit", "joined", "semantic")) for o in good),
    }
    for name, seconds in seconds_of(good).items():
        values = np.array(seconds or [0.0]) * 1e3
        result |= {
            f"mean_{name}_ms": float(values.mean()),
            f"median_{name}_ms": float(np.median(values)),
            f"std_{name}_ms": float(values.std()),
        }
        if name in metrics:
            result |= {f"p{p:g}_{name}_ms": float(np.percentile(values, p)) for p in percentiles}
    return result


def _num_within(outcomes: Sequence[Outcome], limits: Mapping[str, float]) -> int:
    def ok(outcome: Outcome) -> bool:
        values = seconds_of([outcome])
        return all(value * 1e3 <= limit for name, limit in limits.items() for value in values[name])

    return sum(map(ok, outcomes))


def most_at_once(outcomes: Sequence[Outcome]) -> int:
    """The largest number of requests in flight at one moment."""
    events = sorted([(o.start, 1) for o in outcomes] + [(o.start + o.latency, -1) for o in outcomes])
    return int(max(np.cumsum([change for _, change in events]), default=0))


def lines(result: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> list[str]:
    """The result as vLLM prints it."""
    rows: list[tuple[str, Any]] = [
        ("Successful requests:", result["completed"]),
        ("Failed requests:", result["failed"]),
        ("Benchmark duration (s):", result["duration"]),
        ("Total input tokens:", result["total_input_tokens"]),
        ("Total generated tokens:", result["total_output_tokens"]),
        ("Request throughput (req/s):", result["request_throughput"]),
        ("Output token throughput (tok/s):", result["output_throughput"]),
        ("Total token throughput (tok/s):", result["total_token_throughput"]),
        ("Peak concurrent requests:", result["max_concurrent_requests"]),
    ]
    if result["request_goodput"] is not None:
        rows.insert(6, ("Request goodput (req/s):", result["request_goodput"]))
    if result["num_cache_hits"]:
        rows.append(("Answered from the cache:", result["num_cache_hits"]))
    out = [f"{' Serving Benchmark Result ':=^50}", *(_row(*row) for row in rows)]
    for name in metrics:
        out.append(f"{METRICS[name]:-^50}")
        out += [
            _row(f"{kind.title()} {name.upper()} (ms):", result[f"{kind}_{name}_ms"]) for kind in ("mean", "median")
        ]
        out += [_row(f"P{p:g} {name.upper()} (ms):", result[f"p{p:g}_{name}_ms"]) for p in percentiles]
    return [*out, "=" * 50]


def _row(label: str, value: Any) -> str:
    return f"{label:<40} {value:<10.2f}" if isinstance(value, float) else f"{label:<40} {value:<10}"
