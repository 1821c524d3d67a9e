"""`fastattn bench`: latency, throughput and start-up of the engine, a server under load, the operators."""

from __future__ import annotations

import typer

from fastattn.cli._help import Command, Group
from fastattn.cli.bench_kernels import kernels
from fastattn.cli.bench_offline import latency, startup, throughput
from fastattn.cli.bench_serve import serve

app = typer.Typer(
    cls=Group,
    help="Measure the engine, a running server, or the operators.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command(cls=Command)(latency)
app.command(cls=Command)(throughput)
app.command(cls=Command)(startup)
app.command(cls=Command)(serve)
app.command(cls=Command)(kernels)
