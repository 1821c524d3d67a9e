"""FlashInfer's attention of one request: `single_decode_with_kv_cache`, `single_prefill_with_kv_cache`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.integrations._common import not_implemented
from fastattn.integrations.flashinfer._common import (
    base2,
    check_encoding,
    check_layout,
    refuse,
    scale_of,
    scaled,
    softcap_of,
    tokens_first,
    window_of,
)
from fastattn.ops.attention import batch_attention


@torch.no_grad()
def _attend(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_layout: str,
    pos_encoding_mode: str,
    causal: bool,
    window_left: int,
    logits_soft_cap: float | None,
    scale: float,
    v_scale: float | None,
) -> tuple[Tensor, Tensor]:
    """q (Sq, H, D) → out (Sq, H, Dv) and lse (Sq, H), base 2."""
    check_layout(op, kv_layout)
    check_encoding(op, pos_encoding_mode)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 3:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected 3 dimensions for {kv_layout!r}")
    k, v = tokens_first(k, kv_layout), tokens_first(v, kv_layout)
    out, lse = batch_attention(
        q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), softmax_scale=scale, causal=causal,
        window_size=window_of(op, window_left), softcap=softcap_of(op, logits_soft_cap),
    )  # fmt: skip
    return scaled(out.squeeze(0), v_scale), base2(lse.squeeze(0))


def single_decode_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one query to the keys of its request.

    q: (H, D). k, v: (Sk, Hk, D), for kv_layout "HND" (Hk, Sk, D).
    q_scale, k_scale: factors of the scores. v_scale: one of the result.
    use_tensor_cores, and rope_scale and rope_theta with pos_encoding_mode "NONE", change nothing.

    Returns out (H, D), with return_lse also lse (H) fp32, base 2.
    """
    op = "flashinfer.single_decode_with_kv_cache"
    if q.dim() != 2:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}, expected (H, D)")
    scale = scale_of(op, q.shape[-1], sm_scale, q_scale=q_scale, k_scale=k_scale)
    out, lse = _attend(
        op, q.unsqueeze(0), k, v, kv_layout, pos_encoding_mode, False, window_left, logits_soft_cap, scale, v_scale
    )
    return (out.squeeze(0), lse.squeeze(0)) if return_lse else out.squeeze(0)


def single_prefill_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_q: Tensor | None = None,
    scale_k: Tensor | None = None,
    scale_v: Tensor | None = None,
    o_dtype: torch.dtype | None = None,
    custom_mask: Tensor | None = None,
    packed_custom_mask: Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_cache_sf: tuple[Tensor, Tensor] | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the queries of one request to its keys.

    q: (Sq, H, D). k: (Sk, Hk, D), v: (Sk, Hk, Dv), for kv_layout "HND" (Hk, Sk, …).
    causal: aligned bottom-right. k_scale: a factor of the scores. v_scale: one of the result.
    use_fp16_qk_reduction (products are summed in fp32), backend, and rope_scale and rope_theta with pos_encoding_mode "NONE"
      change nothing. Scales of fp8 tensors (scale_q, scale_k, scale_v), custom masks and kv_cache_sf are
      NotImplementedErrors.

    Returns out (Sq, H, Dv), with return_lse also lse (Sq, H) fp32, base 2.
    """
    op = "flashinfer.single_prefill_with_kv_cache"
    refuse(op, scale_q=scale_q, scale_k=scale_k, scale_v=scale_v, custom_mask=custom_mask)
    refuse(op, packed_custom_mask=packed_custom_mask, kv_cache_sf=kv_cache_sf)
    if o_dtype not in (None, q.dtype):
        not_implemented(op, f"o_dtype is {o_dtype}, expected q's, {q.dtype}")
    scale = scale_of(op, q.shape[-1], sm_scale, k_scale=k_scale)
    out, lse = _attend(op, q, k, v, kv_layout, pos_encoding_mode, causal, window_left, logits_soft_cap, scale, v_scale)
    return (out, lse) if return_lse else out


def single_prefill_with_kv_cache_return_lse(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
    """`single_prefill_with_kv_cache` with return_lse."""
    return single_prefill_with_kv_cache(*args, **(kwargs | {"return_lse": True}))
