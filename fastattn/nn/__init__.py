"""The layers that every model is composed of; no model names here."""

from fastattn.nn.attention import Attention, AttentionMetadata
from fastattn.nn.embedding import Embedding
from fastattn.nn.fp4 import Fp4Scheme, Fp4Weight
from fastattn.nn.fp8_blocks import Fp8BlockScheme
from fastattn.nn.gated_mlp import GatedMLP
from fastattn.nn.int4 import AwqScheme, GptqScheme, Int4Scheme
from fastattn.nn.kv_cache import (
    KVCacheFormat,
    KVMemory,
    LayerCache,
    check_kv_cache_dtype,
    check_kv_cache_scales,
    kv_cache_format,
)
from fastattn.nn.linear import Linear, MergedLinear, NormInside
from fastattn.nn.module import Module, Weight, Weights
from fastattn.nn.norm import RMSNorm
from fastattn.nn.norm_linear import NormLinear
from fastattn.nn.parallel import ALONE, CollectiveError, TensorParallel
from fastattn.nn.parallel_mlp import ParallelMLP
from fastattn.nn.quantized import Fp8Scheme, Int8Scheme, QuantizedWeight, Rows, Scheme
from fastattn.nn.rotary import rotary_table
from fastattn.nn.shard import Shard
from fastattn.reference.gated_linear import interleave_gate_up, split_gate_up
from fastattn.reference.norm_linear import fold_layer_norm, fold_rms_norm

__all__ = [
    "ALONE",
    "Attention",
    "AttentionMetadata",
    "AwqScheme",
    "CollectiveError",
    "Embedding",
    "Fp4Scheme",
    "Fp4Weight",
    "Fp8BlockScheme",
    "Fp8Scheme",
    "GatedMLP",
    "GptqScheme",
    "Int4Scheme",
    "Int8Scheme",
    "KVCacheFormat",
    "KVMemory",
    "LayerCache",
    "Linear",
    "MergedLinear",
    "Module",
    "NormInside",
    "NormLinear",
    "ParallelMLP",
    "QuantizedWeight",
    "RMSNorm",
    "Rows",
    "Scheme",
    "Shard",
    "TensorParallel",
    "Weight",
    "Weights",
    "check_kv_cache_dtype",
    "check_kv_cache_scales",
    "fold_layer_norm",
    "fold_rms_norm",
    "interleave_gate_up",
    "kv_cache_format",
    "rotary_table",
    "split_gate_up",
]
