"""Sums of squares that a product gives with its result, and a norm inside the next product that is given them."""

from __future__ import annotations

import pytest
import torch

from fastattn import ops
from tests.harness.generators import Gen
from tests.harness.opspec import HALVES
from tests.harness.specs.linear import sums_of_squares

SHAPES = (((3,), 64, 48), ((2, 5), 129, 65), ((), 64, 8), ((70,), 136, 200), ((4, 130), 72, 136), ((0,), 8, 72))


@pytest.mark.parametrize("dtype", HALVES)
def test_sums_are_those_of_what_is_written(device: str, dtype: torch.dtype) -> None:
    gen = Gen(device, seed=3)
    for leading, k, n in SHAPES:
        x, weight = gen.randn(*leading, k, dtype=dtype), gen.randn(n, k, dtype=dtype)
        residual = gen.randn(*leading, n, dtype=dtype, scale=30.0)
        out, sums = ops.linear(x, weight, residual=residual, with_sums=True)
        assert torch.equal(out, ops.linear(x, weight, residual=residual))
        assert sums.dtype is torch.float32 and sums.is_contiguous() and sums.shape == (*leading, -(-n // 32))
        torch.testing.assert_close(sums, sums_of_squares(out), rtol=1e-5, atol=0)


def test_a_norm_takes_the_sums_that_it_is_given(device: str) -> None:
    gen = Gen(device, seed=4)
    dtype = torch.bfloat16
    for leading, k, n in (((3,), 64, 48), ((2, 5), 136, 64), ((70,), 1032, 80), ((300,), 264, 528)):
        x, weight = gen.randn(*leading, k, dtype=dtype), gen.randn(n, k, dtype=dtype, scale=k**-0.5)
        sums = sums_of_squares(x)
        own = ops.rms_norm_linear(x, weight, eps=0.0)
        given = ops.rms_norm_linear(x, weight, eps=0.0, sums_of_squares=sums)
        torch.testing.assert_close(given, own, rtol=1.6e-2, atol=1e-5)
        assert torch.equal(ops.rms_norm_linear(x, weight, eps=0.0, sums_of_squares=4 * sums), given / 2)
        gated = ops.rms_norm_gated_linear(x, weight, eps=0.0, sums_of_squares=sums)
        torch.testing.assert_close(gated, ops.rms_norm_gated_linear(x, weight, eps=0.0), rtol=3e-2, atol=1e-4)


def test_what_does_not_fit_is_named(device: str) -> None:
    gen = Gen(device, seed=5)
    x, weight = gen.randn(6, 136), gen.randn(16, 136)
    x, weight = x.bfloat16(), weight.bfloat16()
    with pytest.raises(ValueError, match="linear: with_sums is True and residual None, expected a residual"):
        ops.linear(x, weight, with_sums=True)  # type: ignore[call-overload]
    for op in (ops.rms_norm_linear, ops.rms_norm_gated_linear):
        for shape in ((6, 2), (5, 3), (6, 136)):
            with pytest.raises(
                ValueError, match=rf"sums_of_squares has shape \({shape[0]}, {shape[1]}\), expected \(6, 5\)"
            ):
                op(x, weight, sums_of_squares=torch.ones(shape, device=device))


def test_opcheck(device: str) -> None:
    gen = Gen(device, seed=6)
    x, weight = gen.randn(2, 3, 72, dtype=torch.bfloat16), gen.randn(136, 72, dtype=torch.bfloat16)
    residual = gen.randn(2, 3, 136, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.fastattn.linear_add_sums.default, (x, weight, None, residual))
