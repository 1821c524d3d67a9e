"""Models that the engine's tests share."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastattn.engine.engine import Engine
from fastattn.engine.outputs import CompletionOutput
from fastattn.models.decoder import DecoderModel
from fastattn.models.registry import load_model
from fastattn.models.tokenizer import Tokenizer
from tests.engine import tiny
from tests.engine.requests import PARAMS, PROMPTS, Alone, MakeEngine, only


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
def make_engine(network: DecoderModel, tokenizer: Tokenizer) -> MakeEngine:
    def make(**options: Any) -> Engine:
        return tiny.make_engine(network, tokenizer, **options)

    return make


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    return make_engine()


@pytest.fixture(scope="module")
def alone(network: DecoderModel, tokenizer: Tokenizer) -> Alone:
    """What each prompt gives with nobody beside it, computed once."""

    @functools.cache
    def outputs(how: str) -> list[CompletionOutput]:
        return [only(tiny.run(tiny.make_engine(network, tokenizer), [prompt], PARAMS[how])[0]) for prompt in PROMPTS]

    return outputs
