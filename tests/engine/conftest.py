"""Models that the engine's tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastattn.engine.engine import Engine
from fastattn.models.decoder import DecoderModel
from fastattn.models.registry import load_model
from fastattn.models.tokenizer import Tokenizer
from tests.engine import tiny


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
