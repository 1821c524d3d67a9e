"""A hook of MkDocs: makes the pages of reference that the code knows best, the command line and the settings.

They are made anew at each build and are in no repository, so they cannot be out of date. `PAGES` names them.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer.main

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the code beside these documents, not an installed one

Field = tuple[str, str, str, str]  # name, type, default, meaning


# ---- the command line ----


def cli_page() -> str:
    """Every command with its arguments and options, as `--help` has them."""
    from fastattn.cli.main import app

    root: Any = typer.main.get_command(app)
    out = [
        "# Commands and options",
        "Made from the code, as `fastattn COMMAND --help` prints it. What to do with them is in [Command line](../cli.md).",
    ]
    for path, command in _commands("fastattn", root):
        context: Any = typer.Context(command, info_name=path)
        usage = " ".join([path, *(piece for param in command.params for piece in param.get_usage_pieces(context))])
        options = any(param.param_type_name == "option" for param in command.params)
        out += [f"## {path}", inspect.cleandoc(command.help or ""), f"```text\n{usage}{' [OPTIONS]' * options}\n```"]
        records = [record for param in command.params if (record := param.get_help_record(context)) is not None]
        if records:
            rows = [(code(re.sub(r" <[\w\[\]]+>$", "", names)), escape(text)) for names, text in records]
            out.append(table(("", "meaning"), rows))
    return "\n\n".join(out) + "\n"


def _commands(path: str, group: Any) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(f"{path} {name}", command)
        else:
            yield f"{path} {name}", command


# ---- settings ----


def settings_page() -> str:
    """The server's settings, the sections of its file, the engine's options."""
    from fastattn.engine.config import EngineConfig
    from fastattn.engine.setup import EngineOptions
    from fastattn.serve.config import EngineSettings

    out = [
        "# Settings",
        "Made from the code. [Environment variables](../environment.md) that are no settings have their own page.",
    ]
    out += _server_settings()
    out += ["## Engine", "What `LLM` and `fastattn run` take; `EngineConfig` is what becomes of it."]
    # What the server's settings say of the same names, and what the engine's own configuration does.
    said = {name: info.description or "" for name, info in EngineSettings.model_fields.items()}
    out += [*_class_parts(EngineOptions, 3, said | field_notes(EngineConfig))]
    return "\n\n".join(out) + "\n"


def _server_settings() -> list[str]:
    from fastattn.serve.config import SECTIONS, ServeConfig

    rows, sections = [], []
    for name, kind, default, meaning in fields(ServeConfig):
        if name in SECTIONS:
            sections.append((code(f"{name}:"), meaning))
            continue
        flag = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
        rows.append((code(flag), code(f"FASTATTN_{name.upper()}"), kind, default, meaning))
    out = [
        "## Server",
        "A flag of `fastattn serve` goes before the environment variable, that before the YAML file of `--config` (the flag's "
        "name, with `_` or `-`), that before the default. All that is wrong is said at once.",
        table(("flag", "variable", "value", "default", "meaning"), rows),
        "Sections of the file alone:",
        table(("section", "meaning"), sections),
    ]
    for name in SECTIONS:
        if name != "models":  # which is made of the settings above
            module = importlib.import_module(f"fastattn.serve.{name}.config")
            out += [f"## Section {name}", *_class_parts(getattr(module, f"{name.title()}Config"), 3)]
    return out


def _class_parts(cls: type, level: int, notes: Mapping[str, str] = types.MappingProxyType({})) -> Iterator[str]:
    """A heading, what the docstring says beside its fields, the fields; then the same of every class among their types.

    notes: meanings of fields that the class leaves to another.
    """
    waiting, done = [cls], set()
    while waiting:
        current = waiting.pop(0)
        if current in done:
            continue
        done.add(current)
        yield f"{'#' * level} {current.__name__}"
        about = intro(current)
        if about:
            yield about
        rows = fields(current, notes)
        if rows:
            yield table(("name", "value", "default", "meaning"), [(code(n), *rest) for n, *rest in rows])
        waiting += [found for _, annotation, _ in _raw_fields(current) for found in classes(annotation)]


def _raw_fields(cls: Any) -> list[tuple[str, Any, Any]]:
    """(name, annotation with its bounds, pydantic's FieldInfo or dataclasses' Field)"""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = cls.model_fields if hasattr(cls, "model_fields") else {f.name: f for f in dataclasses.fields(cls) if f.init}
    return [(name, hints[name], info) for name, info in found.items()]


def fields(cls: Any, notes: Mapping[str, str] = types.MappingProxyType({})) -> list[Field]:
    notes = {**notes, **field_notes(cls)}
    rows = []
    for name, annotation, info in _raw_fields(cls):
        kind = type_text(annotation)
        meaning = getattr(info, "description", None) or notes.get(name, "")
        rows.append((name, kind, _default_text(info), escape(meaning)))
    return rows


def _default_text(info: Any) -> str:
    if getattr(info, "is_required", lambda: info.default is dataclasses.MISSING)():
        return "must be given"
    factory = getattr(info, "default_factory", None)
    value = factory() if callable(factory) and factory is not dataclasses.MISSING else info.default
    if value is None or value in ([], {}, (), ""):
        return ""
    return code(str(value)) if not hasattr(value, "model_fields") and not dataclasses.is_dataclass(value) else ""


def field_notes(cls: Any) -> dict[str, str]:
    """What the docstring says of each field: `name: meaning. other, third: meaning`, as everywhere in the code."""
    names = [name for name, _, _ in _raw_fields(cls)]
    notes: dict[str, str] = {}
    # A base class may say it of a field that it declares.
    for base in reversed([c for c in cls.__mro__ if c.__module__.startswith("fastattn")]):
        pieces = _pieces(base, names)
        for at, text in zip(pieces[1::2], pieces[2::2], strict=True):
            notes |= dict.fromkeys(re.findall(r"\w+", at), text.strip().rstrip(";"))
    return notes


def intro(cls: Any) -> str:
    """The docstring up to its first field."""
    return _pieces(cls, [name for name, _, _ in _raw_fields(cls)])[0].strip()


def _pieces(cls: Any, names: list[str]) -> list[str]:
    doc = cls.__dict__.get("__doc__") or ""
    if doc.startswith(f"{cls.__name__}("):  # dataclass' own
        return [""]
    one = "|".join(map(re.escape, names))
    return re.split(rf"\b((?:{one})(?:, (?:{one}))*): ", " ".join(inspect.cleandoc(doc).split())) if names else [doc]


def classes(annotation: Any) -> list[type]:
    """Our own classes with fields in a type, in the order they are named."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        ours = annotation.__module__.startswith("fastattn")
        has_fields = hasattr(annotation, "model_fields") or dataclasses.is_dataclass(annotation)
        return [annotation] if ours and has_fields else []
    return [found for part in typing.get_args(annotation) for found in classes(part)]


