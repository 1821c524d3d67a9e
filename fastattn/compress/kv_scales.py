"""A checkpoint's static scales for a KV cache of 8 bits, which stay as they are when its weights change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastattn.models.loader import ModelSource
from fastattn.models.loader.kv_scales import is_kv_scale
from fastattn.models.weight_formats import scheme_args

_KINDS = {"fp8": "float", "int8": "int"}


def stored_kv_scales(source: ModelSource, index: int) -> dict[str, Tensor]:
    """The scales of layer ``index`` under the names that they have, fp32."""
    found = {}
    for name, info in source.tensors().items():
        if name.startswith(f"model.layers.{index}.") and is_kv_scale(name):
            found[name] = torch.empty(info.shape)
            source.read(name, found[name])
    return found


def with_kv_cache_scheme(quantization: Mapping[str, Any] | None, source: ModelSource) -> dict[str, Any] | None:
    """``quantization``, what a config.json will say of the weights, with what the source's says of its KV cache."""
    scheme = source.config.kv_cache_scheme
    if scheme is None:
        return None if quantization is None else dict(quantization)
    scales = [info for name, info in source.tensors().items() if is_kv_scale(name)]
    one_each = all(info.shape in ((), (1,)) for info in scales)
    plain = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "compressed",
        "config_groups": {},
        "ignore": [],
    }
    described = scheme_args(8, _KINDS[scheme], "tensor" if one_each else "attn_head")
    return {**(plain if quantization is None else quantization), "kv_cache_scheme": described}
