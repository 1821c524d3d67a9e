"""A decoder of a given shape with random weights: what an engine's speed is measured with where no such model is at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastattn.models.config import ModelConfig
from fastattn.models.loader import TensorInfo, open_model
from fastattn.models.loader.source import expected_shape
from fastattn.models.registry import build_meta
from fastattn.models.tokenizer import Tokenizer
from fastattn.nn import Shard

# Llama 3 8B, as `../shared/peers/anchors_vllm.py` has it.
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


@dataclass
class RandomSource:
    """A `ModelSource` without a file: matrices are normal, of the size that keeps activations' variance, norms are ones.

    The tokenizer is SmolLM2's; what lies beyond its vocabulary has no text.
    """

    config: ModelConfig
    name: str = "random weights"
    _shapes: dict[str, tuple[int, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        meta = build_meta(self.config, max_model_len=2)
        self._shapes = {w.name: tuple(w.full_shape) for w in meta.weights()}

    def tokenizer(self) -> Tokenizer:
        return open_model("smollm2").tokenizer()

    def tensors(self) -> Mapping[str, TensorInfo]:
        return {n: TensorInfo(s, "BF16", 2 * torch.Size(s).numel()) for n, s in self._shapes.items()}

    def read(self, name: str, out: torch.Tensor, shard: Shard | None = None, copier: object = None) -> None:
        assert expected_shape(out, shard) == self._shapes[name]
        if out.dim() == 1:
            out.fill_(1.0)
        elif "embed" in name:
            out.normal_()
        else:
            out.normal_(std=self._shapes[name][1] ** -0.5)
