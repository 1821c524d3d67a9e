"""The tiny model of the engine's tests, and one that guesses badly for it."""

from __future__ import annotations

import pytest
import torch

from fastattn.models.decoder import DecoderModel
from fastattn.models.registry import load_model
from tests.engine import tiny
from tests.engine.conftest import network, one_thread, tokenizer

__all__ = ["network", "one_thread", "stranger", "tokenizer"]


@pytest.fixture(scope="session")
def stranger() -> DecoderModel:
    """Another model of the same vocabulary: right by chance only."""
    return load_model(tiny.TinySource(seed=1), torch.device("cpu"), torch.float32, 256)
