"""Gated activations, GLU variants (https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def gated_activation(x: Tensor, activation: str) -> Tensor:
    """act(gate) * up, where x (…, 2N) holds gate in its first half and up in its second."""
    gate, up = x.float().chunk(2, -1)
    # In torch's own SiLU and GeLU an element's last bits depend on where it lies: the end of each thread's part takes scalar
    # functions, all else vectors. Those of exp and tanh do not.
    if activation == "silu":
        out = gate / torch.exp(-gate).add_(1)
    elif activation == "gelu_tanh":
        inner = (gate * gate).mul_(0.044715).add_(1).mul_(gate).mul_(math.sqrt(2 / math.pi))
        out = torch.tanh(inner).add_(1).mul_(gate).mul_(0.5)
    else:
        out = F.gelu(gate)
    return out.mul_(up).to(x.dtype).contiguous()
