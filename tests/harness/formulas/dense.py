"""Products in 16 bits, with what is fused before and behind them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.harness.formulas.elementwise import geglu, layer_norm, rms_norm, swiglu


def linear(
    c: torch.dtype,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    batch_invariant: bool = False,
) -> list[Tensor]:
    out = F.linear(x.to(c), weight.to(c), None if bias is None else bias.to(c))
    return [out if residual is None else out + residual.to(c)]


def _rms_normed(c: torch.dtype, x: Tensor, eps: float, sums_of_squares: Tensor | None) -> Tensor:
    if sums_of_squares is None:
        return rms_norm(c, x, torch.ones_like(x[..., :1]), eps)[0]
    return x.to(c) / (sums_of_squares.to(c).sum(-1, keepdim=True) / max(x.shape[-1], 1) + eps).sqrt()


def rms_norm_linear(
    c: torch.dtype,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    sums_of_squares: Tensor | None = None,
) -> list[Tensor]:
    return linear(c, _rms_normed(c, x, eps, sums_of_squares), weight, bias)


def layer_norm_linear(
    c: torch.dtype, x: Tensor, weight: Tensor, weight_sum: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> list[Tensor]:
    return linear(c, layer_norm(c, x, torch.ones_like(x[..., :1]), None, eps)[0], weight, bias)


def gated_linear(
    c: torch.dtype,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    batch_invariant: bool = False,
) -> list[Tensor]:
    return gated(c, linear(c, x, weight, bias)[0], activation)


def gated(c: torch.dtype, product: Tensor, activation: str) -> list[Tensor]:
    """Column by column of the product: blocks of eight gates and their ups, the last one shorter."""
    n = product.shape[-1] // 2
    gates, ups = [], []
    for first in range(0, n, 8):
        size = min(8, n - first)
        gates += range(2 * first, 2 * first + size)
        ups += range(2 * first + size, 2 * first + 2 * size)
    halves = torch.cat([product[..., gates], product[..., ups]], -1)
    if activation == "silu":
        return swiglu(c, halves)
    return geglu(c, halves, "tanh" if activation == "gelu_tanh" else "none")


def rms_norm_gated_linear(
    c: torch.dtype,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    eps: float = 1e-6,
    sums_of_squares: Tensor | None = None,
) -> list[Tensor]:
    return gated_linear(c, _rms_normed(c, x, eps, sums_of_squares), weight, bias, activation)
