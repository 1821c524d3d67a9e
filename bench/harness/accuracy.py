"""The 2× rule of tests/harness/compare.py, computed where the tensors are: a case's results can be gigabytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# A peer is there for its time. It must compute the same function, but how precisely is its own affair.
PEER_TOLERANCE = 0.05


class WrongResultError(AssertionError):
    """A result that the reference does not allow; it names the position, both values, and how many differ."""


def allowed_error(dtype: torch.dtype, exact: Tensor, plain: Tensor) -> float:
    """Twice the error of plain torch in the same dtype, plus the rounding that none can avoid.

    dtype: of the result that is judged. exact: in more precision. plain: the same formula computed in `dtype`.
    """
    scale = exact[exact.isfinite()].abs()
    largest = float(scale.max()) if scale.numel() else 0.0
    rounding = torch.finfo(dtype).eps * largest * (64 if dtype is torch.float32 else 0.5)
    error = (plain.double() - exact.double()).abs()
    error = error[error.isfinite()]
    return 2 * (float(error.max()) if error.numel() else 0.0) + rounding


def compare(actual: Tensor, exact: Tensor, allowed: float, what: str) -> float:
    """Largest |actual − exact| as a share of `allowed`; infinities and NaN must be at the same places.

    Raises WrongResultError if the share is above 1. Integers must be equal.
    """
    if actual.shape != exact.shape:
        raise WrongResultError(f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
    a, e = actual.double(), exact.double()
    error = (a - e).abs().masked_fill_((a == e) | (a.isnan() & e.isnan()), 0.0)
    wrong = ~(error <= allowed)  # a NaN is wrong too
    if bool(wrong.any()):
        at = tuple(int(i) for i in wrong.nonzero()[0])
        finite = error[error.isfinite()]
        largest = float(finite.max()) if finite.numel() else float("nan")
        raise WrongResultError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first at {at}: got {actual[at].item()!r}, "
            f"expected {exact[at].item()!r}; largest error {largest:.3e}, allowed {allowed:.3e}"
        )
    return float(error.max()) / allowed if error.numel() and allowed > 0 else 0.0


def fp8_sums(exact: Tensor, columns: int) -> float:
    """What Hopper's tensor cores lose of sums over so many products of e4m3: each step of 32 cuts the sum so far, which is
    no larger than the largest of them, to 14 bits, half of the last one on average and always towards zero.
    """
    return columns / 32 * 2.0**-14 * float(exact.abs().max()) if exact.numel() else 0.0


def check_results(
    op: str, actual: Sequence[Tensor], exact: Sequence[Tensor], plain: Sequence[Tensor], noise: float = 0.0
) -> float:
    """Holds every result to the 2× rule and gives the worst share of what is allowed.

    noise: allowed beyond that rule. plain: the formula in the inputs' dtype. A result in another dtype (an fp32 log-sum-exp of bf16 inputs) is not rounded
    to the inputs' dtype on the way, so it gets no more than the rounding of its own.
    """
    if len(actual) != len(exact):
        raise WrongResultError(f"{op}: {len(actual)} results, expected {len(exact)}")
    worst = 0.0
    for i, (a, e, p) in enumerate(zip(actual, exact, plain, strict=True)):
        allowed = 0.0
        if a.is_floating_point():
            allowed = allowed_error(a.dtype, e, p if p.dtype is a.dtype else e) + noise
        worst = max(worst, compare(a, e, allowed, f"{op}, result {i}"))
    return worst


def check_peer(name: str, actual: Tensor, exact: Tensor) -> None:
    """Raises WrongResultError unless the peer computed the same function: ‖out − ref‖ / ‖ref‖, and equal integers."""
    actual = actual.reshape(exact.shape)
    if not actual.is_floating_point():
        compare(actual, exact, 0.0, name)
        return
    a, e = actual.double(), exact.double()
    known = e.isfinite()
    error = float((a - e)[known].norm() / e[known].norm().clamp(min=1e-30))
    if not error <= PEER_TOLERANCE:
        raise WrongResultError(f"{name}: relative error {error:.3g}, allowed {PEER_TOLERANCE}")
