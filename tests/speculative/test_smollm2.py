"""A real model: greedy tokens are transformers' under speculation, with chunks, prefix hits and preemption, whoever guesses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch

from fastattn import nn
from fastattn.models.config import ModelConfig
from fastattn.models.decoder import DecoderModel
from fastattn.models.loader import ModelSource, TensorInfo
from fastattn.models.registry import load_model
from fastattn.models.tokenizer import Tokenizer
from fastattn.speculative.config import SpeculativeConfig
from tests.engine.exact import Exact
from tests.engine.test_token_exact import Arrival, engine_for, opened, serve

pytestmark = [pytest.mark.timeout(1200), pytest.mark.long]


@dataclass(frozen=True)
class FirstLayers:
    """A model's first layers under its final norm and head: the cheapest draft model that there is."""

    source: ModelSource
    num_layers: int
    name: str = "first layers"

    @property
    def config(self) -> ModelConfig:
        config = self.source.config
        sliding = config.layer_is_sliding[: self.num_layers]
        return replace(config, num_layers=self.num_layers, layer_is_sliding=sliding)

    def tokenizer(self) -> Tokenizer:
        return self.source.tokenizer()

    def tensors(self) -> Mapping[str, TensorInfo]:
        def is_kept(name: str) -> bool:
            return not name.startswith("model.layers.") or int(name.split(".")[2]) < self.num_layers

        return {name: info for name, info in self.source.tensors().items() if is_kept(name)}

    def read(self, name: str, out: torch.Tensor, shard: nn.Shard | None = None, copier: object = None) -> None:
        self.source.read(name, out, shard)


@pytest.fixture(scope="module")
def exact() -> Exact:
    return opened(("smollm2", 6, 20))


@pytest.fixture(scope="module")
def draft(exact: Exact) -> DecoderModel:
    return load_model(FirstLayers(exact.source, 24), torch.device("cpu"), torch.float32, 1024)


@pytest.mark.parametrize("who", ["ngram", "first layers", "itself"])
def test_token_exact(exact: Exact, draft: DecoderModel, who: str) -> None:
    spec = (
        SpeculativeConfig(prompt_lookup_min=1, prompt_lookup_max=4, adaptive_draft_length=False)
        if who == "ngram"
        else SpeculativeConfig(model=who, num_speculative_tokens=3, adaptive_draft_length=False)
    )
    model = {"ngram": None, "first layers": draft, "itself": exact.network}[who]
    longest = max(map(len, exact.prompts)) + exact.num_tokens
    for options in (
        {"enable_prefix_caching": True, "max_num_batched_tokens": 37},
        {"num_kv_blocks": -(-longest // 8) + 6, "block_size": 8},
    ):
        engine = engine_for(exact, draft=model, speculative=spec, **options)
        serve(exact, engine, [Arrival(prompt, step=prompt % 3) for prompt in range(len(exact.prompts))])
        stats = engine.stats()
        assert stats.num_accepted_tokens > 2
        if who == "itself":
            assert stats.num_accepted_tokens >= 0.99 * stats.num_draft_tokens
        if "num_kv_blocks" in options:
            assert stats.num_preemptions > 0
