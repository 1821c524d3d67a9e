"""`fastattn serve`: the OpenAI-compatible server. Its flags are the fields of ServeConfig."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

_ALIASES = {"tensor_parallel_size": ("-tp",), "max_model_len": ("-c",)}


def serve(**flags: Any) -> None:
    """Serve a model over HTTP, as OpenAI's API.

    Every flag is also a setting of the YAML file that --config names, and, as FASTATTN_ and its name in capitals, an
    environment variable. A flag goes before the environment, that before the file.
    """
    try:
        from fastattn.serve import config as serve_config
        from fastattn.serve.server import serve as run_server
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'fastattn[server]'") from None
    from fastattn import config

    file = flags.pop("config")
    given = {name: value for name, value in flags.items() if value is not None and value != []}
    settings = serve_config.load(given, config.serve_settings(serve_config.environment_names()), file)
    code = run_server(settings)
    if code:
        raise typer.Exit(code)


def with_flags() -> Any:
    """The command with a signature made of the settings' fields; without the server's packages, one that says so."""
    parameters = [_parameter("model", str | None, typer.Argument(metavar="MODEL", show_default=False))]
    parameters.append(
        _parameter("config", Path | None, typer.Option("--config", metavar="FILE", help="YAML file of settings."))
    )
    try:
        from fastattn.serve.config import SECTIONS, ServeConfig
    except ModuleNotFoundError:
        fields = {}
    else:
        fields = {n: f for n, f in ServeConfig.model_fields.items() if n not in ("model", *SECTIONS)}
    for name, field in fields.items():
        flag = "--" + name.replace("_", "-")
        text = f"{field.description}{_default_text(field.default)}"
        if field.annotation is bool:
            option = typer.Option(f"{flag}/--no-{flag[2:]}", help=text, show_default=False)
            parameters.append(_parameter(name, bool | None, option))
            continue
        many = isinstance(field.default, list)
        option = typer.Option(flag, *_ALIASES.get(name, ()), metavar="VALUE", help=text, show_default=False)
        parameters.append(_parameter(name, list[str] | None if many else str | None, option))

    def command(**flags: Any) -> None:
        serve(**flags)

    command.__doc__ = serve.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _default_text(default: object) -> str:
    return "" if default is None or default == [] else f" Default: {default}."


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])
