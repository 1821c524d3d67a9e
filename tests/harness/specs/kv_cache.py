"""What writes the KV cache, RoPE and copies of blocks: calls of rope_kv_write, and OpSpecs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn import ops
from tests.harness import formulas
from tests.harness.bad_attention_calls import bad_scales
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
from tests.harness.opspec import Bad, Call, OpSpec, Role


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
        # heads that a few lanes hold, into 8 bits: each kind, with both kinds of scales
        (17, 5, 2, 64, 64, 8, False, False),
        (21, 4, 2, 128, 128, 16, False, False),
        (5, 3, 1, 256, 256, 4, True, False),
        (12, 2, 2, 64, 64, 16, True, False),
        (37, 7, 1, 128, 128, 16, False, False),
        (6, 2, 2, 256, 256, 16, False, False),
        (11, 6, 3, 128, 128, 1, True, False),
        (9, 9, 3, 64, 64, 16, False, False),
        (3, 1, 1, 256, 256, 16, False, False),
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


KV_CACHE = (
    OpSpec(
        "rope_kv_write",
        ops.rope_kv_write,
        rope_calls,
        {
            "q": Role((0, 2)),
            "k": Role((0, 1, 2)),
            "v": Role((0, 1, 2)),
            "cos_sin": Role(),
            "positions": Role((0,)),
            "slot_mapping": Role((0,)),
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
)
