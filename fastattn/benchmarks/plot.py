"""Pictures of results, alone or in a page with their figures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
)


@dataclass(frozen=True)
class Section:
    """A part of a page: about: lines of text; rows: a table, its head first; figure: the picture of it."""

    title: str
    about: Sequence[str]
    rows: Sequence[Sequence[object]]
    figure: Figure


def require_matplotlib() -> None:
    """Raises ImportError, before anything is measured, where a plot could not be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ImportError("a plot needs matplotlib: pip install 'fastattn[bench]'") from None


def write(section: Section, path: Path) -> None:
    """A page where the path ends in .html, else the picture alone."""
    if path.suffix == ".html":
        path.write_text(page(section.title, [section]), encoding="utf-8")
    else:
        section.figure.savefig(path, dpi=130)


def page(title: str, sections: Sequence[Section]) -> str:
    """One HTML file with everything in it: it can be mailed, and asks no server for anything."""
    parts = ["<!doctype html>", f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>']
    for section in sections:
        parts.append(f"<h1>{html.escape(section.title)}</h1>")
        parts += [f"<p>{html.escape(line)}</p>" for line in section.about]
        picture = io.BytesIO()
        section.figure.savefig(picture, dpi=110, format="png")
        parts.append(f'<img alt="" src="data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}">')
        parts.append("<table>")
        for index, row in enumerate(section.rows):
            tag = "td" if index else "th"
            parts.append("<tr>" + "".join(f"<{tag}>{html.escape(_text(cell))}</{tag}>" for cell in row) + "</tr>")
        parts.append("</table>")
    return "\n".join(parts) + "\n"


def _text(cell: object) -> str:
    return "" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def offline_section(model: str, result: Mapping[str, Any]) -> Section:
    """Of `bench latency` or `throughput`: ours beside the peers under "against". Left: the mean; right: every batch."""
    from matplotlib.figure import Figure

    peers = {name: peer for name, peer in result.get("against", {}).items() if "error" not in peer}
    engines = {"fastattn": result, **peers}
    key, unit = (
        ("avg_latency", "seconds") if "avg_latency" in result else ("output_tokens_per_second", "output tokens/s")
    )
    figure = Figure(figsize=(11, 4), layout="constrained")
    bars, right = figure.subplots(1, 2) if "latencies" in result else (figure.subplots(), None)
    values = [float(engine[key]) for engine in engines.values()]
    bars.bar_label(bars.bar(list(engines), values, color=[f"C{i}" for i in range(len(values))]), fmt="%.4g")
    bars.set(ylabel=unit, title=key.replace("_", " "))
    if right is not None:
        for name, engine in engines.items():
            right.plot(engine["latencies"], "o-", label=name)
        right.set(xlabel="batch", ylabel="seconds", title="Every batch", ylim=0)
        right.legend(fontsize="small")
    figures = [name for name, value in result.items() if isinstance(value, (int, float))]
    rows = [
        ["", *engines],
        *([name, *(engine.get(name) for engine in engines.values())] for name in [*figures, "ratio"]),
    ]
    return Section(f"{model}: {'latency' if right is not None else 'throughput'}", [], rows, figure)


def load_section(model: str, results: Sequence[Mapping[str, Any]]) -> Section:
    """Of `bench serve`, see `load_figure`."""
    names = [n for n, value in results[0].items() if isinstance(value, (int, float))]
    rows = [["request rate", *(r["request_rate"] for r in results)], *([n, *(r[n] for r in results)] for n in names)]
    return Section(f"{model}: serving", [], rows, load_figure(results))


def load_figure(results: Sequence[Mapping[str, Any]]) -> Figure:
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
    return figure
