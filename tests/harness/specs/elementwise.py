"""Norms, gated activations and embedding: calls and OpSpecs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn import ops
from tests.harness import formulas
from tests.harness.generators import Gen
from tests.harness.opspec import Bad, Call, OpSpec, Role

SHAPES = ((3, 64), (1, 8), (0, 16), (127,), (2, 3, 577), (2, 0, 8), (65, 128), (5, 1), (4, 4096))


def norm_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for shape in SHAPES:
        width = shape[-1]
        yield f"{shape}", {"x": gen.randn(*shape, dtype=dtype), "weight": gen.randn(width, dtype=dtype), "eps": 1e-6}
    yield "tiny", {"x": gen.randn(3, 32, dtype=dtype, scale=1e-3), "weight": gen.randn(32, dtype=dtype), "eps": 1e-5}
    yield "no eps", {"x": gen.randn(3, 32, dtype=dtype), "weight": gen.randn(32, dtype=dtype), "eps": 0.0}


def add_norm_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for name, call in norm_calls(gen, dtype):
        yield name, call | {"residual": gen.randn(*call["x"].shape, dtype=dtype)}


def layer_norm_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for name, call in norm_calls(gen, dtype):
        if call["x"].shape[-1] > 1 and call["eps"] > 0:  # a single element has no variance: all is rounding
            yield name, call | {"bias": gen.randn(call["x"].shape[-1], dtype=dtype)}
            yield f"{name} no bias", call | {"bias": None}


def gated_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for *leading, width in SHAPES:
        yield f"{(*leading, width)}", {"x": gen.randn(*leading, 2 * width, dtype=dtype)}
    yield "large", {"x": gen.randn(3, 64, dtype=dtype, scale=30.0)}


def geglu_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for name, call in gated_calls(gen, dtype):
        for approximate in ("tanh", "none"):
            yield f"{name} {approximate}", call | {"approximate": approximate}


def bad_gated(gen: Gen, base: Call) -> Bad:
    x = base["x"]
    for width in (1, 3, 5, 7, 63):
        yield f"width {width}", {"x": x[:, :1].repeat(1, width)}, ValueError, ("x has shape", f"{width})", "2N", "even")
    yield "transposed", {"x": x.t().contiguous().t()}, ValueError, ("x has strides",)
    yield "sparse rows", {"x": x.to_sparse_csr()}, ValueError, ("x has layout", "sparse_csr")
    for dims in (4, 5, 6, 7):
        yield (
            f"{dims} dimensions",
            {"x": x.view(*([1] * (dims - 2)), *x.shape)},
            ValueError,
            (f"x has {dims} dimensions",),
        )
    for dtype in (torch.int16, torch.uint8, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2):
        yield f"{dtype}", {"x": x.to(dtype)}, TypeError, ("x is", str(dtype))
    yield "a shape", {"x": x.shape}, TypeError, ("x is a Size",)
    yield "a type", {"x": Tensor}, TypeError, ("x is a",)
    yield "bytes", {"x": b"x"}, TypeError, ("x is a bytes",)
    yield "a set", {"x": {1.0}}, TypeError, ("x is a set",)
    yield "three rows, grad", {"x": x[None].clone().requires_grad_()}, ValueError, ("x requires grad",)
    yield "meta, one row", {"x": x[0].to("meta")}, ValueError, ("x is on meta",)


def bad_geglu(gen: Gen, base: Call) -> Bad:
    yield from bad_gated(gen, base)
    for value in ("Tanh", "", "silu", None, 1):
        yield f"approximate {value}", {"approximate": value}, ValueError, ("approximate is", repr(value), "'none'")


def embedding_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for tokens, vocab, width in ((5, 11, 64), (0, 3, 8), (1, 1, 1), (129, 257, 576)):
        call = {"token_ids": gen.ints(0, vocab, tokens), "weight": gen.randn(vocab, width, dtype=dtype)}
        drawn = gen.ints(-1, vocab + 1, 3)
        unseen = {"token_ids": gen.ints(-3, vocab, tokens), "drawn": drawn}
        yield f"{tokens} {vocab} {width}", call | {"scale": 1.0, "drawn": drawn}
        yield f"{tokens} {vocab} {width} scaled", call | {"scale": math.sqrt(width) + 0.1}
        yield f"{tokens} {vocab} {width} drawn", call | unseen


def bad_embedding(gen: Gen, base: Call) -> Bad:
    if not base["weight"].is_cuda:
        for token in (-1, 11, 2**31 - 1, -(2**31)):
            ids = {"token_ids": gen.tensor([0, token]), "drawn": None}
            yield f"id {token}", ids, ValueError, (f"token_ids[1] is {token}", "≤ 10")
        few = {"token_ids": gen.tensor([0, -3]), "drawn": gen.tensor([1, 2])}
        yield "more than were drawn", few, ValueError, ("token_ids[1] is -3", "-2 ≤")


NORM_ROLES = {"x": Role((-1,)), "weight": Role((0,))}

ELEMENTWISE = (
    OpSpec("rms_norm", ops.rms_norm, norm_calls, NORM_ROLES, formulas.rms_norm, scalars={"eps": "nonnegative"}),
    OpSpec(
        "add_rms_norm",
        ops.add_rms_norm,
        add_norm_calls,
        NORM_ROLES | {"residual": Role((0, 1))},
        formulas.add_rms_norm,
        mutates=("residual",),
        scalars={"eps": "nonnegative"},
    ),
    OpSpec(
        "layer_norm",
        ops.layer_norm,
        layer_norm_calls,
        NORM_ROLES | {"bias": Role((0,), optional=True)},
        formulas.layer_norm,
        scalars={"eps": "nonnegative"},
    ),
    OpSpec("swiglu", ops.swiglu, gated_calls, {"x": Role()}, formulas.swiglu, bad=bad_gated),
    OpSpec("geglu", ops.geglu, geglu_calls, {"x": Role()}, formulas.geglu, bad=bad_geglu),
    OpSpec(
        "embedding",
        ops.embedding,
        embedding_calls,
        {"token_ids": Role(), "weight": Role(), "drawn": Role(optional=True)},
        formulas.embedding,
        scalars={"scale": "nonnegative"},
        bad=bad_embedding,
    ),
)
