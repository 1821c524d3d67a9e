"""RMSNorm (https://arxiv.org/abs/1910.07467) and LayerNorm (https://arxiv.org/abs/1607.06450)."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension."""
    out = torch.nn.functional.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)
    return out.to(x.dtype).contiguous()


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual ← round(x + residual), then its RMSNorm: the norm reads what later layers will read."""
    residual.add_(x)
    return rms_norm(residual, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, with the biased variance."""
    bias = None if bias is None else bias.float()
    out = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], weight.float(), bias, eps)
    return out.to(x.dtype).contiguous()
