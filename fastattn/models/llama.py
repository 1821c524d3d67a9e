"""Llama and the models that differ from it by a flag: Mistral (window), Qwen2 (QKV bias), Qwen3 (QK-norm), SmolLM."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastattn import nn, ops
from fastattn.models.config import ModelConfig
from fastattn.models.decoder import DecoderLayer, DecoderModel, KVCache

# Between the two a decoder layer has kernels for norms and residuals. Elsewhere products add residuals and normalize: of few
# rows sums of squares are hidden behind the weights that are read, of many they come from the products in front.
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
        x: torch.Tensor | nn.NormInside | None,
        residual: torch.Tensor,
        cos_sin: torch.Tensor,
        meta: nn.AttentionMetadata,
        *cache: torch.Tensor,
    ) -> tuple[torch.Tensor | nn.NormInside | None, torch.Tensor]:
        if not isinstance(x, torch.Tensor) and self.norms_inside and not _FEW_ROWS < residual.shape[0] < _MANY_ROWS:
            norm = nn.NormInside(self.input_layernorm.eps, residual.shape[0] > _FEW_ROWS) if x is None else x
            residual = self.self_attn(residual, cos_sin, meta, *cache, residual=residual, norm=norm)
            return norm, self.mlp(residual, residual=residual, norm=norm)
        rows = self._first_norm(x, residual)
        added = self.self_attn(rows, cos_sin, meta, *cache)
        return self.mlp(self.post_attention_layernorm.before(self.mlp.gate_up_proj, added, residual)), residual

    def _first_norm(self, x: torch.Tensor | nn.NormInside | None, residual: torch.Tensor) -> nn.Rows:
        norm, layer = self.input_layernorm, self.self_attn.qkv_proj
        return norm.before(layer, x, residual) if isinstance(x, torch.Tensor) else norm.before(layer, residual)

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
    def linears(self) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
        attention, mlp = self.self_attn, self.mlp
        return attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj

    @property
    def is_alone_on_hopper(self) -> bool:
        """On a single GPU of compute capability 9.0, where its results may be rounded otherwise than those of many rows."""
        device = self.input_layernorm.weight.device
        if self.batch_invariant or self.self_attn.tp.size > 1 or device.type != "cuda":
            return False
        return torch.cuda.get_device_capability(device) == (9, 0)

    @property
    def can_have_norms_inside(self) -> bool:
        """Its products are plain ones, with kernels that normalize their rows and add to their results."""
        return self.is_alone_on_hopper and all(layer.is_plain for layer in self.linears)

    @property
    def tile_order(self) -> int | None:
        """That of the tiles of all its weights, if they are NVFP4."""
        weights = [layer.quantized for layer in self.linears]
        fp4 = [w for w in weights if isinstance(w, nn.Fp4Weight) and w.is_nvfp4 and w.in_tiles]
        orders = {w.tile_order for w in fp4}
        return orders.pop() if self.is_alone_on_hopper and len(fp4) == 4 and len(orders) == 1 else None


class LlamaForCausalLM(DecoderModel):
    # For so many sequences with one new token each, all layers are one kernel; 0 until the weights are as it wants them.
    max_one_kernel_tokens = 0
    # The embeddings in front of them and the head behind them too.
    has_head_inside = False
    # Of the layers' weights, where that kernel takes them as NVFP4 in tiles.
    tile_order: int | None = None

    def __init__(self, config: ModelConfig, max_model_len: int, tp: nn.TensorParallel = nn.ALONE) -> None:
        super().__init__(config, [LlamaLayer(config, i, tp) for i in range(config.num_layers)], max_model_len, tp)
        self.workspace: torch.Tensor | None = None

    def pack(self) -> None:
        super().pack()
        layers = [layer for layer in self.layers if isinstance(layer, LlamaLayer) and layer.can_have_norms_inside]
        for layer in layers:
            layer.put_norms_inside()
        c, table = self.config, self.cos_sin
        assert isinstance(table, torch.Tensor)
        orders = {layer.tile_order for layer in self.layers if isinstance(layer, LlamaLayer)}
        if len(orders) == 1 and self.embed_tokens.weight.dtype is torch.bfloat16:
            self.tile_order = orders.pop()
        in_tiles = self.tile_order is not None
        takes_all = in_tiles or len(layers) == c.num_layers
        if takes_all and c.num_layers <= 128 and _is_plain(c) and table.shape[1] == c.head_dim:
            sizes = (c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim)
            num_sms = torch.cuda.get_device_properties(table.device).multi_processor_count
            self.max_one_kernel_tokens = ops.decode_layers_max_tokens(*sizes, num_sms, in_tiles=in_tiles)
            head, plain = self.lm_head, c.vocab_size % 8 == 0 and not c.final_softcap and self.embed_tokens.scale == 1.0
            self.has_head_inside = plain and (head is None or (head.is_plain and head.bias is None))

    def run_layers(
        self, residual: torch.Tensor, meta: nn.AttentionMetadata, kv_cache: KVCache
    ) -> tuple[torch.Tensor | nn.NormInside | None, torch.Tensor]:
        if not self._is_one_kernel(residual.shape[0], residual.dtype, meta, kv_cache):
            return super().run_layers(residual, meta, kv_cache)
        self.decode_layers(residual, meta, kv_cache)
        return None, residual

    def decode(
        self,
        token_ids: torch.Tensor,
        meta: nn.AttentionMetadata,
        kv_cache: KVCache,
        drawn: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        table, num_tokens = self.embed_tokens.weight, token_ids.shape[0]
        if not self._is_all_one_kernel(num_tokens, meta, kv_cache):
            return super().decode(token_ids, meta, kv_cache, drawn, out)
        logits = table.new_empty(num_tokens, table.shape[0]) if out is None else out
        weight = table if self.lm_head is None else self.lm_head.weight
        head = ops.DecoderHead(token_ids, drawn, table, self.norm.weight, weight, logits)
        self.decode_layers(table.new_empty(num_tokens, table.shape[1]), meta, kv_cache, head)
        return logits

    def _is_all_one_kernel(self, num_tokens: int, meta: nn.AttentionMetadata, kv_cache: KVCache) -> bool:
        dtype = self.embed_tokens.weight.dtype
        return self.has_head_inside and self._is_one_kernel(num_tokens, dtype, meta, kv_cache)

    def _is_one_kernel(
        self, num_tokens: int, dtype: torch.dtype, meta: nn.AttentionMetadata, kv_cache: KVCache
    ) -> bool:
        one_each = meta.max_seqlen_q == 1 and meta.block_table.shape[0] == num_tokens
        is_plain = not meta.calibrate and meta.shared is None
        block_size = kv_cache[0][0].shape[1]
        takes_cache = kv_cache[0][0].dtype is dtype and block_size & (block_size - 1) == 0
        return one_each and is_plain and takes_cache and 0 < num_tokens <= self.max_one_kernel_tokens

    def decode_layers(
        self,
        residual: torch.Tensor,
        meta: nn.AttentionMetadata,
        kv_cache: KVCache,
        head: ops.DecoderHead | None = None,
    ) -> None:
        """All layers for the newest token of each sequence, by one kernel, in place; and the head if there is one."""
        layers, c = [layer for layer in self.layers if isinstance(layer, LlamaLayer)], self.config
        assert isinstance(self.cos_sin, torch.Tensor)
        attention = [layer.self_attn for layer in layers]
        qkv, out, gate_up, down = ([layer.linears[i] for layer in layers] for i in range(4))
        qkv_bias = [linear.bias for linear in qkv if linear.bias is not None]
        q_norm = [a.q_norm.weight for a in attention if a.q_norm is not None]
        k_norm = [a.k_norm.weight for a in attention if a.k_norm is not None]
        weights: ops.DecoderWeights | ops.DecoderFp4Weights
        if self.tile_order is None:
            weights = ops.DecoderWeights(
                [linear.weight for linear in qkv],
                [linear.weight for linear in out],
                [linear.weight for linear in gate_up],
                [linear.weight for linear in down],
                qkv_bias,
                q_norm,
                k_norm,
            )
        else:
            weights = ops.DecoderFp4Weights(
                _fp4_tiles(qkv),
                _fp4_tiles(out),
                _fp4_tiles(gate_up),
                _fp4_tiles(down),
                [layer.input_layernorm.weight for layer in layers],
                [layer.post_attention_layernorm.weight for layer in layers],
                self.tile_order,
                qkv_bias,
                q_norm,
                k_norm,
            )
        if self.workspace is None:
            sizes = (c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim)
            self.workspace = ops.decode_layers_workspace(*sizes, residual.device)
        ops.decode_layers(
            residual,
            weights,
            [cache[0] for cache in kv_cache],
            [cache[1] for cache in kv_cache],
            self.cos_sin,
            meta.positions,
            meta.slot_mapping,
            meta.seqused_k,
            meta.block_table,
            self.workspace,
            head,
            num_heads=c.num_heads,
            softmax_scale=attention[0].softmax_scale,
            activation=c.activation,
            norm_eps=c.rms_norm_eps,
            qk_norm_eps=attention[0].qk_norm_eps,
        )


def _fp4_tiles(layers: Sequence[nn.Linear]) -> ops.Fp4Tiles:
    weights = [layer.quantized for layer in layers if isinstance(layer.quantized, nn.Fp4Weight)]
    scales = [w.global_scale for w in weights if w.global_scale is not None]
    return ops.Fp4Tiles([w.codes for w in weights], [w.scale for w in weights], scales)


def _is_plain(c: ModelConfig) -> bool:
    """Nothing in the layers that the kernel for all of them does not do."""
    return (
        not any(c.layer_is_sliding)
        and not c.attn_softcap
        and not c.attention_out_bias
        and not c.mlp_bias
        and c.activation in ("silu", "gelu_tanh")
    )
