"""GatedMLP and Linear: made from torch's layers, as accurate as these, with their names in the state; the rows' order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn.nn import interleave_gate_up, split_gate_up
from tests.harness.compare import assert_as_accurate
from tests.harness.generators import Gen

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "gelu": nn.GELU,
}


class PlainMLP(nn.Module):
    """As transformers has it."""

    def __init__(self, hidden: int, intermediate: int, activation: str = "silu", bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.up_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.down_proj = nn.Linear(intermediate, hidden, bias=bias)
        self.act_fn = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def plain_mlp(gen: Gen, hidden: int, intermediate: int, activation: str, bias: bool, dtype: torch.dtype) -> PlainMLP:
    mlp = PlainMLP(hidden, intermediate, activation, bias)
    for parameter in mlp.parameters():
        parameter.data = gen.randn(*parameter.shape) * parameter.shape[-1] ** -0.5
    return mlp.to(gen.device, dtype)


@torch.no_grad()
def check(mlp: PlainMLP, norm: nn.RMSNorm | None, x: Tensor, what: str) -> None:
    made = fastattn.GatedMLP.from_float(mlp, norm)
    plain = mlp(x if norm is None else norm(x))
    dtype = x.dtype
    wide_x = x.double() if norm is None else norm.double()(x.double())
    exact = mlp.double()(wide_x).clone()
    mlp.to(dtype)
    if norm is not None:
        norm.to(dtype)
    out = made(x)
    assert out.dtype is dtype and out.is_contiguous()
    assert_as_accurate(out, exact.cpu(), plain.cpu(), what)
    assert torch.equal(out, made(x)), f"{what}: two runs differ"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", [False, True])
def test_as_accurate_as_plain_layers(activation: str, norm: bool, device: str) -> None:
    gen = Gen(device, seed=5)
    for index, (m, hidden, intermediate) in enumerate(((3, 48, 72), (70, 136, 264), (17, 65, 37), (0, 8, 8))):
        for dtype in (torch.bfloat16, torch.float16, *(() if device == "cuda" else (torch.float32,))):
            mlp = plain_mlp(gen, hidden, intermediate, activation, index % 2 == 0, dtype)
            in_front = nn.RMSNorm(hidden, eps=1e-5, device=gen.device, dtype=dtype) if norm else None
            if in_front is not None:
                in_front.weight.data.add_(0.2 * gen.randn(hidden, dtype=dtype))
            check(mlp, in_front, gen.randn(m, hidden, dtype=dtype), f"{activation} {dtype} {m} × {hidden}")


# M, 2N, K → block_m, block_n on an H100: both kernels, clusters of one CTA and more, all tiles.
TILES = {
    (9, 1024, 1032): (16, 64),
    (1, 6144, 4104): (8, 64),
    (100, 1024, 1032): (128, 64),
    (130, 4096, 4104): (256, 128),
    (100, 4096, 264): (64, 192),
    (100, 8192, 264): (128, 128),
    (300, 6144, 1032): (128, 192),
    (300, 8192, 1032): (192, 128),
    (400, 8192, 264): (128, 256),
    (260, 12288, 264): (192, 192),
}


@pytest.mark.parametrize("size", TILES)
def test_sizes_are_of_these_tiles(size: tuple[int, int, int]) -> None:
    m, rows, k = size
    config = fastattn.explain("gated_linear", (m, k), (rows, k))
    assert (config.block_m, config.block_n) == TILES[size]


@pytest.mark.gpu
@pytest.mark.parametrize("size", TILES)
@pytest.mark.parametrize("norm", [False, True])
def test_every_tile(norm: bool, size: tuple[int, int, int]) -> None:
    gen, (m, rows, k) = Gen("cuda", seed=6), size
    for dtype in (torch.bfloat16, torch.float16):
        for activation in ("silu", "gelu_tanh"):
            mlp = plain_mlp(gen, k, rows // 2, activation, True, dtype)
            in_front = nn.RMSNorm(k, eps=1e-6, device="cuda", dtype=dtype) if norm else None
            check(mlp, in_front, gen.randn(m, k, dtype=dtype), f"{activation} {dtype} {size}")


def test_state_is_that_of_plain_layers() -> None:
    gen = Gen()
    mlp = plain_mlp(gen, 24, 20, "silu", True, torch.float32)
    made = fastattn.GatedMLP(24, 20, bias=True)
    holder = nn.ModuleDict({"mlp": made})  # below another name
    holder.load_state_dict({f"mlp.{name}": t for name, t in mlp.state_dict().items()})
    x = torch.randn(5, 24)
    torch.testing.assert_close(made(x), mlp(x).detach())
    state = made.state_dict()
    assert set(state) == set(mlp.state_dict())
    assert all(torch.equal(state[name], t) for name, t in mlp.state_dict().items())
    assert not any(p.requires_grad for p in made.parameters())
    assert repr(made).startswith("GatedMLP(\n  24, 20, activation='silu', bias=True, norm_eps=None")
    assert made.to(torch.bfloat16)(x.bfloat16()).dtype is torch.bfloat16


def test_what_a_state_lacks_is_named() -> None:
    state = PlainMLP(24, 16).state_dict()
    with pytest.raises(RuntimeError, match="up has shape"):
        fastattn.GatedMLP(24, 16).load_state_dict(state | {"up_proj.weight": torch.ones(15, 24)})
    del state["up_proj.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"gate_up_weight"'):
        fastattn.GatedMLP(24, 16).load_state_dict(state)


def test_transformers_mlp() -> None:
    modeling = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(hidden_size=32, intermediate_size=40, vocab_size=8, num_hidden_layers=1)
    mlp, x = modeling.Gemma3MLP(config), torch.randn(2, 3, 32)
    made = fastattn.GatedMLP.from_float(mlp)
    assert made.activation == "gelu_tanh"
    torch.testing.assert_close(made(x), mlp(x).detach())
    assert set(made.state_dict()) == set(mlp.state_dict())


def test_compiled() -> None:
    made = fastattn.GatedMLP.from_float(PlainMLP(32, 40), nn.RMSNorm(32, eps=1e-6))
    model = nn.Sequential(made, fastattn.Linear.from_float(nn.Linear(32, 8)))
    x = torch.randn(3, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_linear_is_torchs() -> None:
    for bias in (True, False):
        layer = nn.Linear(24, 16, bias=bias)
        made = fastattn.Linear.from_float(layer)
        x = torch.randn(2, 5, 24)
        torch.testing.assert_close(made(x), layer(x).detach())
        assert made.weight.data_ptr() == layer.weight.data_ptr() and not made.weight.requires_grad
        assert list(made.state_dict()) == list(layer.state_dict())
        made.load_state_dict(nn.Linear(24, 16, bias=bias).state_dict())


class Twice(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_linear_with_a_computed_weight(norm: Callable[[nn.Linear], nn.Linear]) -> None:
    layer, x = norm(nn.Linear(24, 16)).eval(), torch.randn(5, 24)
    torch.testing.assert_close(fastattn.Linear.from_float(layer)(x), layer(x).detach())


def test_linear_is_made_as_torchs_is() -> None:
    layer = fastattn.Linear(24, 16, bias=True, device="meta", dtype=torch.bfloat16)
    assert (layer.in_features, layer.out_features) == (24, 16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    assert repr(layer) == "Linear(in_features=24, out_features=16, bias=True)"


def with_hook(register: str) -> nn.Linear:
    layer = nn.Linear(8, 8)
    getattr(layer, register)(lambda *_: None)
    return layer


def with_own_forward() -> nn.Linear:
    """As accelerate does it, to move what comes in to the layer's device."""
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (Twice(8, 8), TypeError, r"is a Twice with a forward of its own, expected that of torch\.nn\.Linear"),
        (with_own_forward(), TypeError, "is a Linear with a forward of its own"),
        (with_hook("register_forward_hook"), ValueError, "has forward hooks, expected none"),
        (with_hook("register_forward_pre_hook"), ValueError, "has forward hooks, expected none"),
        (nn.utils.spectral_norm(nn.Linear(8, 8)), ValueError, "has forward hooks, expected none"),
        (nn.LazyLinear(8), ValueError, "has no weight yet, expected a layer that was called once"),
        (nn.Linear(8, 8).double(), TypeError, r"weight is torch\.float64, expected torch\.bfloat16 or torch\.float16"),
    ],
)
def test_a_layer_that_computes_something_else_is_refused(
    layer: nn.Linear, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^Linear: linear.* ?{message}"):
        fastattn.Linear.from_float(layer)
    with pytest.raises(error, match=f"^NormLinear: linear.* ?{message}"):
        fastattn.NormLinear.from_float(nn.RMSNorm(8), layer)
    mlp = PlainMLP(8, 8)
    mlp.down_proj = layer
    with pytest.raises(error, match=rf"^GatedMLP: mlp\.down_proj.* ?{message}"):
        fastattn.GatedMLP.from_float(mlp)


@pytest.mark.parametrize("x", [None, [1.0], 1])
def test_what_is_no_tensor_is_named(x: object) -> None:
    with pytest.raises(TypeError, match=f"linear: x is a {type(x).__name__}, expected a torch.Tensor"):
        fastattn.Linear.from_float(nn.Linear(8, 8))(x)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [0, 1, 7, 8, 12, 40])
