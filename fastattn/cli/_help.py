"""Help in groups: commands by what they are for, options by what they set, both named by typer's `rich_help_panel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typer.core import TyperCommand, TyperGroup

Records = list[tuple[str, str]]  # name, what it does


class Command(TyperCommand):
    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, Records] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                plain = "Arguments" if param.param_type_name == "argument" else "Options"
                groups.setdefault(getattr(param, "rich_help_panel", None) or plain, []).append(record)
        _write(groups, formatter)


class Group(TyperGroup):
    def format_commands(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, Records] = {}
        width = formatter.width - 6 - max(map(len, self.commands))
        for name, command in self.commands.items():
            panel = getattr(command, "rich_help_panel", None) or "Commands"
            groups.setdefault(str(panel), []).append((name, command.get_short_help_str(width)))
        _write(groups, formatter)


def _write(groups: Mapping[str, Records], formatter: Any) -> None:
    for title, records in groups.items():
        with formatter.section(title):
            formatter.write_dl(records)
