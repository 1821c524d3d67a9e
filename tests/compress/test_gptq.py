"""GPTQ and SparseGPT against their definition: eliminate a column from the inverse Hessian, spread its error, go on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastattn.compress.gptq import Hessian, compensate, inverse_factor, output_error
from fastattn.compress.prune import keep_largest, sparsegpt, wanda_mask


def inputs(tokens: int = 400, size: int = 24, seed: int = 0) -> Tensor:
    """Correlated, with columns of very different size, one of them always zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) / size**0.5 + torch.eye(size)
    x = torch.randn(tokens, size, generator=generator) @ mix * torch.linspace(0.1, 3, size)
    x[:, 5] = 0
    return x


def weights(rows: int = 12, size: int = 24) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(1))


def round_half(values: Tensor) -> Tensor:
    return (values * 2).round() / 2


def naive(
    weight: Tensor, hessian: Tensor, damp: float, order: list[int], change: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Optimal Brain Quantization's two formulas (Frantar and Alistarh, 2022), a row and a column at a time, in fp64:
    w ← w − err / [H⁻¹]_jj · [H⁻¹]_j,: and H⁻¹ ← H⁻¹ − [H⁻¹]_:,j [H⁻¹]_j,: / [H⁻¹]_jj."""
    h = hessian.double()
    inverse = torch.linalg.inv(h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64))
    w = weight.double().clone()
    for j in order:
        target = change(w, j)
        error = (w[:, j] - target) / inverse[j, j]
        for row in range(w.shape[0]):
            w[row] -= error[row] * inverse[j]
        w[:, j] = target
        inverse -= inverse[:, j].outer(inverse[j]) / inverse[j, j]
        inverse[j], inverse[:, j] = 0, 0  # exactly: it is out, and what is left of it is rounding
        inverse[j, j] = 1
    return w


@pytest.mark.parametrize("reorder", [False, True])
def test_compensate_is_the_definition(reorder: bool) -> None:
    x, w = inputs(), weights()
    hessian = x.t() @ x / len(x)
    order = hessian.diagonal().argsort(descending=True).tolist() if reorder else list(range(w.shape[1]))

    def change(now: Tensor, j: int) -> Tensor:
        rounded = round_half(now[:, j])
        assert (now[:, j] - rounded).abs().max() < 0.25 - 1e-4  # or fp32, which is off by 1e-6, may round the other way
        return rounded

    expected = naive(w, hessian, 0.01, order, change)
    found = compensate(w, hessian, lambda rest, j, pivots: round_half(rest[:, 0]), damp=0.01, reorder=reorder)
    assert torch.equal(found, round_half(found))
    assert torch.equal(found.double(), expected)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = inputs(size=24), weights(size=24)
    hessian = x.t() @ x
    whole = compensate(w, hessian, lambda rest, j, pivots: round_half(rest[:, 0]))
    monkeypatch.setattr("fastattn.compress.gptq._BLOCK", 8)
    assert torch.equal(compensate(w, hessian, lambda rest, j, pivots: round_half(rest[:, 0])), whole)


def test_compensation_pays() -> None:
    x, w = inputs(), weights()
    hessian = x.t() @ x
    plain = output_error(w, round_half(w), hessian)
    for reorder in (False, True):
        made_up = compensate(w, hessian, lambda rest, j, pivots: round_half(rest[:, 0]), reorder=reorder)
        assert output_error(w, made_up, hessian) < 0.85 * plain


def test_output_error_is_that_of_the_outputs() -> None:
    x, w = inputs(), weights()
    wrong = round_half(w)
    expected = ((x @ (w - wrong).t()).square().sum() / (x @ w.t()).square().sum()).item()
    assert output_error(w, wrong, x.t() @ x / len(x)) == pytest.approx(expected, rel=1e-4)


def test_hessian_is_the_mean_over_all_tokens() -> None:
    x = inputs()
    seen = Hessian(x.shape[1], x.device)
    for part in torch.split(x, 37):
        seen.add(part)
    torch.testing.assert_close(seen.matrix, x.t() @ x / len(x), rtol=1e-4, atol=1e-5)


def test_inverse_factor() -> None:
    x = inputs()
    hessian = x.t() @ x / len(x)
    upper = inverse_factor(hessian, 0.01).double()
    assert torch.equal(upper, upper.triu())
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close(upper.t() @ upper @ damped, torch.eye(24, dtype=torch.float64), rtol=1e-3, atol=1e-3)


def test_hessians_that_cannot_be_factored() -> None:
    zero = inverse_factor(torch.zeros(4, 4), 0.01)  # nothing was seen: nothing to make up for
    assert torch.equal(zero, zero.diag().diag())
    with pytest.raises(ValueError, match="not finite"):
        inverse_factor(torch.full((4, 4), torch.nan), 0.01)


# ---- 2 of 4 ----


def test_wanda_mask_is_the_definition() -> None:
    w, norm = weights(), inputs().norm(dim=0)
    mask = wanda_mask(w, norm)
    for row in range(w.shape[0]):
        for start in range(0, w.shape[1], 4):
            scores = [abs(w[row, j].item()) * norm[j].item() for j in range(start, start + 4)]
            best = sorted(range(4), key=lambda j: -scores[j])[:2]
            assert mask[row, start : start + 4].tolist() == [j in best for j in range(4)]


def test_ties_keep_two() -> None:
    assert keep_largest(torch.zeros(1, 8)).tolist() == [[True, True, False, False] * 2]


def test_sparsegpt_is_the_definition() -> None:
    x, w = inputs(), weights()
    hessian = x.t() @ x / len(x)
    keep = torch.empty(0)
    inverse = torch.linalg.inv(
        hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(24, dtype=torch.float64)
    )
    pivots = torch.linalg.cholesky(inverse, upper=True).diagonal()

    def change(now: Tensor, j: int) -> Tensor:
        nonlocal keep
        if j % 4 == 0:
            scores = (now[:, j : j + 4] / pivots[j : j + 4]).square()
            third, second = scores.sort().values[:, 1:3].unbind(1)
            assert (third < 0.999 * second).all()  # or fp32 may keep another
            keep = keep_largest(scores)
        return now[:, j] * keep[:, j % 4]

    expected = naive(w, hessian, 0.01, list(range(24)), change)
    found = sparsegpt(w, hessian, 0.01)
    assert torch.equal(found != 0, expected != 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    by_wanda = w * wanda_mask(w, hessian.diagonal().sqrt())
    assert output_error(w, found, hessian) < output_error(w, by_wanda, hessian)
    assert ((found != 0).view(-1, 4).sum(1) <= 2).all()
