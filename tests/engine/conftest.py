"""Models that the engine's tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastattn.engine.engine import Engine
from fastattn.models.decoder import DecoderModel
from fastattn.models.registry import load_model
from fastattn.models.tokenizer import Tokenizer
from tests.engine import tiny


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The tiny model's products are too small to be worth a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def network() -> DecoderModel:
    return load_model(tiny.TinySource(), torch.device("cpu"), torch.float32, 256)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return tiny.make_tokenizer()


@pytest.fixture
def make_engine(network: DecoderModel, tokenizer: Tokenizer) -> Callable[..., Engine]:
    def make(**options: Any) -> Engine:
        return tiny.make_engine(network, tokenizer, **options)

    return make


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine()
