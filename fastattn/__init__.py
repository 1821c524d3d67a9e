"""fastattn: hand-written attention and GEMM kernels for NVIDIA GPUs, and an inference runtime on top of them.

Importing the package is cheap and makes no CUDA context: what is heavy is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastattn.engine.async_engine import AsyncEngine as AsyncEngine
    from fastattn.engine.config import EngineConfig as EngineConfig
    from fastattn.engine.engine import Engine as Engine
    from fastattn.engine.llm import LLM as LLM
    from fastattn.engine.outputs import CompletionOutput as CompletionOutput
    from fastattn.engine.outputs import RequestOutput as RequestOutput
    from fastattn.engine.pooling_params import PoolingParams as PoolingParams
    from fastattn.engine.sampling_params import SamplingParams as SamplingParams
    from fastattn.engine.structured_output import StructuredOutput as StructuredOutput
    from fastattn.integrations.flash_attn import flash_attn_func as flash_attn_func
    from fastattn.integrations.flash_attn import flash_attn_kvpacked_func as flash_attn_kvpacked_func
    from fastattn.integrations.flash_attn import flash_attn_qkvpacked_func as flash_attn_qkvpacked_func
    from fastattn.integrations.flash_attn import flash_attn_varlen_func as flash_attn_varlen_func
    from fastattn.integrations.flash_attn import flash_attn_varlen_kvpacked_func as flash_attn_varlen_kvpacked_func
    from fastattn.integrations.flash_attn import flash_attn_varlen_qkvpacked_func as flash_attn_varlen_qkvpacked_func
    from fastattn.integrations.flash_attn import flash_attn_with_kvcache as flash_attn_with_kvcache
    from fastattn.integrations.sdpa import replace_sdpa as replace_sdpa
    from fastattn.integrations.sdpa import sdpa as sdpa
    from fastattn.nn.gated_mlp import GatedMLP as GatedMLP
    from fastattn.nn.linear import Linear as Linear
    from fastattn.nn.norm_linear import NormLinear as NormLinear
    from fastattn.ops import fp4_linear as fp4_linear
    from fastattn.ops import fp8_linear as fp8_linear
    from fastattn.ops import gated_linear as gated_linear
    from fastattn.ops import int4_linear as int4_linear
    from fastattn.ops import int8_linear as int8_linear
    from fastattn.ops import layer_norm_linear as layer_norm_linear
    from fastattn.ops import linear as linear
    from fastattn.ops import rms_norm_linear as rms_norm_linear
    from fastattn.ops.attention_merge import merge_attention_states as merge_attention_states
    from fastattn.ops.explain import explain as explain

_LAZY = {
    "LLM": "fastattn.engine.llm",
    "Engine": "fastattn.engine.engine",
    "AsyncEngine": "fastattn.engine.async_engine",
    "EngineConfig": "fastattn.engine.config",
    "SamplingParams": "fastattn.engine.sampling_params",
    "PoolingParams": "fastattn.engine.pooling_params",
    "StructuredOutput": "fastattn.engine.structured_output",
    "RequestOutput": "fastattn.engine.outputs",
    "CompletionOutput": "fastattn.engine.outputs",
    "explain": "fastattn.ops.explain",
    "Linear": "fastattn.nn.linear",
    "NormLinear": "fastattn.nn.norm_linear",
    "GatedMLP": "fastattn.nn.gated_mlp",
    "linear": "fastattn.ops",
    "gated_linear": "fastattn.ops",
    "rms_norm_linear": "fastattn.ops",
    "layer_norm_linear": "fastattn.ops",
    "int8_linear": "fastattn.ops",
    "fp8_linear": "fastattn.ops",
    "int4_linear": "fastattn.ops",
    "fp4_linear": "fastattn.ops",
    "merge_attention_states": "fastattn.ops.attention_merge",
    "sdpa": "fastattn.integrations.sdpa",
    "replace_sdpa": "fastattn.integrations.sdpa",
    "flash_attn_func": "fastattn.integrations.flash_attn",
    "flash_attn_kvpacked_func": "fastattn.integrations.flash_attn",
    "flash_attn_qkvpacked_func": "fastattn.integrations.flash_attn",
    "flash_attn_varlen_func": "fastattn.integrations.flash_attn",
    "flash_attn_varlen_kvpacked_func": "fastattn.integrations.flash_attn",
    "flash_attn_varlen_qkvpacked_func": "fastattn.integrations.flash_attn",
    "flash_attn_with_kvcache": "fastattn.integrations.flash_attn",
}

_MODULES = (
    "bert_padding",
    "compat",
    "cupy",
    "engine",
    "fa3",
    "flashinfer",
    "models",
    "nn",
    "ops",
    "reference",
    "rotary",
)

__all__ = ["__version__", "bert_padding", "compat", "cupy", "fa3", "flashinfer", "ops", "rotary", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"fastattn.{name}")
    raise AttributeError(f"module 'fastattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