def test_order_of_rows(n: int) -> None:
    gate, up = torch.arange(n), torch.arange(100, 100 + n)
    rows = interleave_gate_up(gate, up)
    expected = [row for first in range(0, n, 8) for part in (gate, up) for row in part[first : first + 8].tolist()]
    assert rows.tolist() == expected
    assert all(torch.equal(a, b) for a, b in zip(split_gate_up(rows), (gate, up), strict=True))


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="GatedMLP: activation is 'relu', expected one of 'silu', 'gelu_tanh', 'gelu'"):
        fastattn.GatedMLP(8, 8, "relu")
    mlp = PlainMLP(8, 16)
    with pytest.raises(TypeError, match=r"norm is a LayerNorm, expected torch\.nn\.RMSNorm"):
        fastattn.GatedMLP.from_float(mlp, nn.LayerNorm(8))
    with pytest.raises(ValueError, match=r"norm is over \(9,\), expected \(8,\), gate_proj's in_features"):
        fastattn.GatedMLP.from_float(mlp, nn.RMSNorm(9))
    mlp.act_fn = nn.ReLU()
    with pytest.raises(TypeError, match=r"mlp\.act_fn is a ReLU, expected torch\.nn\.SiLU or GELU"):
        fastattn.GatedMLP.from_float(mlp)
    mlp.down_proj = nn.Linear(16, 9)
    with pytest.raises(ValueError, match="down_proj is 16 → 9, expected 16 → 8"):
        fastattn.GatedMLP.from_float(mlp)
    mlp.down_proj = nn.Linear(16, 8)
    with pytest.raises(ValueError, match="some of gate_proj, up_proj and down_proj have a bias, expected all or none"):
        fastattn.GatedMLP.from_float(mlp)
    mlp.down_proj = nn.Linear(16, 8).half()
    with pytest.raises(TypeError, match=r"down_proj is torch\.float16, expected torch\.float32 as gate_proj"):
        fastattn.GatedMLP.from_float(mlp)
    mlp.down_proj = nn.Identity()
    with pytest.raises(TypeError, match=r"mlp\.down_proj is a Identity, expected torch\.nn\.Linear"):
        fastattn.GatedMLP.from_float(mlp)
    with pytest.raises(TypeError, match=r"Linear: linear is a Identity, expected torch\.nn\.Linear"):
        fastattn.Linear.from_float(nn.Identity())
    with pytest.raises(ValueError, match=r"interleave_gate_up: up has dtype torch\.float16, expected torch\.float32"):
        interleave_gate_up(torch.ones(8), torch.ones(8).half())
    with pytest.raises(ValueError, match=r"split_gate_up: weight has shape \(9, 2\), expected \(2N, …\)"):
        split_gate_up(torch.ones(9, 2))
