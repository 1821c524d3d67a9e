"""The command line on the tiny model of the engine's tests, under the name "tiny"."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

import fastattn.engine.setup
import fastattn.models.loader
from fastattn.cli.main import app
from fastattn.models.loader import ModelSource
from tests.engine.tiny import TinySource

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """invoke(*arguments, stdin="") runs a command in this process."""
    real = fastattn.models.loader.open_model

    def open_model(name: object) -> ModelSource:
        return TinySource() if str(name) == "tiny" else real(name)  # type: ignore[arg-type]

    monkeypatch.setattr(fastattn.models.loader, "open_model", open_model)
    monkeypatch.setattr(fastattn.engine.setup, "open_model", open_model)

    def call(*arguments: str, stdin: str | bytes = "") -> Result:
        return CliRunner().invoke(app, list(arguments), input=stdin)

    return call
