"""Self-attention over a paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastattn import ops
from fastattn.nn.kv_cache import calibrated_scale
from fastattn.nn.linear import Linear, MergedLinear, NormInside
from fastattn.nn.module import Module
from fastattn.nn.norm import RMSNorm
from fastattn.nn.parallel import ALONE, TensorParallel
from fastattn.nn.quantized import Rows
from fastattn.nn.shard import Shard
from fastattn.reference.rope import hadamard_product


@dataclass(frozen=True)
class AttentionMetadata:
    """Where the tokens of one step stand. All tensors are int32 on the model's device.

    positions, slot_mapping: (T,). cu_seqlens_q: (B + 1,). seqused_k: (B,). block_table: (B, max_blocks).
    shared: what all B sequences begin with, which `seqused_k` and `block_table` are without (`ops.cascade_attention`).
    mixes_keys: as the KV cache's (`KVCacheFormat`). calibrate: its static scales are set from the step's tokens, before these are
      written.
    """

    positions: torch.Tensor
    slot_mapping: torch.Tensor
    cu_seqlens_q: torch.Tensor
    seqused_k: torch.Tensor
    block_table: torch.Tensor
    max_seqlen_q: int
    shared: ops.CascadeLevel | None = None
    mixes_keys: bool = False
    calibrate: bool = False


class Attention(Module):
    """QKV projection → (QK-norm) + rotary + cache write → paged attention → output projection.

    q, k and v are one GEMM whose output the following operators read through strides, so nothing is copied apart.
    Each rank has some of the heads: num_heads and num_kv_heads are the model's as arguments, the rank's as attributes.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        softmax_scale: float,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm_eps: float | None = None,
        window: int | None = None,
        softcap: float = 0.0,
        tp: TensorParallel = ALONE,
    ) -> None:
        super().__init__()
        q, kv = (heads.times(head_dim) for heads in tp.shard_heads(num_heads, num_kv_heads))
        self.tp, self.head_dim = tp, head_dim
        self.num_heads, self.num_kv_heads = q.length // head_dim, kv.length // head_dim
        self.qkv_proj = MergedLinear(hidden_size, (("q_proj", q), ("k_proj", kv), ("v_proj", kv)), qkv_bias)
        columns = Shard(1, q.start, q.length, q.total)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, out_bias, columns)
        self.q_norm = RMSNorm(head_dim, qk_norm_eps) if qk_norm_eps is not None else None
        self.k_norm = RMSNorm(head_dim, qk_norm_eps) if qk_norm_eps is not None else None
        self.qk_norm_eps = qk_norm_eps if qk_norm_eps is not None else 1e-6
        self.softmax_scale, self.softcap = softmax_scale, softcap
        # A window of n tokens sees itself and the n - 1 before it; flash-attn counts only those before it.
        self.window_size = (window - 1, 0) if window is not None else (-1, -1)

    def forward(
        self,
        x: Rows,
        cos_sin: torch.Tensor,
        meta: AttentionMetadata,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        *,
        residual: torch.Tensor | None = None,
        norm: NormInside | None = None,
    ) -> torch.Tensor:
        """x (T, hidden_size); cos_sin (max_position, head_dim); caches and their scales: see `LayerCache`. residual, norm:
        see `ParallelMLP`."""
        qkv = self.qkv_proj(x, norm=norm).view(x.shape[0], -1, self.head_dim)
        q = qkv[:, : self.num_heads]
        k = qkv[:, self.num_heads : self.num_heads + self.num_kv_heads]
        v = qkv[:, self.num_heads + self.num_kv_heads :]
        if meta.calibrate:
            assert k_scale is not None and v_scale is not None
            self._calibrate(k, v, cos_sin, meta, k_cache.dtype, k_scale, v_scale)
        ops.rope_kv_write(
            q,
            k,
            v,
            cos_sin,
            meta.positions,
            meta.slot_mapping,
            k_cache,
            v_cache,
            q_norm_weight=self.q_norm.weight if self.q_norm is not None else None,
            k_norm_weight=self.k_norm.weight if self.k_norm is not None else None,
            k_scale=k_scale,
            v_scale=v_scale,
            norm_eps=self.qk_norm_eps,
            hadamard=meta.mixes_keys,
        )
        own = ops.CascadeLevel(meta.cu_seqlens_q, meta.seqused_k, meta.block_table, meta.max_seqlen_q)
        if meta.shared is not None:
            out, _ = ops.cascade_attention(
                q,
                k_cache,
                v_cache,
                [meta.shared, own],
                softmax_scale=self.softmax_scale,
                softcap=self.softcap,
                k_scale=k_scale,
                v_scale=v_scale,
            )
        else:
            out, _ = ops.paged_attention(
                q,
                k_cache,
                v_cache,
                *own,
                softmax_scale=self.softmax_scale,
                causal=True,
                window_size=self.window_size,
                softcap=self.softcap,
                k_scale=k_scale,
                v_scale=v_scale,
                batch_invariant=self.batch_invariant,
            )
        return self.tp.all_reduce(self.o_proj(out.view(x.shape[0], -1), residual, norm))

    def _calibrate(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        cos_sin: torch.Tensor,
        meta: AttentionMetadata,
        dtype: torch.dtype,
        k_scale: torch.Tensor,
        v_scale: torch.Tensor,
    ) -> None:
        """Sets the scales (Hk) of a cache in ``dtype`` from k and v (T, Hk, D), as they will be written."""
        count = k.shape[0]
        pages = k.new_empty(2, count, 1, *k.shape[1:])
        ops.rope_kv_write(
            k[:, :0],  # no queries: those are rotated in place, and only once
            k,
            v,
            cos_sin,
            meta.positions,
            torch.arange(count, dtype=torch.int32, device=k.device),
            *pages,
            k_norm_weight=self.k_norm.weight if self.k_norm is not None else None,
            norm_eps=self.qk_norm_eps,
        )
        keys, values = pages.squeeze(2)
        if meta.mixes_keys:
            keys = hadamard_product(keys.float())
        k_scale.copy_(calibrated_scale(keys, dtype))
        v_scale.copy_(calibrated_scale(values, dtype))
