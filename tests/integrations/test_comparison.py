"""The rules that flash-attn's functions are held to: what is right passes, what is wrong by a few per cent does not."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from tests.integrations.comparison import compare
from tests.integrations.reference import attention


class Scaled(torch.autograd.Function):
    """Its input, with a gradient that is too large by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def compare_with(factor: float, seqlen: int, seed: int) -> None:
    """fp16 values so large that softmax is nearly one of its numbers: dq is small beside what it is the difference of."""
    torch.manual_seed(seed)
    q, k, v = (torch.randn(2, seqlen, 5, 16, dtype=torch.float16) * scale for scale in (5, 3, 3))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        attend = functools.partial(fastattn.flash_attn_func, causal=True, return_attn_probs=True)
        return attend(Scaled.apply(q, factor), k, v)

    compare(call, [q, k, v], attention, {"causal": True})


@pytest.mark.parametrize("seqlen", [2, 5])
def test_right_gradients_pass(seqlen: int) -> None:
    for seed in range(40):
        compare_with(1.0, seqlen, seed)


@pytest.mark.parametrize("factor", [0.95, 1.05])
@pytest.mark.parametrize("seed", range(5))
def test_a_dq_wrong_by_five_per_cent_does_not(seed: int, factor: float) -> None:
    with pytest.raises(AssertionError, match="gradient 0: error"):
        compare_with(factor, 5, seed)


def test_an_lse_that_is_slightly_off_does_not() -> None:
    q = torch.randn(1, 5, 2, 16, generator=torch.Generator().manual_seed(0))

    def call(*qkv: Tensor) -> Any:
        out, lse, empty = fastattn.flash_attn_func(*qkv, return_attn_probs=True)
        return out, lse + 1e-3, empty

    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        compare(call, [q, q, q], attention, {})
