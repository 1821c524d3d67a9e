"""torch's scaled_dot_product_attention, by our kernels where they can."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import TorchFunctionMode

from fastattn.integrations._common import cut, fit
from fastattn.ops.attention import batch_attention
from fastattn.ops.checks import MAX_HEAD_DIM


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, differentiable.

    query: (..., H, L, E). key: (..., H, S, E). value: (..., H, S, Ev).
    attn_mask: broadcasts to (..., H, L, S); bool, True attends, or float, added to the scores. These go to torch's own
      function, and so does dropout; a warning says so. torch.nn.attention.bias.causal_lower_right and
      causal_upper_left stay here.
    dropout_p: as torch's. is_causal: top-left, query i sees keys 0 … i, also where L ≠ S.
    scale: 1/√E if None. enable_gqa: key and value may have Hk heads, Hk divides H.

    Returns (..., H, L, Ev). A query that sees no key gives 0.
    """
    causal, lower_right = is_causal, False
    mask = attn_mask
    if isinstance(mask, CausalBias):
        is_causal = mask.variant == CausalVariant.UPPER_LEFT
        lower_right = mask.variant == CausalVariant.LOWER_RIGHT
        mask = None
    reason = _why_torch(query, key, value, mask, dropout_p, scale, enable_gqa)
    if reason is None and mask is not attn_mask and causal:
        reason = "attn_mask and is_causal are both given"
    if reason is not None:
        warnings.warn(f"sdpa: {reason}; torch's own scaled_dot_product_attention runs instead", stacklevel=2)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, causal, scale=scale, enable_gqa=enable_gqa
        )
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    window = (-1, -1)
    if is_causal and num_queries < num_keys:  # no query sees a key behind the last of them: then both corners are one
        key, value = key[..., :num_queries, :], value[..., :num_queries, :]
    elif is_causal and num_queries > num_keys:  # from the bottom-right diagonal back to the top-left one
        window, is_causal = (-1, num_queries - num_keys), False
    q, k, v = (_rows(t) for t in (query, key, value))
    out, _ = batch_attention(
        fit(q), fit(k), fit(v), softmax_scale=q.shape[-1] ** -0.5 if scale is None else scale,
        causal=is_causal or lower_right, window_size=window,
    )  # fmt: skip
    return cut(out, value.shape[-1]).transpose(1, 2).reshape(*query.shape[:-1], value.shape[-1])


class replace_sdpa(TorchFunctionMode):  # noqa: N801, it is used as a function
    """`with replace_sdpa():` lets every scaled_dot_product_attention that is called in the block, and by this thread, be
    `sdpa`. Nothing is patched: what other threads and the code after the block call is torch's own."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        function = sdpa if func is F.scaled_dot_product_attention else func
        return function(*args, **(kwargs or {}))


def _rows(x: Tensor) -> Tensor:
    """(..., H, L, E) → (B, L, H, E), a view wherever one exists."""
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:]).transpose(1, 2)


def _why_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
) -> str | None:
    """Why our kernels cannot run this call, None if they can."""
    if mask is not None:
        return f"attn_mask is given, of shape {tuple(mask.shape)}"
    if dropout_p > 0:
        return f"dropout_p is {dropout_p}"
    if scale is not None and scale < 0:
        return f"scale is {scale}"
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.is_nested or t.layout != torch.strided or t.device.type not in ("cpu", "cuda"):
            return f"{name} is a nested or sparse tensor, or on a device without our kernels"
        if t.dtype not in (torch.float16, torch.bfloat16) and not (t.is_cpu and t.dtype == torch.float32):
            return f"{name} is {t.dtype}"
        if t.dim() < 3 or t.shape[-1] > MAX_HEAD_DIM or t.shape[-1] == 0:
            return f"{name} has shape {tuple(t.shape)}"
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3] or key.shape[-3:-1] != value.shape[-3:-1]:
        return f"the shapes broadcast: {shapes}"
    if query.shape[-1] != key.shape[-1] or not query.dtype == key.dtype == value.dtype:
        return f"the arguments do not fit each other: {shapes}"  # torch has the error message
    heads, kv_heads = query.shape[-3], key.shape[-3]
    if heads != kv_heads and (not enable_gqa or kv_heads == 0 or heads % kv_heads != 0):
        return f"the numbers of heads do not fit: {shapes}"
    return None
