"""The curve that a load measures: how long an answer takes, over how much is answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def require_matplotlib() -> None:
    """Raises ImportError, before anything is measured, where a plot could not be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ImportError("a plot needs matplotlib: pip install 'fastattn[bench]'") from None


def plot_load(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """results: of `summarize`, one for each request rate, with vLLM's detail keys `ttfts` and `e2els` (seconds) and
    `request_rate`. Left: median and worst percentile over throughput; right: how the latencies are distributed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curve, spread = figure.subplots(1, 2)
    ordered = sorted(results, key=lambda result: float(result["output_throughput"]))
    x = [result["output_throughput"] for result in ordered]
    for name, label, color in (("ttft", "time to first token", "C0"), ("e2el", "whole answer", "C1")):
        worst = max((key for key in ordered[0] if key.startswith("p") and key.endswith(f"_{name}_ms")), default=None)
        curve.plot(x, [r[f"median_{name}_ms"] for r in ordered], "o-", color=color, label=f"{label}, median")
        if worst is not None:
            curve.plot(x, [r[worst] for r in ordered], "o--", color=color, label=f"{label}, {worst.split('_')[0]}")
    curve.set(xlabel="output tokens/s", ylabel="ms", title="Latency over throughput", yscale="log")
    curve.legend(fontsize="small")
    for result in ordered:
        for name, style in (("ttfts", "--"), ("e2els", "-")):
            values = np.sort(result[name]) * 1e3
            what = "first token" if name == "ttfts" else "whole answer"
            share = np.arange(1, len(values) + 1) / max(len(values), 1)
            spread.step(values, share, style, where="post", label=f"{result['request_rate']} req/s, {what}")
    spread.set(xlabel="ms", ylabel="share of requests", title="Distribution", xscale="log")
    spread.legend(fontsize="small")
    for axes in (curve, spread):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
