"""The tiny model of the engine's tests, with matrices that every format fits, and little text for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fastattn.compress import CalibrationOptions
from tests.engine.tiny import CONFIG, TinySource


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """The tiny model's products are too small to be worth a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def source() -> TinySource:
    return TinySource(config=replace(CONFIG, intermediate_size=64))


@pytest.fixture
def calibration(text: str) -> CalibrationOptions:
    return CalibrationOptions((text,), samples=8, length=48)


@pytest.fixture
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, and the dog does not mind. " * 40, encoding="utf-8")
    return str(path)
