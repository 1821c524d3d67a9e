"""`fastattn bench`: latency and throughput of the engine, a server under load, the operators."""

from __future__ import annotations

import typer

from fastattn.cli.bench_kernels import kernels
from fastattn.cli.bench_offline import latency, throughput
from fastattn.cli.bench_serve import serve

app = typer.Typer(
    help="Measure the engine, a running server, or the operators.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(latency)
app.command()(throughput)
app.command()(serve)
app.command()(kernels)
