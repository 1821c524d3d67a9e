"""The table of operators; the tests, the sanitizer runs and the GPU checks are made from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastattn import ops
from tests.harness import formulas
from tests.harness.attention_calls import (
    bad_batch,
    bad_batch_backward,
    bad_merge,
    bad_out_scale,
    bad_paged,
    bad_scales,
    bad_varlen,
    bad_varlen_backward,
    batch_backward_calls,
    batch_calls,
    merge_calls,
    paged_8bit_calls,
    paged_calls,
    paged_e4m3_calls,
    varlen_backward_calls,
    varlen_calls,
    verify_e4m3,
)
from tests.harness.block_calls import (
    COPIED,
    SWAPPED,
    bad_copies,
    bad_swaps,
    copy_blocks,
    copy_calls,
    swap_blocks,
    swap_calls,
    verify_copies,
)
from tests.harness.compare import assert_within, bits
from tests.harness.generators import Gen
from tests.harness.lm_head_calls import bad_lm_head, lm_head_calls, verify_lm_head
from tests.harness.opspec import Call, OpSpec, Role
from tests.harness.quantized_calls import (
    bad_fp4,
    bad_fp4_fp8,
    bad_fp8,
    bad_fp8_blocks,
    bad_int4,
    bad_int8,
    bad_quantize,
    fp4_calls,
    fp4_fp8_calls,
    fp8_block_calls,
    fp8_calls,
    int4_calls,
    int8_calls,
    quantize_calls,
    quantize_group_calls,
    rms_norm_quantize_calls,
    verify_quantize_fp8,
    verify_quantize_fp8_groups,
    verify_quantize_int8,
    verify_quantize_int8_asymmetric,
    verify_rms_norm_quantize_fp8,
    verify_rms_norm_quantize_int8,
)
from tests.harness.sampling_calls import (
    adjust_calls,
    bad_adjust,
    bad_bitmask,
    bad_sample,
    bad_speculative,
    bitmask_calls,
    logprob_calls,
    sample_calls,
    speculative_calls,
    verify_sample,
    verify_speculative,
)
from tests.harness.sparse_calls import (
    bad_sparse,
    bad_sparse_fp8,
    bad_sparse_int8,
    sparse_calls,
    sparse_fp8_calls,
    sparse_int8_calls,
)

Bad = Iterator[tuple[str, Call, type[Exception], tuple[str, ...]]]
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
    """Of 64 columns each, as the product that wrote x would give them."""
    parts = [part.float().square().sum(-1) for part in x.split(64, -1)] if x.shape[-1] else []
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


def rope_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    cases = (  # tokens, heads, kv heads, head dim, rotary dim, block size, norm, interleaved
        (7, 4, 2, 16, 16, 4, False, False),
        (1, 9, 3, 64, 64, 16, False, False),
        (0, 4, 2, 16, 16, 4, False, False),
        (5, 4, 4, 24, 16, 3, True, False),
        (13, 6, 1, 32, 32, 1, True, True),
        (6, 2, 2, 8, 4, 5, False, True),
        (130, 2, 1, 128, 128, 16, True, False),
        (3, 2, 2, 256, 64, 16, False, True),
        (9, 4, 2, 80, 80, 4, False, False),
        (4, 3, 1, 96, 48, 2, True, False),
    )
    for tokens, heads, kv_heads, dim, rotary, size, norm, interleaved in cases:
        num_blocks = tokens // size + 3
        slots = gen.permutation(num_blocks * size)[:tokens]
        slots = [-1 if i % 5 == 2 else s for i, s in enumerate(slots)]
        angle = torch.rand(97, rotary // 2, generator=gen.rng) * 6
        call: Call = {
            "q": gen.randn(tokens, heads, dim, dtype=dtype),
            "k": gen.randn(tokens, kv_heads, dim, dtype=dtype),
            "v": gen.randn(tokens, kv_heads, dim, dtype=dtype),
            "cos_sin": torch.cat([angle.cos(), angle.sin()], 1).to(gen.device),
            "positions": gen.ints(0, 97, tokens),
            "slot_mapping": gen.tensor(slots),
            # what no slot owns is NaN, and must still be so afterwards
            "k_cache": torch.full((num_blocks, size, kv_heads, dim), math.nan, dtype=dtype, device=gen.device),
            "v_cache": torch.full((num_blocks, size, kv_heads, dim), math.nan, dtype=dtype, device=gen.device),
            "interleaved": interleaved,
            "norm_eps": 1e-6,
        }
        if norm:
            call |= {"q_norm_weight": gen.randn(dim, dtype=dtype), "k_norm_weight": gen.randn(dim, dtype=dtype)}
        yield f"{(tokens, heads, kv_heads, dim, rotary, size, norm, interleaved)}", call


def rope_8bit_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    """Into caches of 8 bits, of both kinds and with both kinds of scales in turn; NaN (-128) where no slot is written."""
    kinds = ((torch.int8, True), (torch.float8_e4m3fn, False), (torch.int8, False), (torch.float8_e4m3fn, True))
    index = 0
    for name, call in rope_calls(gen, dtype):
        if call["q"].shape[2] % 16 != 0:
            continue
        kind, of_tokens = kinds[index % 4]
        for cache in ("k_cache", "v_cache"):
            call[cache] = (
                call[cache].to(kind) if kind.is_floating_point else torch.full_like(call[cache], -128, dtype=kind)
            )
        shape = call["k_cache"].shape[:3] if of_tokens else call["k_cache"].shape[2:3]
        for scale in ("k_scale", "v_scale"):
            call[scale] = (
                torch.full(shape, math.nan, device=gen.device) if of_tokens else 0.01 + 0.02 * gen.rand(*shape)
            )
        call["k"][:1] = 0  # a token of zeros
        call["hadamard"] = index % 3 != 1
        index += 1
        yield f"{name} into {kind}", call


def best_choices(rows: Tensor, plain: Tensor, scale: Tensor, of_slots: Tensor) -> Tensor:
    """By what the scales of fp8 rows (n, D) are greater than the plain ones (n): one of 2^(i / 8), whose squared error is the
    smallest, but for what rounding makes of two that are nearly as good. Ones where no slot is."""
    choices = 2 ** (torch.arange(8, dtype=torch.float64, device=rows.device) / 8)
    ratio = scale[of_slots].double() / plain
    taken = (ratio[:, None] - choices).abs().argmin(-1)
    steps = (plain[:, None] * choices)[..., None]  # (n, 8, 1)
    rounded = (rows[:, None] / steps).float().to(torch.float8_e4m3fn).double() * steps
    errors = (rounded - rows[:, None]).square().sum(-1)
    smallest = errors.amin(-1)
    worse = errors.gather(1, taken[:, None]).squeeze(1) > 1.02 * smallest
    assert not bool(worse.any()), "a scale whose error is not the smallest"
    return torch.ones_like(scale, dtype=torch.float64).masked_scatter_(of_slots, choices[taken])


def verify_rope_8bit(call: Call, results: list[Tensor]) -> None:
    """q as ever; each number within about half a step of what a cache in fp64 would hold, and what no slot owns as it was."""
    wide = {name: torch.full(call[name].shape, math.nan, dtype=torch.float64) for name in ("k_cache", "v_cache")}
    arguments = {name: value for name, value in call.items() if name not in ("k_scale", "v_scale")} | wide
    exact_q, *exact = formulas.rope_kv_write(torch.float64, **arguments)
    assert_within(results[0], exact_q, 1e-5 if results[0].dtype is torch.float32 else 0.1, "q")
    for cache, scale, right, name in zip(results[1:3], results[3:5], exact, "kv", strict=True):
        written = ~right.isnan()
        assert torch.equal(bits(cache[~written]), bits(call[f"{name}_cache"][~written])), f"{name}_cache"
        largest = 127 if cache.dtype is torch.int8 else 448
        if scale.dim() == 3:
            of_slots = written[..., 0]
            expected = right.nan_to_num(0.0).abs().amax(-1) / largest
            expected = torch.where(expected == 0, 1.0, expected)
            if cache.dtype is torch.float8_e4m3fn:
                expected *= best_choices(right[of_slots], expected[of_slots], scale, of_slots)
            assert_within(scale[of_slots], expected[of_slots], 1e-6, f"{name}_scale")
            assert torch.equal(bits(scale[~of_slots]), bits(call[f"{name}_scale"][~of_slots])), f"{name}_scale"
        each = scale.double().unsqueeze(-1)
        clamped = right.clamp(-largest * each, largest * each)
        step = each if cache.dtype is torch.int8 else (clamped.abs() / 8).maximum(each / 512)
        wrong = written & ((cache.double() * each - clamped).abs() > 0.55 * step)
        assert not bool(wrong.any()), f"{name}_cache"


def bad_rope(gen: Gen, base: Call) -> Bad:
    yield "hadamard in 16 bits", {"hadamard": True}, ValueError, ("hadamard is True", "expected it in 8 bits")
    for width in (15, 18, 32):
        yield f"rotary_dim {width}", {"cos_sin": gen.randn(97, width)}, ValueError, ("cos_sin has shape", "even", "16")
    weight = gen.randn(16).to(base["q"].dtype)
    for name in ("q_norm_weight", "k_norm_weight"):
        yield f"{name} short", {name: weight[:8]}, ValueError, (f"{name} has shape (8,)", "D = 16 from q")
        yield f"{name} fp64", {name: weight.double()}, TypeError, (name, "float64")
        yield f"{name} is a list", {name: [1.0]}, TypeError, (name, "list", "or None")
    if base["q"].is_cuda:
        return
    for name, value, allowed in (
        ("positions", -1, "≤ 96"),
        ("positions", 97, "≤ 96"),
        ("slot_mapping", -2, "≤ 15"),
        ("slot_mapping", 16, "≤ 15"),
        ("slot_mapping", 2**31 - 1, "≤ 15"),
    ):
        wrong = base[name].clone()
        wrong[3] = value
        yield f"{name} {value}", {name: wrong}, ValueError, (f"{name}[3] is {value}", allowed)


_NORM_ROLES = {"x": Role((-1,)), "weight": Role((0,))}
_SCALE: dict[str, Any] = {"softmax_scale": "nonnegative", "softcap": "nonnegative", "causal": "flag"}
_B = Role((0,))
_LONGEST = {"max_seqlen_q": "count", "max_seqlen_k": "count"}
_BATCH_ROLES = {
    "q": Role((0, 3), grad=True),
    "k": Role((0, 1, 2, 3), grad=True),
    "v": Role((0, 1, 2, 3), grad=True),
    "alibi_slopes": Role((0, 1), optional=True),
}
_PACKED_ROLES = {
    "q": Role((2,), grad=True),
    "k": Role((0, 1, 2), grad=True),
    "v": Role((0, 1, 2), grad=True),
    "alibi_slopes": Role((0, 1), optional=True),
}
_SEQUENCE_ROLES = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), _B) | dict.fromkeys(
    ("seqused_q", "seqused_k"), Role((0,), optional=True)
)


def _without_grad(roles: dict[str, Role]) -> dict[str, Role]:
    return {name: replace(role, grad=False) for name, role in roles.items()}


_METADATA = Role((0, 1, 2))

SPECS = (
    OpSpec("rms_norm", ops.rms_norm, norm_calls, _NORM_ROLES, formulas.rms_norm, scalars={"eps": "nonnegative"}),
    OpSpec(
        "add_rms_norm",
        ops.add_rms_norm,
        add_norm_calls,
        _NORM_ROLES | {"residual": Role((0, 1))},
        formulas.add_rms_norm,
        mutates=("residual",),
        scalars={"eps": "nonnegative"},
    ),
    OpSpec(
        "layer_norm",
        ops.layer_norm,
        layer_norm_calls,
        _NORM_ROLES | {"bias": Role((0,), optional=True)},
        formulas.layer_norm,
        scalars={"eps": "nonnegative"},
    ),
    OpSpec("swiglu", ops.swiglu, gated_calls, {"x": Role()}, formulas.swiglu, bad=bad_gated),
    OpSpec("geglu", ops.geglu, geglu_calls, {"x": Role()}, formulas.geglu, bad=bad_geglu),
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
    OpSpec(
        "quantize_int8",
        ops.quantize_int8,
        quantize_calls,
        {"x": Role()},
        verify=verify_quantize_int8,
        bad=bad_quantize,
        keeps_dtype=False,
    ),
    OpSpec(
        "quantize_int8_asymmetric",
        ops.quantize_int8_asymmetric,
        quantize_calls,
        {"x": Role()},
        verify=verify_quantize_int8_asymmetric,
        bad=bad_quantize,
        keeps_dtype=False,
    ),
    OpSpec(
        "quantize_fp8",
        ops.quantize_fp8,
        quantize_calls,
        {"x": Role()},
        verify=verify_quantize_fp8,
        bad=bad_quantize,
        keeps_dtype=False,
    ),
    *(
        OpSpec(
            op.__name__,
            op,
            rms_norm_quantize_calls,
            _NORM_ROLES | {"residual": Role((0, 1), optional=True)},
            verify=verify,
            mutates=("residual",),
            scalars={"eps": "nonnegative"},
            keeps_dtype=False,
        )
        for op, verify in (
            (ops.rms_norm_quantize_int8, verify_rms_norm_quantize_int8),
            (ops.rms_norm_quantize_fp8, verify_rms_norm_quantize_fp8),
        )
    ),
    OpSpec(
        "int8_linear",
        ops.int8_linear,
        int8_calls,
        {
            "x": Role((0, 1)),
            "x_scale": Role((0,)),
            "weight": Role((0, 1)),
            "weight_scale": Role((0,)),
            "bias": Role((0,), optional=True),
            "x_zero_point": Role((0,), optional=True),
            "weight_sum": Role((0,), optional=True),
        },
        formulas.int8_linear,
        bad=bad_int8,
    ),
    OpSpec(
        "fp8_linear",
        ops.fp8_linear,
        fp8_calls,
        {
            "x": Role((1,)),
            "x_scale": Role((0,)),
            "weight": Role((1,)),
            "weight_scale": Role((0,)),
            "bias": Role((0,), optional=True),
        },
        formulas.fp8_linear,
        scalars={"fast_accum": "flag", "batch_invariant": "flag"},
        bad=bad_fp8,
    ),
    OpSpec(
        "quantize_fp8_groups",
        ops.quantize_fp8_groups,
        quantize_group_calls,
        rms_norm_quantize_calls,
        {"x": Role()},
        verify=verify_quantize_fp8_groups,
        bad=bad_quantize,
        keeps_dtype=False,
    ),
    OpSpec(
        "fp8_block_linear",
        ops.fp8_block_linear,
        fp8_block_calls,
        {
            "x": Role((1,)),
            "x_scale": Role((0, 1)),
            "weight": Role((1,)),
            "weight_scale": Role(layout=False),
            "bias": Role((0,), optional=True),
        },
        formulas.fp8_block_linear,
        bad=bad_fp8_blocks,
    ),
    OpSpec(
        "sparse_linear",
        ops.sparse_linear,
        sparse_calls,
        {"x": Role(), "values": Role((0, 1)), "metadata": _METADATA, "bias": Role((0,), optional=True)},
        formulas.sparse_linear,
        bad=bad_sparse,
    ),
    OpSpec(
        "sparse_int8_linear",
        ops.sparse_int8_linear,
        sparse_int8_calls,
        {
            "x": Role((1,)),
            "x_scale": Role((0,)),
            "values": Role((1,)),
            "metadata": _METADATA,
            "weight_scale": Role((0,)),
            "bias": Role((0,), optional=True),
        },
        formulas.sparse_int8_linear,
        bad=bad_sparse_int8,
    ),
    OpSpec(
        "sparse_fp8_linear",
        ops.sparse_fp8_linear,
        sparse_fp8_calls,
        {
            "x": Role((1,)),
            "x_scale": Role((0,)),
            "values": Role((1,)),
            "metadata": _METADATA,
            "weight_scale": Role((0,)),
            "bias": Role((0,), optional=True),
        },
        formulas.sparse_fp8_linear,
        scalars={"fast_accum": "flag"},
        bad=bad_sparse_fp8,
    ),
    OpSpec(
        "int4_linear",
        ops.int4_linear,
        int4_calls,
        {
            "x": Role(),
            "weight_packed": Role((0, 1)),
            "weight_scale": Role((0, 1)),
            "zero_point": Role((0, 1), optional=True),
            "bias": Role((0,), optional=True),
        },
        formulas.int4_linear,
        scalars={"group_size": "size"},
        bad=bad_int4,
    ),
    OpSpec(
        "fp4_linear",
        ops.fp4_linear,
        fp4_calls,
        {
            "x": Role(),
            "weight_packed": Role((0, 1)),
            "weight_scale": Role((0, 1)),
            "global_scale": Role((0,), optional=True),
            "bias": Role((0,), optional=True),
        },
        formulas.fp4_linear,
        scalars={"group_size": "size"},
        bad=bad_fp4,
    ),
    OpSpec(
        "fp4_fp8_linear",
        ops.fp4_fp8_linear,
        fp4_fp8_calls,
        {
            "x": Role(),
            "x_scale": Role((0,)),
            "weight_packed": Role((0, 1)),
            "weight_scale": Role((0, 1)),
            "global_scale": Role((0,), optional=True),
            "bias": Role((0,), optional=True),
        },
        formulas.fp4_fp8_linear,
        scalars={"group_size": "size", "fast_accum": "flag"},
        bad=bad_fp4_fp8,
    ),
    OpSpec(
        "embedding",
        ops.embedding,
        embedding_calls,
        {"token_ids": Role(), "weight": Role(), "drawn": Role(optional=True)},
        formulas.embedding,
        scalars={"scale": "nonnegative"},
        bad=bad_embedding,
    ),
    OpSpec(
        "rope_kv_write",
        ops.rope_kv_write,
        rope_calls,
        {
            "q": Role((0, 2)),
            "k": Role((0, 1, 2)),
            "v": Role((0, 1, 2)),
            "cos_sin": Role(),
            "positions": _B,
            "slot_mapping": _B,
            "k_cache": Role((0, 1, 2, 3)),
            "v_cache": Role((0, 1, 2, 3)),
        },
        formulas.rope_kv_write,
        mutates=("q", "k_cache", "v_cache"),
        scalars={"norm_eps": "nonnegative", "interleaved": "flag"},
        bad=bad_rope,
    ),
    OpSpec(
        "rope_kv_write",
        ops.rope_kv_write,
        rope_8bit_calls,
        {
            "k_cache": Role((0, 1, 2, 3)),
            "v_cache": Role((0, 1, 2, 3)),
            "k_scale": Role((0, 1, 2), optional=True, layout=False),
            "v_scale": Role((0, 1, 2), optional=True, layout=False),
        },
        verify=verify_rope_8bit,
        mutates=("q", "k_cache", "v_cache", "k_scale", "v_scale"),
        scalars={"norm_eps": "nonnegative", "hadamard": "flag"},
        bad=bad_scales,
    ),
    OpSpec(
        "copy_blocks",
        copy_blocks,
        copy_calls,
        {"block_mapping": Role((1,)), "num_tokens": Role((0,), optional=True)},
        verify=verify_copies,
        mutates=COPIED,
        bad=bad_copies,
    ),
    OpSpec(
        "swap_blocks",
        swap_blocks,
        swap_calls,
        {"block_mapping": Role((1,))},
        verify=verify_copies,
        mutates=SWAPPED,
        bad=bad_swaps,
    ),
    OpSpec(
        "paged_attention",
        ops.paged_attention,
        paged_8bit_calls,
        {
            "q": Role((2,)),
            "k_cache": Role((0, 1, 2, 3)),
            "v_cache": Role((0, 1, 2, 3)),
            "k_scale": Role((0, 1, 2), optional=True, layout=False),
            "v_scale": Role((0, 1, 2), optional=True, layout=False),
        },
        formulas.paged_attention,
        scalars=_SCALE | {"max_seqlen_q": "count", "batch_invariant": "flag"},
        bad=bad_scales,
    ),
    OpSpec(
        "paged_attention",
        ops.paged_attention,
        paged_calls,
        {
            "q": Role((2,)),
            "k_cache": Role((0, 1, 2, 3)),
            "v_cache": Role((0, 1, 2, 3)),
            "cu_seqlens_q": _B,
            "seqused_k": _B,
            "block_table": _B,
            "alibi_slopes": Role((0, 1), optional=True),
            "sinks": Role((0,), optional=True),
            "tree_mask": Role((0,), optional=True),
        },
        formulas.paged_attention,
        scalars=_SCALE | {"max_seqlen_q": "count", "batch_invariant": "flag"},
        bad=bad_paged,
    ),
    OpSpec(
        "paged_attention",
        ops.paged_attention,
        paged_e4m3_calls,
        {"q": Role((2,)), "out_scale": Role((0,), optional=True, layout=False)},
        verify=verify_e4m3,
        scalars=_SCALE | {"max_seqlen_q": "count"},
        bad=bad_out_scale,
        keeps_dtype=False,
    ),
    OpSpec(
        "batch_attention",
        ops.batch_attention,
        batch_calls,
        _BATCH_ROLES | {"sinks": Role((0,), optional=True, grad=True)},
        formulas.batch_attention,
        scalars=_SCALE | {"deterministic": "flag"},
        bad=bad_batch,
        keeps_dtype=False,
    ),
    OpSpec(
        "varlen_attention",
        ops.varlen_attention,
        varlen_calls,
        _PACKED_ROLES | _SEQUENCE_ROLES | {"sinks": Role((0,), optional=True, grad=True)},
        formulas.varlen_attention,
        scalars=_SCALE | _LONGEST | {"deterministic": "flag"},
        bad=bad_varlen,
        keeps_dtype=False,
    ),
    OpSpec(
        "batch_attention_backward",
        ops.batch_attention_backward,
        batch_backward_calls,
        _without_grad(_BATCH_ROLES)
        | dict.fromkeys(("dout", "out"), Role((0, 1, 2, 3)))
        | {"lse": Role((0, 1, 2)), "dlse": Role((0, 1, 2), optional=True)},
        formulas.batch_attention_backward,
        scalars=_SCALE | {"deterministic": "flag"},
        bad=bad_batch_backward,
        noise=1e-4,
    ),
    OpSpec(
        "varlen_attention_backward",
        ops.varlen_attention_backward,
        varlen_backward_calls,
        _without_grad(_PACKED_ROLES)
        | _SEQUENCE_ROLES
        | dict.fromkeys(("dout", "out"), Role((0, 1, 2)))
        | {"lse": Role((0, 1)), "dlse": Role((0, 1), optional=True)},
        formulas.varlen_attention_backward,
        scalars=_SCALE | _LONGEST | {"deterministic": "flag"},
        bad=bad_varlen_backward,
        noise=1e-4,
    ),
    OpSpec(
        "merge_attention_states",
        ops.merge_attention_states,
        merge_calls,
        dict.fromkeys(("out_a", "out_b"), Role((0, 1, 2, 3), grad=True))
        | dict.fromkeys(("lse_a", "lse_b"), Role((0, 1, 2), grad=True)),
        formulas.merge_attention_states,
        bad=bad_merge,
        cuda_dtypes=(torch.bfloat16, torch.float16, torch.float32),
    ),
    OpSpec(
        "adjust_logits",
        ops.adjust_logits,
        adjust_calls,
        {"logits": Role((0,)), "token_ids": _B, "counts": _B, "bias": _B, "indptr": _B}
        | {f"{kind}_penalty": _B for kind in ("repetition", "presence", "frequency")},
        formulas.adjust_logits,
        mutates=("logits",),
        bad=bad_adjust,
        dtypes=(torch.float32,),
        cuda_dtypes=(torch.float32,),
    ),
    OpSpec(
        "apply_token_bitmask",
        ops.apply_token_bitmask,
        bitmask_calls,
        {"logits": Role(), "bitmask": Role((0, 1)), "rows": _B},
        formulas.apply_token_bitmask,
        mutates=("logits",),
        bad=bad_bitmask,
        dtypes=(torch.float32,),
        cuda_dtypes=(torch.float32,),
    ),
    OpSpec(
        "sample",
        ops.sample,
        sample_calls,
        {"logits": Role((0,))} | dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "seed", "position"), _B),
        verify=verify_sample,
        bad=bad_sample,
        keeps_dtype=False,
        cuda_dtypes=(torch.float32, torch.bfloat16, torch.float16),
    ),
    OpSpec(
        "lm_head_sample",
        ops.lm_head_sample,
        lm_head_calls,
        {"x": Role((-1,)), "weight": Role((1,)), "bias": Role((0,), optional=True)}
        | dict.fromkeys(("temperature", "seed", "position"), _B),
        verify=verify_lm_head,
        scalars={"first_id": "count"},
        bad=bad_lm_head,
        keeps_dtype=False,
    ),
    OpSpec(
        "speculative_sample",
        ops.speculative_sample,
        speculative_calls,
        {"logits": Role((0, 1)), "draft_logits": Role((1,))}
        | dict.fromkeys(
            ("draft_token_ids", "draft_rows", "temperature", "top_k", "top_p", "min_p", "seed", "position"), _B
        ),
        verify=verify_speculative,
        bad=bad_speculative,
        keeps_dtype=False,
        cuda_dtypes=(torch.float32, torch.bfloat16, torch.float16),
    ),
    OpSpec(
        "token_logprobs",
        ops.token_logprobs,
        logprob_calls,
        {"logits": Role((0,)), "token_ids": _B},
        formulas.token_logprobs,
        scalars={"num_top": "count"},
        keeps_dtype=False,
        cuda_dtypes=(torch.float32, torch.bfloat16, torch.float16),
    ),
)
