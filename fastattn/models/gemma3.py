"""Gemma 3 (text): norms before and after each sublayer, QK-norm, five sliding-window layers to each global one."""

from __future__ import annotations

import torch

from fastattn import nn
from fastattn.models.config import ModelConfig
from fastattn.models.decoder import DecoderModel
from fastattn.models.llama import LlamaLayer


class Gemma3Layer(LlamaLayer):
    """x + norm(attn(norm(x))), then x + norm(mlp(norm(x))) (Gemma Team, 2025)."""

    def __init__(self, config: ModelConfig, index: int, tp: nn.TensorParallel = nn.ALONE) -> None:
        super().__init__(config, index, tp)
        self.pre_feedforward_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor | nn.NormInside | None,
        residual: torch.Tensor,
        cos_sin: torch.Tensor,
        meta: nn.AttentionMetadata,
        *cache: torch.Tensor,
    ) -> tuple[torch.Tensor | nn.NormInside | None, torch.Tensor]:
        rows = self._first_norm(x, residual)
        added = self.post_attention_layernorm(self.self_attn(rows, cos_sin, meta, *cache))
        rows = self.pre_feedforward_layernorm.before(self.mlp.gate_up_proj, added, residual)
        return self.post_feedforward_layernorm(self.mlp(rows)), residual


class Gemma3ForCausalLM(DecoderModel):
    def __init__(self, config: ModelConfig, max_model_len: int, tp: nn.TensorParallel = nn.ALONE) -> None:
        super().__init__(config, [Gemma3Layer(config, i, tp) for i in range(config.num_layers)], max_model_len, tp)
