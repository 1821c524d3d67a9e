"""What the tests of fastattn.flashinfer attend to: requests, in a row and in pages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.reference import attention

HEADS, DIM = (4, 2), 32
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
layouts = pytest.mark.parametrize("layout", ["NHD", "HND"])


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def ints(*values: int, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def skip_fp32_on_gpu(device: str, dtype: torch.dtype) -> None:
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("the kernels take bf16 and fp16")


def close(found: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    tolerance = TOLERANCE[found.dtype if dtype is None else dtype]
    torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=tolerance)


@dataclass
class Requests:
    """Keys of each request in a row, and the same in shuffled pages, NaN in all that is not used."""

    keys: list[Tensor]
    values: list[Tensor]
    cache: Tensor  # (pages, 2, page_size, Hk, D)
    indptr: Tensor
    indices: Tensor
    last_page_len: Tensor

    @staticmethod
    def make(
        lengths: list[int],
        page_size: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        heads: int = HEADS[1],
        seed: int = 7,
    ) -> Requests:
        counts = [-(-n // page_size) for n in lengths]
        indptr = torch.tensor([0, *counts]).cumsum(0)
        indices = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(seed))[: sum(counts)]
        cache = torch.full((sum(counts) + 3, 2, page_size, heads, DIM), math.nan).to(device, dtype)
        keys, values = [], []
        for b, n in enumerate(lengths):
            k, v = (make(n, heads, DIM, seed=seed + 2 * b + i, dtype=dtype, device=device) for i in (0, 1))
            for t in range(n):
                page = int(indices[indptr[b] + t // page_size])
                cache[page, 0, t % page_size], cache[page, 1, t % page_size] = k[t], v[t]
            keys.append(k)
            values.append(v)
        last = [(n - 1) % page_size + 1 if n else 0 for n in lengths]
        return Requests(keys, values, cache, indptr.int(), indices.int(), ints(*last))

    def given(self, layout: str, form: str) -> Tensor | tuple[Tensor, Tensor]:
        cache = self.cache if layout == "NHD" else self.cache.transpose(2, 3).contiguous()
        return cache if form == "one" else tuple(cache[:, i].contiguous() for i in (0, 1))  # type: ignore[return-value]

    def expected(self, q: Tensor, counts: list[int], **options: Any) -> tuple[Tensor, Tensor]:
        """out (T, H, D) and lse (T, H) to base 2 of packed queries."""
        outs, lses = [], []
        for rows, k, v in zip(q.float().split(counts), self.keys, self.values, strict=True):
            out, lse = attention(rows[None], k.float()[None], v.float()[None], **options)
            outs.append(out[0])
            lses.append(lse[0].t())
        return torch.cat(outs), torch.cat(lses) / math.log(2)


def workspace(device: str = "cpu") -> Tensor:
    return torch.empty(1024, dtype=torch.uint8, device=device)


LENGTHS = [1, 37, 0, 64, 5]
