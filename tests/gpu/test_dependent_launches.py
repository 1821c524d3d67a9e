"""Kernels that begin before those in front have ended give what they give one at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastattn import ops

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def layers(x: Tensor, weights: list[tuple[Tensor, Tensor, Tensor, Tensor]], after: Callable[[], None]) -> Tensor:
    """Short kernels and products for a few rows in turns; what one writes lies where the layer before wrote its own."""
    x, ones = x.clone(), torch.ones_like(x[0])
    residual = torch.zeros_like(x)
    for gate_up, down, codes, scale in weights:
        normed = ops.add_rms_norm(x, residual, ones, 1e-5)
        after()
        gated = ops.gated_linear(normed, gate_up)
        after()
        x = ops.linear(gated, down)
        after()
        q, x_scale = ops.quantize_int8(x)
        after()
        x = ops.int8_linear(q, x_scale, codes, scale, out_dtype=x.dtype)
        after()
    return x


@pytest.mark.parametrize("rows", [1, 8, 33, 64, 200])
@pytest.mark.parametrize(("hidden", "wide"), [(576, 1536), (4096, 4096)])
def test_a_chain_is_bitwise_what_its_kernels_are_one_at_a_time(hidden: int, wide: int, rows: int) -> None:
    torch.manual_seed(rows)
    half = {"device": CUDA, "dtype": torch.bfloat16}

    def weight(n: int, k: int) -> Tensor:
        return torch.randn(n, k, **half) * k**-0.5

    weights = [
        (weight(2 * wide, hidden), weight(hidden, wide), *ops.quantize_int8(weight(hidden, hidden))) for _ in range(8)
    ]
    x = torch.randn(rows, hidden, **half)
    expected = layers(x, weights, torch.cuda.synchronize)
    assert expected.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layers(x, weights, lambda: None)
    for _ in range(20):
        assert torch.equal(layers(x, weights, lambda: None), expected)
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)
