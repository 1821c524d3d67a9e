"""Static scales of a KV cache of 8 bits, as checkpoints have them: a number for each layer's keys and values, or for each KV
head's (`kv_cache_scheme` of compressed-tensors with strategy "tensor" or "attn_head")."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fastattn.models.config import ModelConfig
from fastattn.models.loader.errors import ModelFileError
from fastattn.models.loader.source import ModelSource
from fastattn.nn import Shard

# `self_attn.k_scale` of vLLM and llm-compressor, `k_proj.k_scale` of ModelOpt, `k_proj.output_scale` of Quark and older compressed-tensors.
_NAME = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.self_attn\.(?:(?:attn\.)?(?P<a>[qkv])_scale|(?P<b>[qkv])_proj\.(?:(?P=b)_scale|output_scale))"
)


def is_kv_scale(name: str) -> bool:
    """Whether a checkpoint's tensor belongs to its KV cache and not to its weights. Scales of queries count too; ours are of
    16 bits and have none."""
    return _NAME.fullmatch(name) is not None


def read_kv_scales(source: ModelSource, kv_heads: Shard) -> torch.Tensor:
    """The scales in the model's own files, see `arrange_kv_scales`."""
    found = {}
    for name, info in source.tensors().items():
        if is_kv_scale(name):
            found[name] = torch.empty(info.shape)
            source.read(name, found[name])
    return arrange_kv_scales(found, source.config, kv_heads, source.name)


def read_kv_scales_file(path: Path, config: ModelConfig, kv_heads: Shard) -> torch.Tensor:
    """The scales in a .safetensors file, see `arrange_kv_scales`."""
    try:
        with safe_open(str(path), framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys() if is_kv_scale(name)}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not found:
        raise ModelFileError(f"{path}: has no tensor like model.layers.0.self_attn.k_scale")
    return arrange_kv_scales(found, config, kv_heads, str(path))


def arrange_kv_scales(
    found: Mapping[str, torch.Tensor], config: ModelConfig, kv_heads: Shard, where: str
) -> torch.Tensor:
    """Tensors by their names in a checkpoint → (num_layers, 2, kv_heads.length) fp32, keys' and values' of this rank's heads; NaN
    where there is none. Raises ModelFileError, which begins with ``where``, for a scale that cannot be one."""
    scales = torch.full((config.num_layers, 2, config.num_kv_heads), torch.nan)
    for name, tensor in found.items():
        match = _NAME.fullmatch(name)
        assert match is not None
        layer, which = int(match["layer"]), match["a"] or match["b"]
        if layer >= config.num_layers:
            raise ModelFileError(f"{where}: has {name}, but the model has {config.num_layers} layers")
        if which == "q":
            continue
        if tensor.numel() not in (1, config.num_kv_heads):
            raise ModelFileError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, expected one number or {config.num_kv_heads}, one a KV head"
            )
        values = tensor.float().flatten()
        if not bool(((values > 0) & values.isfinite()).all()):
            raise ModelFileError(f"{where}: {name} is {values.tolist()}, expected positive numbers")
        scales[layer, "kv".index(which)] = values
    return scales[..., kv_heads.start : kv_heads.start + kv_heads.length].contiguous()
