"""Llama and the models that differ from it by a flag: Mistral (window), Qwen2 (QKV bias), Qwen3 (QK-norm), SmolLM."""

from __future__ import annotations

import torch

from fastattn import nn
from fastattn.models.config import ModelConfig
from fastattn.models.decoder import DecoderLayer, DecoderModel

# Up to the first a decoder layer is six kernels: sums of squares are hidden behind the weights that are read, and so are
# residuals. From the second on too: a pass over the rows for each norm takes longer than what is added to the products.
_FEW_ROWS, _MANY_ROWS = 64, 4096


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

    norms_inside = False

    def forward(
        self,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        cos_sin: torch.Tensor,
        meta: nn.AttentionMetadata,
        *cache: torch.Tensor,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        if x is None and self.norms_inside and not _FEW_ROWS < residual.shape[0] < _MANY_ROWS:
            eps = self.input_layernorm.eps
            residual = self.self_attn(residual, cos_sin, meta, *cache, residual=residual, norm_eps=eps)
            return None, self.mlp(residual, residual=residual, norm_eps=eps)
        x = self.input_layernorm(residual) if x is None else self.input_layernorm(x, residual)
        x = self.self_attn(x, cos_sin, meta, *cache)
        x = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual

    def put_norms_inside(self) -> None:
        """Folds both norms' weights into the layers behind them, whose kernels can then normalize. Once, after loading."""
        for norm, linear in (
            (self.input_layernorm, self.self_attn.qkv_proj),
            (self.post_attention_layernorm, self.mlp.gate_up_proj),
        ):
            linear.fold_norm(norm.weight)
            norm.weight.fill_(1.0)
        self.norms_inside = True

    @property
    def can_have_norms_inside(self) -> bool:
        """Its products are plain ones of a single Hopper GPU, with kernels that normalize their rows and add to their results."""
        attention, mlp = self.self_attn, self.mlp
        linears = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        if attention.tp.size > 1 or not all(layer.is_plain and layer.weight.is_cuda for layer in linears):
            return False
        return torch.cuda.get_device_capability(linears[0].weight.device) == (9, 0)


class LlamaForCausalLM(DecoderModel):
    def __init__(self, config: ModelConfig, max_model_len: int, tp: nn.TensorParallel = nn.ALONE) -> None:
        super().__init__(config, [LlamaLayer(config, i, tp) for i in range(config.num_layers)], max_model_len, tp)

    def pack(self) -> None:
        super().pack()
        for layer in self.layers:
            if isinstance(layer, LlamaLayer) and layer.can_have_norms_inside:
                layer.put_norms_inside()
