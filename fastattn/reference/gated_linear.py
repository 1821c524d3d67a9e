"""A dense layer of gates and ups, and the gated activation behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.reference.activation import gated_activation
from fastattn.reference.linear import linear
from fastattn.reference.norm_linear import rms_norm_linear

_BLOCK = 8  # rows of gates that lie together, as many as a tile of the tensor cores' sums has columns


def gated_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, batch_invariant: bool = False
) -> Tensor:
    """x (…, K), weight (2N, K), bias (2N), both from `interleave_gate_up` → (…, N). fp32 inside."""
    wide = linear(x.float(), weight.float(), None if bias is None else bias.float(), batch_invariant)
    return gate_product(wide, activation).to(x.dtype)


def rms_norm_gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    eps: float,
    sums_of_squares: Tensor | None = None,
) -> Tensor:
    """The same of x / sqrt(mean(x²) + eps). sums_of_squares: as in `rms_norm_linear`."""
    return gate_product(rms_norm_linear(x.float(), weight, bias, eps, sums_of_squares), activation).to(x.dtype)


def gate_product(product: Tensor, activation: str) -> Tensor:
    """product (…, 2N), columns in turns → (…, N) in its dtype."""
    return gated_activation(torch.cat(_split(product, -1), -1), activation)


def interleave_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """The weight or bias that `gated_linear` takes for two dense layers with the same input.

    Rows are gate 0 to 7, up 0 to 7, gate 8 to 15, up 8 to 15, and so on; where N is no multiple of 8 the last block is shorter.

    gate, up: (N, …), of one shape, dtype and device. Returns a fresh (2N, …). Raises ValueError for what does not agree.
    """
    for name, attribute in (("shape", "shape"), ("dtype", "dtype"), ("device", "device")):
        found, expected = getattr(up, attribute), getattr(gate, attribute)
        if found != expected:
            raise ValueError(f"interleave_gate_up: up has {name} {found}, expected {expected}, gate's")
    if gate.dim() == 0:
        raise ValueError("interleave_gate_up: gate has 0 dimensions, expected (N, …)")
    starts = range(0, gate.shape[0], _BLOCK)
    return torch.cat([t[start : start + _BLOCK] for start in starts for t in (gate, up)] or [gate])


def split_gate_up(weight: Tensor) -> tuple[Tensor, Tensor]:
    """What `interleave_gate_up` was given: fresh gate and up, (N, …) each, of weight (2N, …)."""
    if weight.dim() == 0 or weight.shape[0] % 2 != 0:
        raise ValueError(
            f"split_gate_up: weight has shape {tuple(weight.shape)}, expected (2N, …), as many gates as ups"
        )
    return _split(weight, 0)


def _split(t: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    n = t.shape[dim] // 2
    idx = torch.arange(n, device=t.device)
    first = idx // _BLOCK * _BLOCK
    gate = idx + first
    up = gate + (n - first).clamp(max=_BLOCK)
    return t.index_select(dim, gate), t.index_select(dim, up)
