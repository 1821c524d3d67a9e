"""A small stand-in for what our backend uses of vLLM 0.26, for tests where vLLM is not installed.

Names, arguments and enumerations are vLLM's; `test_vllm_real.py` holds them to it where vLLM is.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

M = TypeVar("M")
_LAYERS = "vllm.model_executor.layers"
_QUANTIZATION = f"{_LAYERS}.quantization"


class DeviceCapability(NamedTuple):
    major: int
    minor: int


class AttentionType(str, enum.Enum):
    DECODER = "decoder"
    ENCODER_ONLY = "encoder_only"
    ENCODER_DECODER = "encoder_decoder"


class AttentionCGSupport(enum.Enum):
    ALWAYS = 3
    UNIFORM_BATCH = 2
    UNIFORM_SINGLE_TOKEN_DECODE = 1
    NEVER = 0


class CUDAGraphMode(enum.Enum):
    NONE = 0
    PIECEWISE = 1
    FULL = 2
    FULL_AND_PIECEWISE = (2, 1)

    def mixed_mode(self) -> CUDAGraphMode:
        return CUDAGraphMode(self.value[1]) if isinstance(self.value, tuple) else self


class MultipleOf:
    def __init__(self, base: int) -> None:
        self.base = base


class QuantKey(NamedTuple):
    dtype: torch.dtype
    scale: str
    symmetric: bool = True


kFp8StaticTensorSym = QuantKey(torch.float8_e4m3fn, "static, per tensor")  # noqa: N816, as vLLM has it


class AttentionBackend:
    pass


class AttentionMetadata:
    pass


class AttentionImpl(Generic[M]):
    pass


class AttentionMetadataBuilder(Generic[M]):
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        self.kv_cache_spec, self.vllm_config = kv_cache_spec, vllm_config


@dataclass
class CommonAttentionMetadata:
    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Tensor
    slot_mapping: Tensor
    causal: bool | Tensor = True


class Backends(enum.Enum):
    FLASH_ATTN = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
    CUSTOM = None

    def is_overridden(self) -> bool:
        return self in overrides

    def get_path(self) -> str:
        return overrides.get(self, self.value)


overrides: dict[Backends, str] = {}


def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """Writes the rows of as many slots as there are; -1 is none. A cache of 8 bits comes as bytes."""
    page = key_cache.shape[1]
    for i, slot in enumerate(slot_mapping.tolist()):
        for cache, x, scale in ((key_cache, key, k_scale), (value_cache, value, v_scale)):
            row = x[i]
            if kv_cache_dtype.startswith("fp8"):
                row = (row.float() / scale.reshape(-1, 1)).to(torch.float8_e4m3fn).view(torch.uint8)
            if slot >= 0:
                cache[slot // page, slot % page] = row


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(content)
    return module


@contextmanager
def installed(layout: str = "NHD", batch_invariant: bool = False) -> Iterator[Any]:
    """`fastattn.integrations.vllm.backend` on this stand-in, as one module for the block."""
    custom_ops = _module("vllm._custom_ops", reshape_and_cache_flash=reshape_and_cache_flash)
    here = {name: value for name, value in globals().items() if not name.startswith("_")}
    envs = _module("vllm.envs", VLLM_BATCH_INVARIANT=batch_invariant)
    modules = {
        "vllm": _module("vllm", _custom_ops=custom_ops, envs=envs, __path__=[]),
        "vllm.envs": envs,
        "vllm._custom_ops": custom_ops,
        "vllm.config": _module("vllm.config", CUDAGraphMode=CUDAGraphMode),
        **{
            name: _module(name, __path__=[])
            for name in ("vllm.model_executor", _LAYERS, _QUANTIZATION, f"{_QUANTIZATION}.utils")
        },
        f"{_QUANTIZATION}.utils.quant_utils": _module("…quant_utils", kFp8StaticTensorSym=kFp8StaticTensorSym),
        "vllm.v1": _module("vllm.v1", __path__=[]),
        "vllm.v1.attention": _module("vllm.v1.attention", __path__=[]),
        "vllm.v1.attention.backend": _module("vllm.v1.attention.backend", **here),
        "vllm.v1.attention.backends": _module("vllm.v1.attention.backends", __path__=[]),
        "vllm.v1.attention.backends.utils": _module("…utils", get_kv_cache_layout=lambda: layout),
        "vllm.v1.attention.backends.registry": _module(
            "…registry", AttentionBackendEnum=Backends, register_backend=overrides.__setitem__
        ),
    }
    ours = "fastattn.integrations.vllm.backend"
    before = {name: sys.modules.pop(name) for name in [*modules, ours] if name in sys.modules}
    sys.modules.update(modules)
    overrides.clear()
    try:
        import fastattn.integrations.vllm.backend as backend

        yield backend
    finally:
        for name in (*modules, ours):
            sys.modules.pop(name, None)
        sys.modules.update(before)


def config(
    mode: CUDAGraphMode = CUDAGraphMode.FULL_AND_PIECEWISE,
    rswa_window: int | None = None,
    chunked_prefill: bool = True,
    prefix_caching: bool = True,
) -> SimpleNamespace:
    """As much of a VllmConfig as a builder reads."""
    return SimpleNamespace(
        model_config=SimpleNamespace(rswa_window=rswa_window),
        compilation_config=SimpleNamespace(cudagraph_mode=mode),
        scheduler_config=SimpleNamespace(enable_chunked_prefill=chunked_prefill),
        cache_config=SimpleNamespace(enable_prefix_caching=prefix_caching),
    )
