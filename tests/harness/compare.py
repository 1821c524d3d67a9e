"""Comparison that says where, what against what, and how many."""

from __future__ import annotations

import torch
from torch import Tensor


def _worst(actual: Tensor, expected: Tensor, wrong: Tensor) -> str:
    error = (actual.double() - expected.double()).abs()
    position = tuple(int(i) for i in wrong.nonzero()[0])
    finite = error[error.isfinite()]
    largest = float(finite.max()) if finite.numel() else float("nan")
    return (
        f"{int(wrong.sum())} of {wrong.numel()} differ, first at {position}: got {actual[position].item()!r}, "
        f"expected {expected[position].item()!r}; largest error {largest:.3e}"
    )


def assert_within(actual: Tensor, expected: Tensor, atol: float, what: str) -> None:
    """|actual - expected| ≤ atol everywhere; infinities and NaN must be at the same places."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    a, e = actual.double(), expected.double()
    same = (a == e) | (a.isnan() & e.isnan())
    wrong = ~(same | ((a - e).abs() <= atol))
    if bool(wrong.any()):
        raise AssertionError(f"{what}: {_worst(actual, expected, wrong)}, allowed {atol:.3e}")


def assert_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    """The same values in the same dtype; NaN equals NaN."""
    assert actual.dtype is expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert_within(actual, expected, 0.0, what)


def assert_as_accurate(actual: Tensor, exact: Tensor, plain: Tensor, what: str, noise: float = 0.0) -> None:
    """The 2× rule: at most twice the error of plain torch in the same dtype, plus the rounding that none can avoid.

    exact: fp64. plain: the same formula computed in actual's dtype throughout. noise: error of fp32 sums that cancel.
    """
    info = torch.finfo(actual.dtype)
    scale = exact[exact.isfinite()].abs()
    largest = float(scale.max()) if scale.numel() else 0.0
    rounding = info.eps * largest * (64 if actual.dtype is torch.float32 else 0.5)
    plain_error = (plain.double() - exact).abs()
    plain_error = plain_error[plain_error.isfinite()]
    allowed = 2 * (float(plain_error.max()) if plain_error.numel() else 0.0) + rounding + noise
    assert_within(actual, exact, allowed, what)


def bits(t: Tensor) -> Tensor:
    """The tensor's bytes, for comparison that tells 0 from -0 and one NaN from another."""
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
