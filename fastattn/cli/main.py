"""The typer application, `fastattn COMMAND`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from fastattn import __version__
from fastattn.cli import _errors
from fastattn.cli._help import Command, Group
from fastattn.cli.bench import app as bench_app
from fastattn.cli.chat import chat
from fastattn.cli.distill import distill
from fastattn.cli.doctor import doctor
from fastattn.cli.eval import eval_
from fastattn.cli.inspect import inspect
from fastattn.cli.plan import plan
from fastattn.cli.prune import prune
from fastattn.cli.quantize import quantize
from fastattn.cli.router import app as router_app
from fastattn.cli.run import run
from fastattn.cli.serve import ServeCommand, serve


class _Group(Group):
    """Turns every way to fail into one line and an exit code, in one place for all commands."""

    def main(self, args: Sequence[str] | None = None, *more: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        if not standalone_mode:
            return super().main(args, *more, standalone_mode=False, **extra)  # type: ignore[misc]
        try:
            code = super().main(args, *more, standalone_mode=False, **extra)  # type: ignore[misc]
            sys.stdout.flush()
        except BrokenPipeError:  # of the flush; a command's own never comes here, see invoke
            _errors.hush_stdout()
            code = _errors.PIPE_CLOSED
        except (typer.Abort, KeyboardInterrupt):
            code = _errors.INTERRUPTED
        except Exception as error:
            code = _usage_error(error) or _errors.report(error)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the parser would end the program with 1, as for any failure
            _errors.hush_stdout()
            raise typer.Exit(_errors.PIPE_CLOSED) from None


def _usage_error(error: Exception) -> int | None:
    """Reports a mistake that the argument parser found. Known by its methods: typer hides the class, and it has moved."""
    if not hasattr(error, "format_message"):
        return None
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":  # a group without a command: what there is, not what is wrong
        print(error.format_message(), file=sys.stderr)
        return 2
    # "Value error, " is how pydantic, which newer typers use, begins the messages of its own checks.
    message = " ".join(error.format_message().split()).replace(": Value error, ", ": ").rstrip(".")
    where = context.command_path if context is not None else "fastattn"
    print(f"{where}: {message} (see {where} --help)", file=sys.stderr)
    return 2


app = typer.Typer(
    name="fastattn",
    cls=_Group,
    help="Runs language models on CPUs and NVIDIA GPUs.",
    add_completion=False,
    rich_markup_mode=None,  # plain help: quick to print, easy to grep, the same on every terminal
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastattn {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    from fastattn import config

    logging.basicConfig(level=config.log_level(), format="%(levelname)s %(name)s: %(message)s")
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


_GENERATE, _SERVE, _CHEAPER = "Generate text", "Serve", "Make a model cheaper"
_MEASURE, _HERE = "Look and measure", "This installation"

app.command(cls=Command, rich_help_panel=_GENERATE)(run)
app.command(cls=Command, rich_help_panel=_GENERATE)(chat)
app.command("serve", cls=ServeCommand, rich_help_panel=_SERVE)(serve)
app.add_typer(router_app, name="router", rich_help_panel=_SERVE)
app.command(cls=Command, rich_help_panel=_CHEAPER)(quantize)
app.command(cls=Command, rich_help_panel=_CHEAPER)(prune)
app.command(cls=Command, rich_help_panel=_CHEAPER)(distill)
app.command(cls=Command, rich_help_panel=_MEASURE)(plan)
app.command(cls=Command, rich_help_panel=_MEASURE)(inspect)
app.command("eval", cls=Command, rich_help_panel=_MEASURE)(eval_)
app.add_typer(bench_app, name="bench", rich_help_panel=_MEASURE)
app.command(cls=Command, rich_help_panel=_HERE)(doctor)
app.command("collect-env", cls=Command, rich_help_panel=_HERE, help="The same as doctor, as vLLM and torch call it.")(
    doctor
)


@app.command("version", cls=Command, rich_help_panel=_HERE)
def _version() -> None:
    """Print the version."""
    _print_version(True)
