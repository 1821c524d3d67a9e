"""`fastattn inspect`: what a model folder or file is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fastattn.cli import _compress_options as copt
from fastattn.cli import _options as opt
from fastattn.cli._summary import bytes_text

if TYPE_CHECKING:
    from fastattn.compress import Inspection


def inspect(
    model: opt.Model,
    zeros: Annotated[
        bool, typer.Option("--zeros", help="Count zeros in the layers' plain matrices (reads them).")
    ] = False,
    as_json: copt.AsJson = False,
) -> None:
    """Say what a model is: layers, formats, bytes, receipt."""
    from fastattn.cli._compress_report import print_json
    from fastattn.compress import inspect_model

    found = inspect_model(model, count_zeros=zeros)
    if as_json:
        print_json(found.as_dict())
    else:
        _print(found)


def _print(found: Inspection) -> None:
    from rich.console import Console
    from rich.table import Table

    c = found.config
    heads = f"{c['num_heads']} heads of {c['head_dim']} ({c['num_kv_heads']} KV)"
    sizes = f"{c['num_layers']} layers, hidden {c['hidden_size']}, feed-forward {c['intermediate_size']}, {heads}"
    typer.echo(f"{found.name}: {found.architecture}, {sizes}, {c['vocab_size']:,} tokens")
    total = f"{found.num_parameters:,} parameters in {found.num_bytes:,} bytes ({bytes_text(found.num_bytes)})"
    typer.echo(f"{total}, {found.bits:.2f} bits each")
    table = Table(box=None, pad_edge=False)
    for column, justify in (
        ("part", "left"),
        ("parameters", "right"),
        ("bytes", "right"),
        ("zeros", "right"),
        ("stored as", "left"),
    ):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for group in found.groups:
        kinds = ", ".join(f"{count} × {kind}" for kind, count in group.formats.items())
        share = "" if group.sparsity is None else f"{100 * group.sparsity:.1f} %"
        table.add_row(group.name, f"{group.num_parameters:,}", f"{group.num_bytes:,}", share, kinds)
    Console(highlight=False, markup=False, soft_wrap=True).print(table)
    if found.quantization is not None:
        typer.echo(f"quantized    {found.quantization.get('quant_method')}, {found.quantization.get('format')}")
    if found.receipt is not None:
        _print_receipt(found.receipt)


def _print_receipt(receipt: dict[str, object]) -> None:
    source, method = receipt.get("source"), receipt.get("method")
    name = source.get("name") if isinstance(source, dict) else source
    chosen = (
        ", ".join(f"{k} {v}" for k, v in method.items() if not isinstance(v, list)) if isinstance(method, dict) else ""
    )
    typer.echo(f"receipt      {receipt.get('command')} of {name}, {receipt.get('created')}: {chosen}")
    evaluation = receipt.get("evaluation")
    if isinstance(evaluation, dict):
        kept = {k: round(v, 5) for k, v in evaluation.items() if isinstance(v, float)}
        typer.echo("evaluation   " + ", ".join(f"{k} {v}" for k, v in kept.items()))
