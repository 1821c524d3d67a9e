"""The tiny model of the engine's tests, and one that guesses badly for it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fastattn import nn
from fastattn.models.decoder import DecoderModel
from fastattn.models.registry import load_model
from tests.engine import tiny
from tests.engine.conftest import network, one_thread, tokenizer

__all__ = ["near", "network", "one_thread", "stranger", "tokenizer"]


@dataclass(frozen=True)
class NearSource(tiny.TinySource):
    """The tiny model with a little of another's weights: often right, and never sure of the same."""

    def read(self, name: str, out: torch.Tensor, shard: nn.Shard | None = None, copier: object = None) -> None:
        super().read(name, out, shard)
        other = torch.empty_like(out)
        tiny.TinySource(seed=2).read(name, other, shard)
        out.lerp_(other, 0.03)


@pytest.fixture(scope="session")
def near() -> DecoderModel:
    return load_model(NearSource(), torch.device("cpu"), torch.float32, 256)


@pytest.fixture(scope="session")
def stranger() -> DecoderModel:
    """Another model of the same vocabulary: right by chance only."""
    return load_model(tiny.TinySource(seed=1), torch.device("cpu"), torch.float32, 256)