def type_text(annotation: Any) -> str:
    """A type as a person reads it, in Markdown: "number from 0 to 2", "list of text"."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return f"{type_text(args[0])}{_bounds(args[1:])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(part) for part in args if part is not type(None))
    if origin is typing.Literal:
        return ", ".join(code(str(value)) for value in args)
    if origin in (list, tuple, set, frozenset):
        parts = [part for part in args if part is not Ellipsis]
        return f"list of {type_text(parts[0])}" if parts else "list"
    if origin is dict:
        return f"{type_text(args[1])}, by name"
    if classes(annotation):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    words = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path", Any: "any"}
    return words.get(annotation) or {"SecretStr": "secret"}.get(getattr(annotation, "__name__", ""), str(annotation))


def _bounds(metadata: tuple[Any, ...]) -> str:
    flat = [one for item in metadata for one in (getattr(item, "metadata", None) or [item])]
    found = {name: getattr(one, name) for one in flat for name in ("ge", "gt", "le", "lt") if hasattr(one, name)}
    words = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}
    # What is the machine's own limit is none of ours.
    told = {name: value for name, value in found.items() if value is not None and abs(value) < 2**31 - 1}
    return "".join(f" {words[name]} {told[name]:,}" for name in words if name in told)


# ---- Markdown ----


def table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(' '.join(str(cell).split()) for cell in line)} |" for line in lines)


def code(text: str) -> str:
    return f"`{text.replace('|', chr(92) + '|')}`"


def escape(text: str) -> str:
    """Text of the code in a table: a bar would end the cell, an angle bracket begin a tag."""
    return re.sub(r"([|<*_\[\]])", r"\\\1", text) if "`" not in text else text.replace("|", "\\|")


PAGES: dict[str, Callable[[], str]] = {"reference/cli.md": cli_page, "reference/settings.md": settings_page}


def on_files(files: Any, config: Any) -> Any:
    """MkDocs calls this when it has read the folder of documents."""
    from mkdocs.structure.files import File

    for name, make in PAGES.items():
        files.append(File.generated(config, name, content=make()))
    return files
