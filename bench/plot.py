"""`python -m bench.plot [RESULTS.json …] --out DIR`: a picture of each results file, and one HTML page with all of them.

Without files: all families in bench/results. The page, report.html, holds its pictures and needs no other file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattn.benchmarks.plot import Section, page, require_matplotlib, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"


def section(name: str, report: dict[str, Any]) -> Section:
    """Of a family's report: each case's ratio to its best peer, or where it has none, the share of its ceiling."""
    cases = [case for case in report["cases"] if "failed" not in case]
    names = list(dict.fromkeys(peer for case in cases for peer in case["peers_us"]))
    rows: list[Sequence[object]] = [("case", "ours µs", "of ceiling", *(f"{peer} µs" for peer in names), "ratio")]
    rows += [
        (c["id"], c["ours_us"], c["ceiling"], *(c["peers_us"].get(peer) for peer in names), c["ratio"]) for c in cases
    ]
    rows += [(case["id"], f"failed: {case['failed']}") for case in report["cases"] if "failed" in case]
    meta = report["meta"]
    about = [
        f"{meta['gpu'] or meta['cpu']}; {meta['date']}; commit {meta['commit']}; torch {meta['torch']}.",
        f"{meta['command']}: {meta['method']}.",
    ]
    return Section(name, about, rows, ratios(cases))


def ratios(cases: Sequence[dict[str, Any]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.2 * len(cases)), layout="constrained")
    axes = figure.subplots()
    values = [case["ratio"] or case["ceiling"] or 0.0 for case in cases]
    colors = ["C0" if not case["ratio"] else "C2" if case["ratio"] >= 1 else "C3" for case in cases]
    axes.barh([case["id"] for case in cases], values, color=colors)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set(xlabel="best peer's time / ours: green is faster, red slower; blue: no peer, share of the ceiling")
    return figure


def draw(files: Sequence[Path], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    sections = []
    for path in files:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(report, dict) or "cases" not in report:
            raise ValueError(f"{path} has no cases, expected what `python -m bench FAMILY` writes")
        sections.append(section(path.stem, report))
        write(sections[-1], out / f"{path.stem}.png")
    (out / "report.html").write_text(page("fastattn benchmarks", sections), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    from bench.families import FAMILIES

    parser = argparse.ArgumentParser(
        "python -m bench.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="*", type=Path, metavar="RESULTS.json")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(arguments)
    files = args.file or [path for name in FAMILIES if (path := RESULTS / f"{name}.json").is_file()]
    try:
        require_matplotlib()
        draw(files, args.out)
    except (ImportError, OSError, ValueError) as error:
        print(f"bench.plot: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
