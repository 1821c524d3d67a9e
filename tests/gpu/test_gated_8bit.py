"""Gates inside the products in 8 bits on Hopper: every kind of tile, against fp64 and against the two kernels that they replace."""

from __future__ import annotations

import pytest
import torch

from fastattn import nn, ops
from tests.harness import formulas

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
# Few rows, many, tiles that are cut in each direction, and shares of K (4096 of a tile or two).
SIZES = [
    (1, 512, 64),
    (9, 528, 1040),
    (33, 4096, 256),
    (64, 1024, 6144),
    (129, 640, 272),
    (200, 4096, 768),
    (300, 512, 4112),
    (1030, 384, 2064),
]
SIZES += [(256, 14336, 1024), (2048, 1024, 7168)]


def drawn(kind: str, m: int, k: int, n: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """x and weight of unit rows, quantized, with a bias of gates and ups in turns."""
    g = torch.Generator(CUDA).manual_seed(m * 7 + k + n)
    quantize = ops.quantize_int8 if kind == "int8" else ops.quantize_fp8
    x = torch.randn(m, k, generator=g, device=CUDA).to(dtype)
    weight = (torch.randn(n, k, generator=g, device=CUDA) * k**-0.5 * 2).to(dtype)
    (q, x_scale), (codes, scale) = quantize(x), quantize(weight)
    bias = torch.randn(n, generator=g, device=CUDA).to(dtype)
    return {"x": q, "x_scale": x_scale, "weight": codes, "weight_scale": scale, "bias": bias}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["int8", "fp8", "fp8 fast"])
def test_gates_are_as_exact_as_two_kernels(kind: str, dtype: torch.dtype) -> None:
    layer, formula = (
        (ops.int8_linear, formulas.int8_linear) if kind == "int8" else (ops.fp8_linear, formulas.fp8_linear)
    )
    fast = {"fast_accum": True} if kind == "fp8 fast" else {}
    for m, k, n in SIZES:
        for activation in ("silu", "gelu_tanh"):
            call = drawn(kind, m, k, n, dtype)
            found = layer(**call, **fast, out_dtype=dtype, activation=activation)
            assert torch.equal(found, layer(**call, **fast, out_dtype=dtype, activation=activation))
            exact = formula(torch.float64, **call, activation=activation)[0]
            # What they replace: sums of the same products, rounded before the activation, and by it.
            gates, ups = nn.split_gate_up(layer(**call, **fast, out_dtype=dtype).t().contiguous())
            both = torch.cat([gates.t(), ups.t()], 1).contiguous()
            apart = ops.swiglu(both) if activation == "silu" else ops.geglu(both)
            error, allowed = ((t.double() - exact).abs().max() for t in (found, apart))
            assert float(error) <= 2 * float(allowed), (m, k, n, activation, float(error), float(allowed))


def test_zero_points_are_taken_off_before_the_gates() -> None:
    for m, k, n in SIZES:
        call = drawn("int8", m, k, n, torch.bfloat16)
        zero = torch.randint(-128, 128, (m,), device=CUDA, dtype=torch.int32)
        call |= {"x_zero_point": zero, "weight_sum": call["weight"].sum(1, dtype=torch.int32)}
        call["x_scale"] = call["x_scale"] / 8
        found = ops.int8_linear(**call, out_dtype=torch.bfloat16, activation="silu")
        exact = formulas.int8_linear(torch.float64, **call, activation="silu")[0]
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)


def test_a_row_of_int8_does_not_see_the_others() -> None:
    call = drawn("int8", 300, 1024, 2048, torch.bfloat16)
    of_all = ops.int8_linear(**call, out_dtype=torch.bfloat16, activation="silu")
    for rows in (slice(0, 1), slice(7, 24), slice(100, 170), slice(3, 250)):
        some = call | {"x": call["x"][rows], "x_scale": call["x_scale"][rows].clone()}
        assert torch.equal(ops.int8_linear(**some, out_dtype=torch.bfloat16, activation="silu"), of_all[rows])
