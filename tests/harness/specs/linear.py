"""Products in 16 bits, with what is fused before and behind them: calls and OpSpecs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn import ops
from tests.harness import formulas
from tests.harness.generators import Gen
from tests.harness.opspec import Bad, Call, OpSpec, Role


def linear_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for leading, k, n in (
        ((3,), 64, 48),
        ((), 64, 8),
        ((0,), 16, 16),
        ((2, 5), 129, 65),
        ((64,), 256, 127),
        ((9,), 520, 136),
        ((70,), 1032, 72),
        ((300,), 264, 520),
        ((3,), 0, 5),
    ):
        call = {"x": gen.randn(*leading, k, dtype=dtype), "weight": gen.randn(n, k, dtype=dtype)}
        yield f"{leading} {k} {n}", call | {"bias": gen.randn(n, dtype=dtype)}
        yield f"{leading} {k} {n} no bias", call | {"bias": None}


def linear_add_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for leading, k, n in (((3,), 64, 48), ((2, 5), 129, 65), ((), 64, 8), ((70,), 1032, 72), ((260,), 72, 136)):
        call = {"x": gen.randn(*leading, k, dtype=dtype), "weight": gen.randn(n, k, dtype=dtype)}
        call |= {"bias": gen.randn(n, dtype=dtype) if k < 100 else None}
        yield f"{leading} {k} {n} residual", call | {"residual": gen.randn(*leading, n, dtype=dtype, scale=k**0.5)}
    for name, call in linear_calls(gen, dtype):
        yield name, call | {"residual": None, "batch_invariant": call["bias"] is None}


def sums_of_squares(x: Tensor) -> Tensor:
    """Of 32 columns each, as the product that wrote x would give them."""
    parts = [part.float().square().sum(-1) for part in x.split(32, -1)] if x.shape[-1] else []
    return torch.stack(parts, -1) if parts else x.new_empty((*x.shape[:-1], 0), dtype=torch.float32)


def rms_norm_linear_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for name, call in linear_calls(gen, dtype):
        given = None if call["bias"] is None else sums_of_squares(call["x"])
        yield name, call | {"eps": 1e-6, "sums_of_squares": given}
    for rows, k, n in ((3, 64, 48), (130, 136, 264)):
        call = {"weight": gen.randn(n, k, dtype=dtype), "bias": None}
        yield f"tiny {rows}", call | {"x": gen.randn(rows, k, dtype=dtype, scale=1e-3), "eps": 1e-5}
        yield f"large {rows}", call | {"x": gen.randn(rows, k, dtype=dtype, scale=50.0), "eps": 0.0}


def layer_norm_linear_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    def with_sum(call: Call) -> Call:
        others = {name: value for name, value in call.items() if name != "sums_of_squares"}
        return others | {"weight_sum": call["weight"].double().sum(1).float(), "eps": 1e-5}

    for name, call in rms_norm_linear_calls(gen, dtype):
        yield name, with_sum(call)
    for rows, k, n in ((5, 520, 72), (130, 136, 264)):
        call = {"weight": gen.randn(n, k, dtype=dtype), "bias": None}
        mean = 10.0 * gen.randn(rows, 1)
        yield f"{rows} rows off 0", with_sum(call | {"x": (gen.randn(rows, k) + mean).to(dtype)})


def gated_linear_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    """N of whole blocks and not; gates open, shut and between."""
    sizes = (
        ((3,), 64, 24),
        ((), 64, 8),
        ((0,), 16, 8),
        ((2, 5), 129, 33),
        ((64,), 256, 63),
        ((9,), 520, 136),
        ((70,), 136, 264),
        ((3,), 0, 5),
        ((2,), 8, 0),
    )
    for index, (leading, k, n) in enumerate(sizes):
        call = {
            "x": gen.randn(*leading, k, dtype=dtype),
            "weight": gen.randn(2 * n, k, dtype=dtype, scale=max(k, 1) ** -0.5 * (4.0 if index % 3 == 2 else 1.0)),
            "activation": ("silu", "gelu_tanh", "gelu")[index % 3],
        }
        yield f"{leading} {k} {n}", call | {"bias": gen.randn(2 * n, dtype=dtype)}
        yield f"{leading} {k} {n} no bias", call | {"bias": None, "activation": ("gelu_tanh", "silu")[index % 2]}


def rms_norm_gated_linear_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for name, call in gated_linear_calls(gen, dtype):
        given = None if call["bias"] is None else sums_of_squares(call["x"])
        yield name, call | {"eps": 1e-6, "sums_of_squares": given}


def bad_linear(gen: Gen, base: Call) -> Bad:
    if base["residual"] is not None:
        yield "batch-invariant", {"batch_invariant": True}, ValueError, ("batch_invariant is True with a residual",)


def bad_gated_linear(gen: Gen, base: Call) -> Bad:
    for value in ("SiLU", "", "relu", "tanh", None, 1):
        yield f"activation {value}", {"activation": value}, ValueError, ("activation is", repr(value), "'gelu_tanh'")
    odd = base["weight"][:-1].clone()
    yield "a gate without its up", {"weight": odd, "bias": None}, ValueError, ("weight has shape", "2N", "even")


LINEAR = (
    OpSpec(
        "linear",
        ops.linear,
        linear_add_calls,
        {
            "x": Role((-1,)),
            "weight": Role((0, 1)),
            "bias": Role((0,), optional=True),
            "residual": Role((0, 1), optional=True),
        },
        formulas.linear,
        scalars={"batch_invariant": "flag"},
        bad=bad_linear,
    ),
    OpSpec(
        "rms_norm_linear",
        ops.rms_norm_linear,
        rms_norm_linear_calls,
        {
            "x": Role((-1,)),
            "weight": Role((0, 1)),
            "bias": Role((0,), optional=True),
            "sums_of_squares": Role((0, 1), optional=True, layout=False),
        },
        formulas.rms_norm_linear,
        scalars={"eps": "nonnegative"},
    ),
    OpSpec(
        "gated_linear",
        ops.gated_linear,
        gated_linear_calls,
        {"x": Role((-1,)), "weight": Role((1,)), "bias": Role((0,), optional=True)},
        formulas.gated_linear,
        scalars={"batch_invariant": "flag"},
        bad=bad_gated_linear,
    ),
    OpSpec(
        "rms_norm_gated_linear",
        ops.rms_norm_gated_linear,
        rms_norm_gated_linear_calls,
        {
            "x": Role((-1,)),
            "weight": Role((1,)),
            "bias": Role((0,), optional=True),
            "sums_of_squares": Role((0, 1), optional=True, layout=False),
        },
        formulas.rms_norm_gated_linear,
        scalars={"eps": "nonnegative"},
        bad=bad_gated_linear,
    ),
    OpSpec(
        "layer_norm_linear",
        ops.layer_norm_linear,
        layer_norm_linear_calls,
        {"x": Role((-1,)), "weight": Role((0, 1)), "weight_sum": Role((0,)), "bias": Role((0,), optional=True)},
        formulas.layer_norm_linear,
        scalars={"eps": "nonnegative"},
    ),
)
