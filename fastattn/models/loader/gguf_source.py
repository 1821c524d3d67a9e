"""A model in a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from fastattn.models.config import ModelConfig, config_from_gguf
from fastattn.models.loader.copier import Copier
from fastattn.models.loader.errors import ModelFileError
from fastattn.models.loader.gguf_blocks import PLAIN_TYPES, QUANTIZED_TYPES, BlockType, decode_blocks
from fastattn.models.loader.gguf_file import GGUFTensor, read_gguf
from fastattn.models.loader.gguf_tokenizer import tokenizer_from_gguf
from fastattn.models.loader.source import TensorInfo, expected_shape
from fastattn.models.tokenizer import Tokenizer
from fastattn.nn import Shard

SUPPORTED_TYPES = (*PLAIN_TYPES, *QUANTIZED_TYPES)

# Numbers that are decoded at a time: on a CPU as many as stay in a cache level, and as torch does not share out to threads, since
# that would cost more than it gains; on a GPU as many as keep it busy, in a few times 64 MB.
_CHUNK = {"cpu": 1 << 15, "cuda": 1 << 24}

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
                if tensor.block_type.name not in SUPPORTED_TYPES:
                    raise ValueError(
                        f"tensor {name} has type {tensor.block_type.name}, supported are {', '.join(SUPPORTED_TYPES)}"
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
        return {name: TensorInfo(t.shape, t.block_type.name, t.data.nbytes) for name, t in self._tensors.items()}

    def read(self, name: str, out: torch.Tensor, shard: Shard | None = None, copier: Copier | None = None) -> None:
        """Of a shard only its rows, or the quantization blocks that its columns lie in, are read; they are decoded where ``out`` is."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelFileError(f"{self._file.path}: tensor {name} is missing")
        if (expected := expected_shape(out, shard)) != tensor.shape:
            raise ModelFileError(f"{self._file.path}: tensor {name} has shape {tensor.shape}, expected {expected}")
        shard, copier = shard or Shard.whole(tensor.shape[0]), copier or Copier()
        data, columns = tensor.data, slice(None)
        order = _hf_row_order(name, tensor.shape, self._config)
        if shard.dim < len(tensor.shape) - 1:
            rows = shard.slices[shard.dim]
            data = data[rows] if order is None else _rows(data, order[rows])
        else:  # the last dimension, the only one of a vector, lies in one stored row
            data = data if order is None else _rows(data, order)
            data, columns = _columns(data, tensor.block_type, shard)
        target = out.view(data.shape[0], -1)
        if (plain := PLAIN_TYPES.get(tensor.block_type.name)) is not None:
            copier.copy(target, data.view(plain))
            return
        step = max(1, _CHUNK[out.device.type] // tensor.shape[-1])
        for first in range(0, data.shape[0], step):
            rows_in = copier.bring(data[first : first + step], out.device)
            target[first : first + step].copy_(decode_blocks(rows_in, tensor.block_type)[:, columns])

    def _read_config(self) -> ModelConfig:
        embedding = self._file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise ValueError("tensor token_embd.weight is missing or not a matrix")
        factors = self._file.tensors.get("rope_freqs.weight")
        values = None if factors is None else tuple(_numbers(factors))
        return config_from_gguf(self._file.metadata, embedding.shape[0], "output.weight" in self._file.tensors, values)

    def _hf_name(self, name: str) -> str:
        if name in _TOP:
            return _TOP[name]
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        table = {**_LAYER, **_GEMMA_LAYER} if self._config.architecture == "gemma3" else _LAYER
        if match is None or match[2] not in table:
            raise ValueError(f"tensor {name} is unknown to architecture {self._config.architecture!r}")
        return f"model.layers.{int(match[1])}.{table[match[2]]}.{match[3]}"


def _columns(data: torch.Tensor, kind: BlockType, shard: Shard) -> tuple[torch.Tensor, slice]:
    """The blocks of each row that hold the shard's columns, and where in them those are."""
    first, last = shard.start // kind.numbers, -(-(shard.start + shard.length) // kind.numbers)
    start = shard.start - first * kind.numbers
    return data[:, first * kind.nbytes : last * kind.nbytes], slice(start, start + shard.length)


def _rows(data: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Those rows, by numpy: torch shares a copy of less than a megabyte among all cores, and waits for them 7 ms."""
    return torch.from_numpy(data.numpy()[order.numpy()])


def _numbers(tensor: GGUFTensor) -> list[float]:
    plain = PLAIN_TYPES.get(tensor.block_type.name)
    values = decode_blocks(tensor.data, tensor.block_type) if plain is None else tensor.data.view(plain)
    return [float(value) for value in values.flatten().tolist()]


def _hf_row_order(name: str, shape: tuple[int, ...], config: ModelConfig) -> torch.Tensor | None:
    """Rows of q and k in Hugging Face's order. llama.cpp's converter interleaves the two halves of each head of a Llama,
    because its rotary embedding turns neighbouring pairs; ours, like Hugging Face's, turns (i, i + head_dim / 2)."""
    if config.architecture != "llama" or len(shape) != 2:  # a vector is one row
        return None
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return None
    return torch.arange(shape[0]).view(heads, config.head_dim // 2, 2).transpose(1, 2).reshape(-1)
