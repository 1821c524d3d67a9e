"""Hostile inputs: odd sizes, gaps filled with NaN between the rows, pages and table entries that must never be read.

Everything is drawn on the CPU and then moved, so that a CPU and a CUDA run see the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Around the tile sizes, where off-by-one errors live, and primes.
LENGTHS = (0, 1, 2, 7, 31, 63, 64, 65, 127, 128, 129, 211)
UNUSED_BLOCK = 2**31 - 1


@dataclass
class Gen:
    """A seeded source of tensors for one device."""

    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        self.rng = torch.Generator().manual_seed(self.seed)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.rng) * scale).to(dtype).to(self.device)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.rng).to(self.device)

    def ints(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Integers in low … high - 1."""
        return torch.randint(low, high, shape, generator=self.rng).to(dtype).to(self.device)

    def permutation(self, n: int) -> list[int]:
        return [int(i) for i in torch.randperm(n, generator=self.rng)]

    def tensor(self, values: Sequence[object], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device)


def offsets(lengths: Sequence[int]) -> list[int]:
    out = [0]
    for n in lengths:
        out.append(out[-1] + n)
    return out


def gapped(t: Tensor) -> Tensor:
    """The same values with NaN (or a huge integer) between the rows: every stride but the last is odd or padded."""
    if t.dim() < 2:
        return t
    *leading, width = t.shape
    padded = [n + 1 for n in leading] + [width + max(8, 16 // t.itemsize)]
    poison = float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max
    out = torch.full(padded, poison, dtype=t.dtype, device=t.device)[tuple(slice(0, n) for n in t.shape)]
    return out.copy_(t)


@dataclass
class Pages:
    """A paged cache, NaN wherever no sequence owns the slot, with the dense keys and values that it holds."""

    k_cache: Tensor  # (num_blocks, block_size, Hk, D)
    v_cache: Tensor
    block_table: Tensor  # (B, max_blocks), UNUSED_BLOCK past each length
    k: list[Tensor]  # (length, Hk, D) for each sequence
    v: list[Tensor]

    def in_8_bits(
        self, gen: Gen, dtype: torch.dtype, of_tokens: bool, scaled: bool = True
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """k_cache, v_cache and their scales, of which there are none unless scaled; what no sequence owns is NaN, in int8
        -128 and its scales."""
        caches, scales = [], {}
        for name, cache in (("k_scale", self.k_cache), ("v_scale", self.v_cache)):
            owned = ~cache[..., 0].isnan()  # (num_blocks, block_size, Hk)
            largest = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
            scale = 4.0 / largest * (0.5 + gen.rand(*owned.shape))
            if not scaled:
                scale = torch.ones_like(scale)
            if not of_tokens:
                scale = scale[0, 0]
            numbers = (cache.float() / scale.unsqueeze(-1)).clamp(-largest, largest)
            caches.append(
                numbers.to(dtype) if dtype.is_floating_point else numbers.round().nan_to_num(-128.0).to(dtype)
            )
            if scaled:
                scales[name] = scale.masked_fill(~owned, float("nan")) if of_tokens else scale
        return caches[0], caches[1], scales


def pages(
    gen: Gen, lengths: Sequence[int], block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> Pages:
    counts = [-(-n // block_size) for n in lengths]
    num_blocks = sum(counts) + 3
    order = gen.permutation(num_blocks)
    k_cache, v_cache = (
        torch.full((num_blocks, block_size, num_kv_heads, head_dim), float("nan"), dtype=dtype) for _ in range(2)
    )
    table = torch.full((len(lengths), max(counts, default=0) + 1), UNUSED_BLOCK, dtype=torch.int32)
    dense: tuple[list[Tensor], list[Tensor]] = ([], [])
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        own = [order.pop() for _ in range(count)]
        table[b, :count] = torch.tensor(own, dtype=torch.int32)
        for cache, kept in zip((k_cache, v_cache), dense, strict=True):
            rows = gen.randn(length, num_kv_heads, head_dim, dtype=dtype).cpu()
            kept.append(rows)
            for i in range(length):
                cache[own[i // block_size], i % block_size] = rows[i]
    return Pages(k_cache.to(gen.device), v_cache.to(gen.device), table.to(gen.device), *dense)
