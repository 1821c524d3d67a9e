"""Operators: typed functions over `torch.ops.fastattn`, with CUDA, CPU and fake implementations of each."""

from fastattn.ops._library import has_cuda_kernels
from fastattn.ops.activation import geglu, swiglu
from fastattn.ops.attention import batch_attention, paged_attention, varlen_attention
from fastattn.ops.attention_backward import batch_attention_backward, varlen_attention_backward
from fastattn.ops.attention_merge import merge_attention_states
from fastattn.ops.blocks import copy_blocks, swap_blocks
from fastattn.ops.cascade import CascadeLevel, cascade_attention, shared_prefix_levels
from fastattn.ops.decode_layers import decode_layers, decode_layers_max_tokens, decode_layers_workspace
from fastattn.ops.decoder_weights import DecoderFp4Weights, DecoderHead, DecoderWeights, Fp4Tiles
from fastattn.ops.eight_bits import (
    fp8_linear,
    int8_linear,
    quantize_fp8,
    quantize_int8,
    quantize_int8_asymmetric,
    rms_norm_quantize_fp8,
    rms_norm_quantize_int8,
)
from fastattn.ops.embedding import embedding
from fastattn.ops.four_bits import (
    fp4_fp8_linear,
    fp4_linear,
    int4_linear,
)
from fastattn.ops.fp8_blocks import fp8_block_linear, quantize_fp8_groups
from fastattn.ops.gated_linear import gated_linear, rms_norm_gated_linear
from fastattn.ops.linear import linear
from fastattn.ops.lm_head import lm_head_sample
from fastattn.ops.norm import add_rms_norm, layer_norm, rms_norm
from fastattn.ops.norm_linear import layer_norm_linear, rms_norm_linear
from fastattn.ops.rope import rope_kv_write
from fastattn.ops.sampling import adjust_logits, apply_token_bitmask, sample, speculative_sample, token_logprobs
from fastattn.ops.sparse_24 import (
    pack_sparse_24,
    sparse_fp8_linear,
    sparse_int8_linear,
    sparse_linear,
    unpack_sparse_24,
)
from fastattn.ops.w4_tiles import pack_w4_scales, pack_w4_tiles, unpack_w4_scales, unpack_w4_tiles
from fastattn.ops.weight_quantizers import (
    dequantize_fp4,
    dequantize_int4,
    quantize_int4,
    quantize_mxfp4,
    quantize_nvfp4,
)

__all__ = [
    "CascadeLevel",
    "DecoderFp4Weights",
    "DecoderHead",
    "DecoderWeights",
    "Fp4Tiles",
    "add_rms_norm",
    "adjust_logits",
    "apply_token_bitmask",
    "batch_attention",
    "batch_attention_backward",
    "cascade_attention",
    "copy_blocks",
    "decode_layers",
    "decode_layers_max_tokens",
    "decode_layers_workspace",
    "dequantize_fp4",
    "dequantize_int4",
    "embedding",
    "fp4_fp8_linear",
    "fp4_linear",
    "fp8_block_linear",
    "fp8_linear",
    "gated_linear",
    "geglu",
    "has_cuda_kernels",
    "int4_linear",
    "int8_linear",
    "layer_norm",
    "layer_norm_linear",
    "linear",
    "lm_head_sample",
    "merge_attention_states",
    "pack_sparse_24",
    "pack_w4_scales",
    "pack_w4_tiles",
    "paged_attention",
    "quantize_fp8",
    "quantize_fp8_groups",
    "quantize_int4",
    "quantize_int8",
    "quantize_int8_asymmetric",
    "quantize_mxfp4",
    "quantize_nvfp4",
    "rms_norm",
    "rms_norm_gated_linear",
    "rms_norm_linear",
    "rms_norm_quantize_fp8",
    "rms_norm_quantize_int8",
    "rope_kv_write",
    "sample",
    "shared_prefix_levels",
    "sparse_fp8_linear",
    "sparse_int8_linear",
    "sparse_linear",
    "speculative_sample",
    "swap_blocks",
    "swiglu",
    "token_logprobs",
    "unpack_sparse_24",
    "unpack_w4_scales",
    "unpack_w4_tiles",
    "varlen_attention",
    "varlen_attention_backward",
]
