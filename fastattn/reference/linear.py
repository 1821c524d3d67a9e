"""Dense layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weightᵀ + bias, accumulated in fp32."""
    # torch's own bf16 product accumulates in fp32 and rounds once; its fp16 product and its bias add in half
    # precision do not.
    if x.dtype is torch.float32 or (x.dtype is torch.bfloat16 and bias is None):
        return F.linear(x, weight, bias)
    out = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return out.to(x.dtype)
