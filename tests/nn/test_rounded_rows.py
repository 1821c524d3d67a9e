"""What is rounded on its way into a layer of few bits, by the norm in front of it or by the activation: the result is the same."""

from __future__ import annotations

import pytest
import torch

from fastattn import nn, ops
from fastattn.nn.fp4 import Fp4Scheme
from fastattn.nn.gated_linear import GatedLinear
from fastattn.nn.quantized import EightBitRows, Fp8Scheme, Int8Scheme, Scheme

HIDDEN, INTERMEDIATE = 128, 96

# → what a norm rounds to for it
SCHEMES: dict[str, tuple[Scheme | None, torch.dtype | None]] = {
    "plain": (None, None),
    "int8": (Int8Scheme(), torch.int8),
    "int8 with zero points": (Int8Scheme(symmetric=False), None),
    "fp8": (Fp8Scheme(), torch.float8_e4m3fn),
    "nvfp4": (Fp4Scheme(16), None),
    "nvfp4, fp8 activations": (Fp4Scheme(16, fp8_activations=True), torch.float8_e4m3fn),
    "mxfp4, fp8 activations": (Fp4Scheme(32, fp8_activations=True), torch.float8_e4m3fn),
}


def fill(layer: torch.nn.Module) -> None:
    gen = torch.Generator().manual_seed(1)
    for name, p in layer.named_parameters():
        if p.is_floating_point():
            p.data = torch.rand(p.shape, generator=gen).to(p.dtype) / 8 + 0.1
        elif name.endswith("scale"):  # bits of e4m3 and e8m0 about 1
            p.data = torch.full_like(p, 56 if p.shape[-1] * 16 >= INTERMEDIATE else 127)
        else:
            low, high = (0, 120) if p.dtype is torch.uint8 else (-100, 100)
            p.data = torch.randint(low, high, p.shape, generator=gen).to(p.dtype)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_norm_rounds_for_the_layer_behind_it(name: str, packed: bool) -> None:
    scheme, rounds_to = SCHEMES[name]
    layer, norm = (
        nn.MergedLinear(HIDDEN, (("a", nn.Shard.whole(64)), ("b", nn.Shard.whole(32)))),
        nn.RMSNorm(HIDDEN, 1e-5),
    )
    layer.quantize([scheme, scheme])
    for module in (layer, norm):
        module.to_empty(device="cpu")
        fill(module)
    if packed:
        layer.pack()
    assert layer.rounds_to(1) is rounds_to
    x, residual = torch.randn(2, 5, HIDDEN)
    for added in (None, residual):
        left, right = (None if added is None else added.clone() for _ in range(2))
        rows, plain = norm.before(layer, x, left), norm(x, right)
        assert isinstance(rows, EightBitRows) == (rounds_to is not None)
        assert rows.shape == plain.shape and (added is None or torch.equal(left, right))
        assert torch.equal(layer(rows), layer(plain))


@pytest.mark.parametrize("name", SCHEMES)
def test_no_rows_are_no_rows(name: str) -> None:
    layer = nn.Linear(HIDDEN, 64)
    layer.quantize([SCHEMES[name][0]])
    layer.to_empty(device="cpu")
    fill(layer)
    norm = nn.RMSNorm(HIDDEN, 1e-5)
    fill(norm)
    x = torch.ones(0, HIDDEN)
    assert layer(x).shape == layer(norm.before(layer, x)).shape == (0, 64)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", [n for n in SCHEMES if n != "plain"])
def test_an_activation_is_rounded_as_it_is_made(name: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, _ = SCHEMES[name]
    mlp = nn.ParallelMLP(HIDDEN, INTERMEDIATE, "silu")
    mlp.gate_up_proj.quantize([scheme, scheme])
    mlp.down_proj.quantize([scheme])
    mlp.to_empty(device="cpu")
    fill(mlp)
    if packed:
        mlp.gate_up_proj.pack("gate_up_proj")
        mlp.down_proj.pack("down_proj")
    assert mlp.down_proj.quantized is not None
    assert mlp.down_proj.quantized.takes_activation == (name != "nvfp4")
    x = torch.randn(5, HIDDEN)
    expected = mlp.down_proj(ops.swiglu(mlp.gate_up_proj.product(x)))
    if name != "nvfp4":
        monkeypatch.setattr(GatedLinear, "forward", None)  # the activation's own kernel
    assert torch.equal(mlp(x), expected)


@pytest.mark.parametrize("name", [n for n in SCHEMES if n != "plain"])
def test_a_residual_is_not_dropped(name: str) -> None:
    scheme, _ = SCHEMES[name]
    layer = nn.Linear(HIDDEN, INTERMEDIATE)
    layer.quantize([scheme])
    layer.to_empty(device="cpu")
    fill(layer)
    with pytest.raises(AssertionError, match="residual"):
        layer(torch.randn(5, HIDDEN), torch.randn(5, INTERMEDIATE))
