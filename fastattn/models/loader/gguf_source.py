"""A model in a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from fastattn.models.config import ModelConfig, config_from_gguf
from fastattn.models.loader.errors import ModelFileError
from fastattn.models.loader.gguf_file import GGUFTensor, read_gguf
from fastattn.models.loader.gguf_tokenizer import tokenizer_from_gguf
from fastattn.models.loader.source import TensorInfo, expected_shape
from fastattn.models.tokenizer import Tokenizer
from fastattn.nn import Shard

SUPPORTED_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")

# Numbers that are decoded at a time: small enough to stay in a cache level, large enough to keep numpy busy.
_CHUNK = 1 << 20

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
# Gemma has four norms, and the converter's `ffn_norm` is the one before the feed-forward.
_GEMMA_LAYER = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Tables that newer converters store and that are read as configuration.
_NOT_WEIGHTS = {"rope_freqs.weight"}


class GGUFSource:
    def __init__(self, path: Path) -> None:
        self._file = read_gguf(path)
        self._tensors: dict[str, GGUFTensor] = {}
        try:
            for name, tensor in self._file.tensors.items():
                if tensor.quant_type.name not in SUPPORTED_TYPES:
                    raise ValueError(
                        f"tensor {name} has type {tensor.quant_type.name}, supported are {', '.join(SUPPORTED_TYPES)}"
                    )
            self._config = self._read_config()
            for name, tensor in self._file.tensors.items():
                if name not in _NOT_WEIGHTS:
                    self._tensors[self._hf_name(name)] = tensor
        except ModelFileError:
            raise
        except ValueError as error:
            raise ModelFileError(f"{path}: {error}") from None

    @property
    def name(self) -> str:
        return str(self._file.path)

    @property
    def config(self) -> ModelConfig:
        return self._config

    def tokenizer(self) -> Tokenizer:
        try:
            return tokenizer_from_gguf(self._file.metadata)
        except ValueError as error:
            raise ModelFileError(f"{self._file.path}: {error}") from None

    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(t.shape, t.quant_type.name, t.data.nbytes) for name, t in self._tensors.items()}

    def read(self, name: str, out: torch.Tensor, shard: Shard | None = None) -> None:
        """Of a shard only its rows, or the quantization blocks that its columns lie in, are read and decoded."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelFileError(f"{self._file.path}: tensor {name} is missing")
        if (expected := expected_shape(out, shard)) != tensor.shape:
            raise ModelFileError(f"{self._file.path}: tensor {name} has shape {tensor.shape}, expected {expected}")
        shard = shard or Shard.whole(tensor.shape[0])
        data, columns = tensor.data, slice(None)
        order = _hf_row_order(name, tensor.shape, self._config)
        if shard.dim < len(tensor.shape) - 1:
            rows = shard.slices[shard.dim]
            data = data[rows] if order is None else data[order[rows]]
        else:  # the last dimension, the only one of a vector, lies in one stored row
            data = data if order is None else data[order]
            data, columns = _columns(data, tensor.quant_type, shard)
        target = out.view(data.shape[0], -1)
        step = max(1, _CHUNK // tensor.shape[-1])
        for start in range(0, data.shape[0], step):
            decoded = _decode(data[start : start + step], tensor.quant_type)
            target[start : start + step].copy_(decoded[:, columns])

    def _read_config(self) -> ModelConfig:
        embedding = self._file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise ValueError("tensor token_embd.weight is missing or not a matrix")
        factors = self._file.tensors.get("rope_freqs.weight")
        values = (
            None if factors is None else tuple(float(f) for f in _decode(factors.data, factors.quant_type).flatten())
        )
        return config_from_gguf(self._file.metadata, embedding.shape[0], "output.weight" in self._file.tensors, values)

    def _hf_name(self, name: str) -> str:
        if name in _TOP:
            return _TOP[name]
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        table = {**_LAYER, **_GEMMA_LAYER} if self._config.architecture == "gemma3" else _LAYER
        if match is None or match[2] not in table:
            raise ValueError(f"tensor {name} is unknown to architecture {self._config.architecture!r}")
        return f"model.layers.{int(match[1])}.{table[match[2]]}.{match[3]}"


def _columns(data: np.ndarray, quant_type: GGMLQuantizationType, shard: Shard) -> tuple[np.ndarray, slice]:
    """The blocks of each row that hold the shard's columns, and where in them those are."""
    size, num_bytes = GGML_QUANT_SIZES[quant_type]
    first, last = shard.start // size, -(-(shard.start + shard.length) // size)
    start = shard.start - first * size
    return data[:, first * num_bytes : last * num_bytes], slice(start, start + shard.length)


def _decode(data: np.ndarray, quant_type: GGMLQuantizationType) -> torch.Tensor:
    """Stored bytes (rows, bytes per row) → numbers (rows, columns) fp32."""
    if quant_type == GGMLQuantizationType.F32:
        return torch.from_numpy(data.view("<f4").copy())
    return torch.from_numpy(dequantize(data, quant_type))


def _hf_row_order(name: str, shape: tuple[int, ...], config: ModelConfig) -> np.ndarray | None:
    """Rows of q and k in Hugging Face's order. llama.cpp's converter interleaves the two halves of each head of a Llama,
    because its rotary embedding turns neighbouring pairs; ours, like Hugging Face's, turns (i, i + head_dim / 2)."""
    if config.architecture != "llama" or len(shape) != 2:  # a vector is one row
        return None
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return None
    return np.arange(shape[0]).reshape(heads, config.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
