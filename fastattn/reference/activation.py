"""Gated activations, GLU variants (https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def gated_activation(x: Tensor, activation: str) -> Tensor:
    """act(gate) * up, where x (…, 2N) holds gate in its first half and up in its second."""
    gate, up = x.float().chunk(2, -1)
    if activation == "silu":
        out = F.silu(gate)
    else:
        out = F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
    return out.mul_(up).to(x.dtype).contiguous()
