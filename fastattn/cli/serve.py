"""`fastattn serve`: the OpenAI-compatible server. Its flags are the fields of ServeConfig."""

from __future__ import annotations

import inspect
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer

from fastattn.cli._help import Command
from fastattn.cli._options import ENGINE

_ALIASES = {"tensor_parallel_size": ("-tp",), "max_model_len": ("-c",)}


def serve() -> None:
    """Serve a model over HTTP, as OpenAI's API.

    Every flag is also a setting of the YAML file that --config names, and, as FASTATTN_ and its name in capitals, an
    environment variable. A flag goes before the environment, that before the file.
    """


class ServeCommand(Command):
    """`serve`, whose flags and work come with the server's packages: they are imported when one of both is asked for."""

    @cached_property
    def _full(self) -> Any:
        app = typer.Typer(add_completion=False)
        app.command()(_with_flags())
        return typer.main.get_command(app)

    @property
    def params(self) -> Any:
        return self._full.params

    @params.setter
    def params(self, _: Any) -> None:
        """The parser sets those of `serve`, which has none."""

    def invoke(self, ctx: Any) -> Any:
        return self._full.invoke(ctx)


def _with_flags() -> Any:
    """The work, with a signature made of the settings' fields."""
    try:
        from fastattn.serve import config as serve_config
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    about = "As for `fastattn run`; may stand in the file."
    parameters = [
        _parameter("model", str | None, typer.Argument(metavar="MODEL", help=about, show_default=False)),
        _parameter("config", Path | None, typer.Option("--config", metavar="FILE", help="YAML file of settings.")),
    ]
    for name in serve_config.environment_names():
        if name == "model":
            continue
        field = serve_config.ServeConfig.model_fields[name]
        flag = "--" + name.replace("_", "-")
        text = f"{field.description}{_default_text(field.default)}"
        panel = ENGINE if name in serve_config.EngineSettings.model_fields else "Server"
        if field.annotation is bool:
            option = typer.Option(f"{flag}/--no-{flag[2:]}", help=text, show_default=False, rich_help_panel=panel)
            parameters.append(_parameter(name, bool | None, option))
            continue
        many = isinstance(field.default, list)
        option = typer.Option(
            flag, *_ALIASES.get(name, ()), metavar="VALUE", help=text, show_default=False, rich_help_panel=panel
        )
        parameters.append(_parameter(name, list[str] | None if many else str | None, option))

    def command(**flags: Any) -> None:
        from fastattn import config

        try:
            from fastattn.serve.server import serve as run_server
        except ModuleNotFoundError as error:
            raise _missing(error) from None
        file = flags.pop("config")
        given = {name: value for name, value in flags.items() if value is not None and value != []}
        code = run_server(serve_config.load(given, config.serve_settings(serve_config.environment_names()), file))
        if code:
            raise typer.Exit(code)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _missing(error: ModuleNotFoundError) -> ImportError:
    return ImportError(f"{error.name} is not installed: pip install 'fastattn[server]'")


def _default_text(default: object) -> str:
    shown = ("off", "on")[default] if isinstance(default, bool) else default
    return "" if default is None or default == [] else f"  [default: {shown}]"


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])
