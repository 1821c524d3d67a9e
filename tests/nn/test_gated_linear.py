"""The decoder's gates and ups: with rows in turns, as GPUs have them, the layers compute what they do without."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fastattn import nn
from fastattn.nn.gated_linear import GatedLinear


@pytest.mark.parametrize(("activation", "rows", "bias"), [("silu", 40, True), ("gelu_tanh", 20, False)])
def test_rows_in_turns(activation: str, rows: int, bias: bool) -> None:
    layer = GatedLinear(24, nn.Shard.whole(rows), activation, bias)
    generator = torch.Generator().manual_seed(rows)
    for weight in layer.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator))
    x = torch.randn(5, 24, generator=generator)
    before, stored, address = layer(x), layer.weight.clone(), layer.weight.data_ptr()
    layer.interleave()
    assert layer.weight.data_ptr() == address  # no second copy
    assert torch.equal(torch.cat(nn.split_gate_up(layer.weight)), stored) and not torch.equal(layer.weight, stored)
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_the_sum_over_ranks_is_the_mlp(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    shapes = {"gate_proj.weight": (40, 24), "up_proj.weight": (40, 24), "down_proj.weight": (24, 40)}
    full = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    x = torch.randn(5, 24, generator=generator)
    found = torch.zeros(5, 24)
    for rank in range(size):
        mlp = nn.ParallelMLP(24, 40, "silu", tp=nn.TensorParallel(rank, size))
        for name, out, shard, _ in mlp.weights(""):
            assert shard is not None
            out.copy_(full[name][shard.slices])
        mlp.gate_up_proj.interleave()
        found += mlp.down_proj(mlp.gate_up_proj(x))
    gate, up, down = full.values()
    expected = (functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_unknown_activations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"activation is 'relu', allowed are \['gelu_tanh', 'silu'\]"):
        GatedLinear(8, nn.Shard.whole(8), "relu")
