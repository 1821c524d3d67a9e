"""`inspect`: what a model folder or GGUF file is, from its headers and its receipt; weights are read only to count zeros."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from fastattn.compress.receipt import read_receipt
from fastattn.compress.sources import Model, opened
from fastattn.models.loader import ModelSource, TensorInfo

_GROUPS = {
    "embeddings": ("embed_tokens",),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "feed-forward": ("gate_proj", "up_proj", "down_proj"),
    "norms": ("norm", "layernorm", "q_norm", "k_norm"),
    "head": ("lm_head",),
}
# Suffixes of a quantized matrix's tensors that hold its numbers; the others are scales and sizes.
_PACKED = ("weight_packed",)
_SIDE = ("weight_scale", "weight_global_scale", "weight_zero_point", "weight_shape", "scales", "qzeros", "g_idx")


@dataclass(frozen=True)
class Group:
    """Tensors of one kind. formats: type in the file → how many. sparsity: share of zeros among its numbers, if counted."""

    name: str
    formats: dict[str, int]
    num_parameters: int
    num_bytes: int
    sparsity: float | None = None


@dataclass(frozen=True)
class Inspection:
    """bits: of storage a parameter, on average. quantization: config.json's scheme as it is. receipt: None if there is none."""

    name: str
    architecture: str
    config: dict[str, Any]
    num_parameters: int
    num_bytes: int
    bits: float
    groups: tuple[Group, ...]
    quantization: dict[str, Any] | None
    receipt: dict[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_model(model: Model, *, count_zeros: bool = False) -> Inspection:
    """Describes a model. count_zeros: decode every plain matrix of the layers to count its zeros. Raises ValueError."""
    source = opened(model)
    tensors = source.tensors()
    path = Path(source.name)
    groups = tuple(_group(source, name, members, count_zeros) for name, members in _grouped(tensors).items() if members)
    num_parameters, num_bytes = sum(g.num_parameters for g in groups), sum(g.num_bytes for g in groups)
    c = source.config
    return Inspection(
        name=source.name,
        architecture=c.architecture,
        config={
            "num_layers": c.num_layers,
            "hidden_size": c.hidden_size,
            "intermediate_size": c.intermediate_size,
            "num_heads": c.num_heads,
            "num_kv_heads": c.num_kv_heads,
            "head_dim": c.head_dim,
            "vocab_size": c.vocab_size,
            "max_position_embeddings": c.max_position_embeddings,
            "tie_word_embeddings": c.tie_word_embeddings,
        },
        num_parameters=num_parameters,
        num_bytes=num_bytes,
        bits=8 * num_bytes / max(1, num_parameters),
        groups=groups,
        quantization=_quantization(path),
        receipt=read_receipt(path) if path.is_dir() else None,
    )


def _grouped(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    found: dict[str, dict[str, TensorInfo]] = {name: {} for name in (*_GROUPS, "other")}
    for name, info in tensors.items():
        layer = name.rpartition(".")[0]
        group = next((group for group, endings in _GROUPS.items() if layer.endswith(endings)), "other")
        found[group][name] = info
    return found


def _group(source: ModelSource, name: str, members: Mapping[str, TensorInfo], count_zeros: bool) -> Group:
    formats: dict[str, int] = {}
    parameters = 0
    for tensor, info in members.items():
        if tensor.endswith(_SIDE):
            continue
        numbers = prod(info.shape)
        if tensor.endswith(_PACKED):
            numbers *= 8 if info.dtype == "I32" else 2
        parameters += numbers
        kind = f"{info.dtype}, packed" if tensor.endswith(_PACKED) else info.dtype
        formats[kind] = formats.get(kind, 0) + 1
    sparsity = _sparsity(source, members) if count_zeros and name in ("attention", "feed-forward") else None
    return Group(name, formats, parameters, sum(info.nbytes for info in members.values()), sparsity)


def _sparsity(source: ModelSource, members: Mapping[str, TensorInfo]) -> float | None:
    zeros = numbers = 0
    for name, info in members.items():
        if len(info.shape) == 2 and not name.endswith((*_PACKED, *_SIDE)) and info.dtype != "I8":
            values = torch.empty(info.shape)
            source.read(name, values)
            zeros += int((values == 0).sum())
            numbers += values.numel()
    return zeros / numbers if numbers else None


def _quantization(path: Path) -> dict[str, Any] | None:
    """`quantization_config` of a folder's config.json, which was checked when the folder was opened."""
    if not path.is_dir():
        return None
    import json

    found = json.loads((path / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    return found if isinstance(found, dict) else None
