"""`fastattn router evaluate`: what each threshold of a cascade costs and what it is worth."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastattn.cli._errors import CLIError
from fastattn.cli._help import Command, Group

if TYPE_CHECKING:
    from fastattn.serve.router.config import RouterConfig
    from fastattn.serve.router.evaluate import Evaluation

app = typer.Typer(
    help="Look at how requests are spread over models.", cls=Group, no_args_is_help=True, rich_markup_mode=None
)


@app.callback()
def _group() -> None:
    """Look at how requests are spread over models."""


@app.command("evaluate", cls=Command)
def evaluate(
    prompts: Annotated[
        Path, typer.Argument(metavar="PROMPTS", help="JSON lines: prompt or messages, and reference if it is known.")
    ],
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="The server's YAML file.")],
    cascade: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which of its cascades; needed if there are several.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Address of a server that runs with this file, for models that are its engines."
        ),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(metavar="FILE", help="File with the key for --url.")] = None,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where evaluation.json and evaluation.png go.")] = Path(
        "router-evaluation"
    ),
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")] = 128,
    concurrency: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="Prompts at a time.")] = 8,
) -> None:
    """Show what each threshold of a cascade costs and is worth.

    Both models are asked all prompts once.
    """
    try:
        from fastattn.serve.router import evaluate as work
        from fastattn.serve.router.router import Router
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'fastattn[server]'") from None
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a request
    settings = _router_config(config, url, api_key_file)
    name = _cascade_name(settings, cascade)
    rows = work.read_prompts(prompts)

    async def run() -> Evaluation:
        router = Router(settings, {})
        try:
            return await work.evaluate(router, name, rows, max_tokens=max_tokens, concurrency=concurrency)
        finally:
            await router.close()

    from fastattn.serve.contract import APIError

    try:
        found = asyncio.run(run())
    except APIError as error:
        raise CLIError(error.message) from None
    numbers, picture = work.save(found, output)
    _show(work.table(found), name, found.judge, len(rows))
    typer.echo(f"{numbers}\n{picture}", err=True)


def _router_config(file: Path, url: str | None, api_key_file: Path | None) -> RouterConfig:
    """The file's router, its own engines reached over HTTP."""
    import yaml  # type: ignore[import-untyped]
    from pydantic import ValidationError

    from fastattn.serve.router.config import RouterConfig

    try:
        section = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("router")
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError) as error:
        raise CLIError(f"{file}: {' '.join(str(error).split())}") from None
    if section is None:
        raise CLIError(f"{file}: there is no router section in it")
    try:
        found = RouterConfig.model_validate(section)
    except ValidationError as error:
        wrong = (f"router.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
        raise CLIError("; ".join(wrong)) from None
    entries: list[Any] = []
    for entry in found.model_list:
        if entry.engine is not None:
            if url is None:
                raise CLIError(f"model {entry.model_name!r} is an engine of the server: start it, and give --url")
            base = url.rstrip("/").removesuffix("/v1") + "/v1"
            change = {"engine": None, "api_base": base, "model": entry.model_name, "api_key_file": api_key_file}
            entry = entry.model_copy(update=change)
        entries.append(entry)
    return found.model_copy(update={"model_list": entries})


def _cascade_name(config: RouterConfig, wanted: str | None) -> str:
    names = list(config.cascades)
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted not in names:
        known = ", ".join(names) or "none"
        raise CLIError(f"--cascade is {wanted!r}, the file has {known}")
    return wanted


def _show(rows: list[tuple[str, ...]], name: str, judge: str, count: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    by = "right answers" if judge == "reference" else "agreement with the capable model"
    shown = Table(title=f"cascade {name}: {count} prompts, quality by {by}", box=box.SIMPLE, title_justify="left")
    for title in rows[0]:
        shown.add_column(title, justify="right")
    for row in rows[1:]:
        shown.add_row(*row)
    Console().print(shown)
