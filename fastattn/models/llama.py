"""Llama and the models that differ from it by a flag: Mistral (window), Qwen2 (QKV bias), Qwen3 (QK-norm), SmolLM."""

from __future__ import annotations

import torch

from fastattn import nn
from fastattn.models.config import ModelConfig
from fastattn.models.decoder import DecoderLayer, DecoderModel


class LlamaLayer(DecoderLayer):
    """Pre-norm block: x + attn(norm(x)), then x + mlp(norm(x)) (Touvron et al., 2023)."""

    def __init__(self, config: ModelConfig, index: int, tp: nn.TensorParallel = nn.ALONE) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = nn.Attention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            softmax_scale=config.softmax_scale,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_out_bias,
            qk_norm_eps=config.rms_norm_eps if config.qk_norm else None,
            window=config.sliding_window if config.layer_is_sliding[index] else None,
            softcap=config.attn_softcap,
            tp=tp,
        )
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = nn.ParallelMLP(config.hidden_size, config.intermediate_size, config.activation, config.mlp_bias, tp)

    def forward(
        self,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        cos_sin: torch.Tensor,
        meta: nn.AttentionMetadata,
        *cache: torch.Tensor,
    ) -> torch.Tensor:
        x = self.input_layernorm(residual) if x is None else self.input_layernorm(x, residual)
        x = self.self_attn(x, cos_sin, meta, *cache)
        x = self.post_attention_layernorm(x, residual)
        return self.mlp(x)


class LlamaForCausalLM(DecoderModel):
    def __init__(self, config: ModelConfig, max_model_len: int, tp: nn.TensorParallel = nn.ALONE) -> None:
        super().__init__(config, [LlamaLayer(config, i, tp) for i in range(config.num_layers)], max_model_len, tp)
