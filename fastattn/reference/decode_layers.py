"""A decoder's layers for one token of each sequence, one operator after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.reference.activation import gated_activation
from fastattn.reference.attention import paged_attention
from fastattn.reference.embedding import embedding
from fastattn.reference.gated_linear import rms_norm_gated_linear
from fastattn.reference.linear import linear
from fastattn.reference.norm import rms_norm
from fastattn.reference.norm_linear import rms_norm_linear
from fastattn.reference.quantize import NVFP4_GROUP
from fastattn.reference.quantized import fp4_linear
from fastattn.reference.rope import rope_kv_write


def decode_layers(
    residual: Tensor,
    qkv_weight: list[Tensor],
    qkv_bias: list[Tensor],
    q_norm_weight: list[Tensor],
    k_norm_weight: list[Tensor],
    out_weight: list[Tensor],
    gate_up_weight: list[Tensor],
    down_weight: list[Tensor],
    cos_sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    k_cache: list[Tensor],
    v_cache: list[Tensor],
    workspace: Tensor | None,
    num_heads: int,
    activation: str,
    softmax_scale: float,
    norm_eps: float,
    qk_norm_eps: float,
    token_ids: Tensor | None,
    drawn: Tensor | None,
    embedding_weight: Tensor | None,
    final_norm_weight: Tensor | None,
    head_weight: Tensor | None,
    logits: Tensor | None,
    tile_scales: list[Tensor],
    global_scales: list[Tensor],
    norm_weights: list[Tensor],
    tile_order: int,
) -> None:
    """residual (T, N) in place, and logits if there is a head. What is rounded is what the operators one by one round.

    tile_scales: none, or of each layer those of the four products, whose weights are NVFP4 in tiles then; global_scales likewise."""
    in_tiles = len(tile_scales) > 0

    def product(i: int, which: int, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """One of layer i's four, in x's dtype."""
        if not in_tiles:
            return linear(x, weight.to(x.dtype), bias)
        at = 4 * i + which
        return fp4_linear(x, weight, tile_scales[at], global_scales[at], NVFP4_GROUP, bias, tile_order)

    if token_ids is not None and embedding_weight is not None:
        residual.copy_(embedding(token_ids, embedding_weight, 1.0, drawn))
    num_kv_heads, head_dim = k_cache[0].shape[-2:]
    cu_seqlens_q = torch.arange(residual.shape[0] + 1, dtype=torch.int32, device=residual.device)
    for i in range(len(qkv_weight)):
        bias = qkv_bias[i] if qkv_bias else None
        if in_tiles:
            qkv = product(i, 0, rms_norm(residual, norm_weights[2 * i], norm_eps), qkv_weight[i], bias)
        else:
            qkv = rms_norm_linear(residual, qkv_weight[i], bias, norm_eps)
        qkv = qkv.view(len(residual), -1, head_dim)
        q, k, v = torch.split(qkv, [num_heads, num_kv_heads, num_kv_heads], 1)
        q_norm, k_norm = (q_norm_weight[i], k_norm_weight[i]) if q_norm_weight else (None, None)
        rope_kv_write(
            q, k, v, cos_sin, positions, slot_mapping, k_cache[i], v_cache[i], q_norm, k_norm, None, None, qk_norm_eps,
            False, False,
        )  # fmt: skip
        out, _ = paged_attention(
            q, k_cache[i], v_cache[i], cu_seqlens_q, seqused_k, block_table, None, None, None, None, None, None, 1,
            softmax_scale, True, -1, -1, 0.0, False,
        )  # fmt: skip
        residual.copy_(residual.float() + product(i, 1, out.flatten(1).float(), out_weight[i]))
        if in_tiles:
            rows = rms_norm(residual, norm_weights[2 * i + 1], norm_eps)
            gated = gated_activation(product(i, 2, rows.float(), gate_up_weight[i]), activation).to(residual.dtype)
        else:
            gated = rms_norm_gated_linear(residual, gate_up_weight[i], None, activation, norm_eps)
        residual.copy_(residual.float() + product(i, 3, gated.float(), down_weight[i]))
    if token_ids is not None and logits is not None and final_norm_weight is not None and head_weight is not None:
        logits.copy_(linear(rms_norm(residual, final_norm_weight, norm_eps), head_weight, None))
