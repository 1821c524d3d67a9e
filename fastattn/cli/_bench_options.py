"""Options of the benchmarks, under vLLM's names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fastattn.cli._options import _number, _size


def _place(path: Path | None) -> Path | None:
    """Where a result goes is looked at before it is measured."""
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"{path.parent} is no folder")
    return path


def _picture(path: Path | None) -> Path | None:
    if path is not None and path.suffix not in (".png", ".svg", ".pdf", ".html"):
        raise typer.BadParameter(f"{str(path)!r} ends in {path.suffix!r}, allowed are .png, .svg, .pdf and .html")
    return _place(path)


DatasetName = Literal["random", "sharegpt", "custom"]

BenchModel = Annotated[
    str,
    typer.Option("--model", "-m", metavar="MODEL", help="A name, a folder, or a .gguf file, as for `fastattn run`."),
]
InputLen = Annotated[int | None, _size("--input-len", "Tokens of each prompt.", "--random-input-len")]
OutputLen = Annotated[
    int | None,
    _size(
        "--output-len", "Tokens of each answer.", "--random-output-len", "--sharegpt-output-len", "--custom-output-len"
    ),
]
NumPrompts = Annotated[int, typer.Option("--num-prompts", metavar="N", help="Requests in all.")]
NumWarmups = Annotated[
    int, typer.Option("--num-warmups", metavar="N", min=0, help="Requests before those that are timed.")
]
Dataset = Annotated[
    DatasetName,
    typer.Option(
        "--dataset-name", help="random: made-up text; sharegpt: its JSON; custom: JSON lines with a prompt each."
    ),
]
DatasetPath = Annotated[Path | None, typer.Option("--dataset-path", metavar="FILE", help="The file of the data set.")]
RangeRatio = Annotated[float, _number("--random-range-ratio", "R", "Draw random lengths from the given one × (1 ± R).")]
PrefixLen = Annotated[
    int,
    typer.Option("--random-prefix-len", "--prefix-len", metavar="N", help="Tokens that all random prompts begin with."),
]
BenchSeed = Annotated[int, typer.Option("--seed", metavar="N", help="Same seed, same prompts and arrivals.")]
Completions = Annotated[int, typer.Option("-n", "--n", metavar="N", help="Answers to each prompt.")]
OutputJson = Annotated[
    Path | None, typer.Option("--output-json", metavar="FILE", callback=_place, help="Write the result as JSON.")
]
Against = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="LIST",
        help="Of vllm and hf (transformers), which to run with the same prompts first, each in a process of its own.",
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE",
        callback=_picture,
        help="Draw the result, as PNG, SVG or PDF, or as an HTML page with its figures.",
    ),
]
BenchPrefixCaching = Annotated[
    bool,
    typer.Option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        help="Off here, as repeated prompts would not be computed again.",
    ),
]
