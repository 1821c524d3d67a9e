"""NormLinear: made from torch's layers, as accurate as these in a row, and back from its state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn.nn import NormLinear, fold_layer_norm, fold_rms_norm
from tests.harness.compare import assert_as_accurate
from tests.harness.generators import Gen

NORMS = {
    "RMSNorm": lambda k: nn.RMSNorm(k, eps=1e-5),
    "RMSNorm of ones": lambda k: nn.RMSNorm(k, elementwise_affine=False),
    "LayerNorm": lambda k: nn.LayerNorm(k),
    "LayerNorm without bias": lambda k: nn.LayerNorm(k, bias=False),
    "LayerNorm of ones": lambda k: nn.LayerNorm(k, elementwise_affine=False),
}
each_norm = pytest.mark.parametrize("name", NORMS)


class Twice(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def layers(gen: Gen, name: str, n: int, k: int, bias: bool, dtype: torch.dtype) -> tuple[nn.Module, nn.Linear]:
    """With weights whose rows do not add up to 0, which a mean shows in."""
    norm, linear = NORMS[name](k), nn.Linear(k, n, bias=bias)
    for tensor, mean in ((norm.weight, 1.0), (getattr(norm, "bias", None), 0.1), (linear.bias, 0.0)):
        if tensor is not None:
            tensor.data = gen.randn(*tensor.shape, scale=0.3) + mean
    linear.weight.data = (gen.randn(n, k) + 0.5) * k**-0.5
    return norm.to(gen.device, dtype), linear.to(gen.device, dtype)


@torch.no_grad()
def check(norm: nn.Module, linear: nn.Linear, x: Tensor, what: str) -> None:
    made = NormLinear.from_float(norm, linear)
    out, plain = made(x), linear(norm(x))
    wide = type(norm)(norm.normalized_shape, made.eps, norm.weight is not None).to(x.device, torch.float64)
    wide.load_state_dict({name: t.double() for name, t in norm.state_dict().items()}, strict=False)
    exact = nn.functional.linear(
        wide(x.double()), linear.weight.double(), None if linear.bias is None else linear.bias.double()
    )
    assert out.dtype is x.dtype and out.is_contiguous()
    assert_as_accurate(out, exact, plain, what)


@each_norm
@pytest.mark.parametrize("bias", [True, False])
def test_as_accurate_as_two_layers(name: str, bias: bool, device: str) -> None:
    """Rows of any mean, and the sizes of both Hopper kernels and of none."""
    gen = Gen(device, seed=5)
    dtypes = (torch.bfloat16, torch.float16) if device == "cuda" else (torch.bfloat16, torch.float16, torch.float32)
    for dtype in dtypes:
        for m, n, k in ((3, 48, 72), (300, 264, 520), (17, 65, 130), (0, 8, 8)):
            norm, linear = layers(gen, name, n, k, bias, dtype)
            means = (0.0, -2.0, 30.0) if name.startswith("LayerNorm") else (0.0,)
            for mean in means:
                x = (gen.randn(m, k) + mean).to(dtype)
                check(norm, linear, x, f"{name} {dtype} {m} × {k} → {n}, mean {mean}")


# M, N, K → block_m, block_n on an H100: both kernels, clusters of CTAs, norms of few rows found by both, all tiles of many
# rows that the choice takes.
TILES = {
    (9, 1024, 1032): (16, 64),
    (72, 576, 2056): (64, 64),
    (130, 960, 2056): (64, 64),
    (72, 576, 4104): (128, 64),
    (72, 576, 264): (64, 96),
    (500, 2048, 264): (64, 128),
    (72, 12288, 264): (64, 192),
    (72, 14336, 264): (64, 224),
    (72, 4096, 264): (128, 96),
    (72, 8192, 264): (128, 128),
    (300, 576, 4104): (128, 128),
    (130, 12288, 520): (128, 192),
    (130, 14336, 264): (128, 224),
    (500, 8192, 520): (128, 256),
    (300, 8192, 264): (192, 128),
    (300, 12288, 264): (192, 192),
    (300, 14336, 264): (192, 224),
}


@pytest.mark.parametrize("size", TILES)
def test_sizes_are_of_these_tiles(size: tuple[int, int, int]) -> None:
    m, n, k = size
    config = fastattn.explain("rms_norm_linear", (m, k), (n, k))
    assert (config.block_m, config.block_n) == TILES[size]


@pytest.mark.gpu
@pytest.mark.parametrize("size", TILES)
@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_every_tile(name: str, size: tuple[int, int, int]) -> None:
    gen, (m, n, k) = Gen("cuda", seed=6), size
    for dtype in (torch.bfloat16, torch.float16):
        norm, linear = layers(gen, name, n, k, True, dtype)
        x = (gen.randn(m, k) + (3.0 if name == "LayerNorm" else 0.0)).to(dtype)
        check(norm, linear, x, f"{name} {dtype} {m} × {k} → {n}")
        made = NormLinear.from_float(norm, linear)
        assert torch.equal(made(x), made(x)), "two runs differ"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_without_an_eps_it_is_the_one_that_torch_takes(dtype: torch.dtype, device: str) -> None:
    """Of rows whose squares are less than the eps of 16 bits and more than that of 32: the wrong one is off by a factor."""
    norm, linear = nn.RMSNorm(64).to(device, dtype), nn.Linear(64, 48).to(device, dtype)
    x = (Gen(device, seed=3).randn(5, 64) * 2**-7).to(dtype)
    torch.testing.assert_close(NormLinear.from_float(norm, linear)(x), linear(norm(x)), rtol=0.05, atol=0.05)


@each_norm
def test_state(name: str) -> None:
    norm, linear = layers(Gen(), name, 16, 24, True, torch.float32)
    made = NormLinear.from_float(norm, linear)
    again = NormLinear(24, 16, made.norm, bias=True, eps=made.eps)
    again.load_state_dict(made.state_dict())
    x = torch.randn(2, 5, 24)
    assert torch.equal(made(x), again(x))
    assert not any(p.requires_grad for p in made.parameters())
    assert repr(made).startswith(f"NormLinear(in_features=24, out_features=16, norm='{made.norm}', bias=True")


@torch.no_grad()
def test_in_another_dtype() -> None:
    """What corrects the mean fits the weight as it is rounded now."""
    norm, linear = layers(Gen(), "LayerNorm", 48, 72, True, torch.float32)
    made = NormLinear.from_float(norm, linear).to(torch.bfloat16)
    assert made.weight_sum is not None and made.weight_sum.dtype is torch.float32
    assert torch.equal(made.weight_sum, made.weight.double().sum(1).float())
    assert made(torch.randn(3, 72, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="norm is 'batch_norm', expected one of 'rms_norm', 'layer_norm'"):
        NormLinear(8, 8, "batch_norm")
    with pytest.raises(TypeError, match=r"norm is a Linear, expected torch\.nn\.RMSNorm or LayerNorm"):
        NormLinear.from_float(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(TypeError, match=r"linear is a Identity, expected torch\.nn\.Linear"):
        NormLinear.from_float(nn.RMSNorm(8), nn.Identity())
    with pytest.raises(
        TypeError, match=r"norm is a Twice with a forward of its own, expected that of torch\.nn\.RMSNorm"
    ):
        NormLinear.from_float(Twice(8), nn.Linear(8, 8))
    hooked = nn.LayerNorm(8)
    hooked.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match="norm has forward hooks, expected none"):
        NormLinear.from_float(hooked, nn.Linear(8, 8))
    weight = torch.ones(8, 16)
    with pytest.raises(ValueError, match=r"fold_rms_norm: norm_weight has shape \(1,\), expected \(16,\) as weight is"):
        fold_rms_norm(torch.ones(1), weight)
    with pytest.raises(
        ValueError, match=r"fold_layer_norm: bias has shape \(16,\), expected \(8,\) as weight is \(8, 16\)"
    ):
        fold_layer_norm(None, None, weight, torch.ones(16))
    with pytest.raises(ValueError, match=r"fold_rms_norm: weight has shape \(16,\), expected \(N, K\)"):
        fold_rms_norm(None, torch.ones(16))
    for norm in (nn.RMSNorm(9), nn.LayerNorm((4, 8))):
        with pytest.raises(ValueError, match=r"norm is over \((9,|4, 8)\), expected \(8,\), linear's in_features"):
            NormLinear.from_float(norm, nn.Linear(8, 8))
