"""The paged KV cache: in which numbers keys and values are kept, and the memory for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# What a layer reads and writes: k_cache, v_cache (num_blocks, block_size, num_kv_heads, head_dim) and, if they are of 8 bits,
# k_scale, v_scale (num_blocks, block_size, num_kv_heads) fp32.
LayerCache = tuple[torch.Tensor, ...]

# vLLM's names; "auto" is the model's dtype.
_DTYPES = {
    "auto": None,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_per_token_head": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int8_per_token_head": torch.int8,
}


@dataclass(frozen=True)
class KVCacheFormat:
    """dtype: the model's, or float8_e4m3fn or int8 with a scale for each token's head, which is written with it: so nothing is
    calibrated, no token is out of range, and what a token leaves in the cache depends on that token alone."""

    dtype: torch.dtype

    @property
    def has_scales(self) -> bool:
        return self.dtype in (torch.float8_e4m3fn, torch.int8)

    def bytes_per_token(self, num_layers: int, num_kv_heads: int, head_dim: int) -> int:
        return num_layers * 2 * num_kv_heads * (head_dim * self.dtype.itemsize + 4 * self.has_scales)


def check_kv_cache_dtype(name: str) -> None:
    if name not in _DTYPES:
        raise ValueError(f"kv_cache_dtype is {name!r}, allowed are {', '.join(map(repr, _DTYPES))}")


def kv_cache_format(name: str, dtype: torch.dtype, head_dim: int) -> KVCacheFormat:
    """name: the option kv_cache_dtype. dtype, head_dim: the model's."""
    check_kv_cache_dtype(name)
    form = KVCacheFormat(_DTYPES[name] or dtype)
    if form.has_scales and head_dim % 16 != 0:
        raise ValueError(f"kv_cache_dtype is {name!r} with head_dim {head_dim}, allowed is head_dim a multiple of 16")
    return form


class KVMemory:
    """The cache of all layers. Uninitialized on purpose: no operator reads a slot that was not written."""

    def __init__(
        self,
        form: KVCacheFormat,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device,
    ) -> None:
        # Layout, here and nowhere else: (layer, k or v, block, token in block, KV head, head dim), scales without the last.
        slots = (num_layers, 2, num_blocks, block_size, num_kv_heads)
        self.values = torch.empty((*slots, head_dim), dtype=form.dtype, device=device)
        self.scales = torch.empty(slots, dtype=torch.float32, device=device) if form.has_scales else None
        self.layers: list[LayerCache] = [
            (*self.values[i], *(() if self.scales is None else self.scales[i])) for i in range(num_layers)
        ]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)
