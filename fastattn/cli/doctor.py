"""`fastattn doctor`: what is here, what is built, what is wrong, and what to do about it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from fastattn.cli._summary import bytes_text

if TYPE_CHECKING:
    from fastattn.doctor import Facts, Verdict


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for an issue or a script.")] = False,
) -> None:
    """Look at the environment and the installation. Exit code 1 if something is wrong."""
    from fastattn.doctor import collect_facts, judge

    facts = collect_facts()
    verdicts = judge(facts)
    if as_json:
        typer.echo(json.dumps({"facts": asdict(facts), "verdicts": [asdict(v) for v in verdicts]}, indent=2))
    else:
        _print_tables(facts, verdicts)
    if any(v.status == "problem" for v in verdicts):
        raise typer.Exit(1)


def rows(facts: Facts) -> list[tuple[str, str]]:
    """The facts as a person reads them."""
    gpus = [
        f"{gpu.name}, sm_{gpu.capability[0]}{gpu.capability[1]}, {bytes_text(gpu.memory_free)} of {bytes_text(gpu.memory_total)} free"
        for gpu in facts.gpus
    ]
    nvcc = f"{facts.nvcc_version or 'of unknown version'} at {facts.nvcc}" if facts.nvcc else "not found"
    kernels = (
        "not built"
        if facts.kernels_path is None
        else f"{facts.kernels_path} ({', '.join(facts.kernels_archs) or 'unknown'})"
    )
    threads = "" if facts.num_threads is None else f", {facts.num_threads} threads"
    return [
        ("fastattn", f"{facts.fastattn_version} at {facts.fastattn_path}"),
        ("python", f"{facts.python_version} at {facts.python_path}"),
        ("platform", facts.platform),
        ("packages", ", ".join(f"{name} {version or 'missing'}" for name, version in facts.packages.items())),
        ("extras", "; ".join(_extra(*extra) for extra in facts.extras.items()) or "-"),
        ("torch for CUDA", facts.torch_cuda or "none"),
        ("NVIDIA driver", facts.driver_version or "none"),
        *([("GPU", gpu) for gpu in gpus] or [("GPU", "none")]),
        ("nvcc", nvcc),
        ("runtime", facts.runtime_path or "not built"),
        ("CUDA kernels", kernels),
        ("CPU", f"{facts.cpu_model}, {facts.num_cpus} CPUs{threads}"),
        ("CPU features", f"{' '.join(facts.cpu_features) or 'unknown'} (torch uses {facts.cpu_capability or '-'})"),
        ("memory", f"{bytes_text(facts.memory_available)} of {bytes_text(facts.memory_total)} free"),
        ("cache", facts.cache_dir or "-"),
        *(("model", f"{name}, {bytes_text(size)}") for name, size in facts.models.items()),
        *(("variable", f"{name}={value}") for name, value in facts.variables.items()),
    ]


def _extra(name: str, missing: list[str]) -> str:
    return f"{name} without {', '.join(missing)} (pip install 'fastattn[{name}]')" if missing else f"{name} complete"


def _print_tables(facts: Facts, verdicts: list[Verdict]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, soft_wrap=True)
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in rows(facts):
        table.add_row(*row)
    console.print(table)
    console.print()
    found = Table(box=None, show_header=False, pad_edge=False)
    for v in verdicts:
        found.add_row(v.status, v.subject, v.finding + (f"; {v.remedy}" if v.remedy else ""))
    console.print(found)
