"""What the functions of this package have in common: layouts, scales, base-2 LSE, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn.integrations._common import not_implemented

LOG2_E = math.log2(math.e)
FP8 = torch.float8_e4m3fn
PagedCache = Tensor | tuple[Tensor, Tensor]
DType = str | torch.dtype
Scale = float | Tensor | None  # a tensor: of one number, or (Hk)


def refuse(op: str, **given: Any) -> None:
    """Options of FlashInfer that change results and that our operators lack: only None (or False, or 0) will do."""
    for name, value in given.items():
        if value is not None and value is not False and not (isinstance(value, int) and value == 0):
            shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            not_implemented(op, f"{name} is {shown}, expected {0 if type(value) is int else None}: it is not supported")


def check_encoding(op: str, pos_encoding_mode: str) -> None:
    if pos_encoding_mode not in ("NONE", "ROPE_LLAMA", "ALIBI"):
        raise ValueError(f"{op}: pos_encoding_mode is {pos_encoding_mode!r}, expected 'NONE'")
    if pos_encoding_mode != "NONE":
        not_implemented(
            op,
            f"pos_encoding_mode is {pos_encoding_mode!r}, expected 'NONE': rotate q and k before, with apply_rope_pos_ids",
        )


def check_layout(op: str, kv_layout: str) -> None:
    if kv_layout not in ("NHD", "HND"):
        raise ValueError(f"{op}: kv_layout is {kv_layout!r}, expected 'NHD' or 'HND'")


def tokens_first(t: Tensor, kv_layout: str) -> Tensor:
    """(…, S, Hk, D), a view, out of either layout."""
    return t if kv_layout == "NHD" else t.transpose(-3, -2)


def caches(op: str, paged_kv_cache: PagedCache, kv_layout: str) -> tuple[Tensor, Tensor]:
    """k and v (pages, page_size, Hk, D), views of a pair or of one tensor with a dimension of 2 behind the pages."""
    if isinstance(paged_kv_cache, Tensor):
        if paged_kv_cache.dim() != 5 or paged_kv_cache.shape[1] != 2:
            inner = "page_size, Hk, D" if kv_layout == "NHD" else "Hk, page_size, D"
            raise ValueError(
                f"{op}: paged_kv_cache has shape {tuple(paged_kv_cache.shape)}, expected (pages, 2, {inner}) or a tuple "
                f"(k, v) of (pages, {inner})"
            )
        k, v = paged_kv_cache.unbind(1)
    else:
        k, v = paged_kv_cache
    for name, t in (("k", k), ("v", v)):
        if t.dim() != 4:
            raise ValueError(
                f"{op}: paged_kv_cache's {name} has shape {tuple(t.shape)}, expected 4 dimensions for kv_layout "
                f"{kv_layout!r}"
            )
    return tokens_first(k, kv_layout), tokens_first(v, kv_layout)


def scale_of(op: str, head_dim: int, sm_scale: float | None, **factors: Scale) -> float:
    """sm_scale, 1/√D if None, times the factors that are given."""
    scale = max(head_dim, 1) ** -0.5 if sm_scale is None else sm_scale
    for name, factor in factors.items():
        if isinstance(factor, Tensor):
            not_implemented(op, f"{name} is a tensor, expected a float: reading it would wait for the GPU")
        scale *= 1.0 if factor is None else factor
    return float(scale)


def scale_of_heads(op: str, name: str, scale: Scale, k_cache: Tensor) -> Tensor:
    """(Hk) fp32, on the cache's device, of k_cache (pages, page_size, Hk, D): ones if None."""
    heads = k_cache.shape[2]
    if not isinstance(scale, Tensor):
        return torch.full((heads,), 1.0 if scale is None else scale, device=k_cache.device)
    if scale.numel() != 1 and scale.shape != (heads,):
        raise ValueError(f"{op}: {name} has shape {tuple(scale.shape)}, expected one number or (Hk) = ({heads},)")
    return scale.to(k_cache.device, torch.float32).flatten().expand(heads)


def softcap_of(op: str, logits_soft_cap: float | None) -> float:
    """None and 0 are off."""
    cap = 0.0 if logits_soft_cap is None else float(logits_soft_cap)
    if cap < 0:
        raise ValueError(f"{op}: logits_soft_cap is {cap}, expected a number > 0, or 0 or None for none")
    return cap


def window_of(op: str, window_left: int) -> tuple[int, int]:
    """FlashInfer's windows have a left side only."""
    if window_left < -1:
        raise ValueError(f"{op}: window_left is {window_left}, expected an int ≥ 0, or -1 for none")
    return window_left, -1


def dtype_of(op: str, name: str, dtype: DType) -> torch.dtype:
    """A dtype that may come as its name, such as "float16"."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{op}: {name} is {dtype!r}, expected a torch.dtype or its name")
    return found


def scaled(out: Tensor, v_scale: Scale) -> Tensor:
    return out if v_scale is None else out * v_scale


def base2(lse: Tensor) -> Tensor:
    """(H, T), natural logarithm → (T, H), to base 2: what FlashInfer's kernels give and its merges take."""
    return (lse * LOG2_E).t().contiguous()


def given(result: Tensor, out: Tensor | None) -> Tensor:
    """The result, in `out` if the caller brought one."""
    return result if out is None else out.copy_(result)
