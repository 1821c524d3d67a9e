"""Rounding that makes up for itself: GPTQ (Frantar et al., 2022) and, with the same algebra, SparseGPT (2023).

A layer's output error for weights W and inputs X is ‖(W − Ŵ)X‖² = Σ over rows of (w − ŵ) H (w − ŵ)ᵀ with H = XXᵀ. Columns are
rounded one after the other, and what a column got wrong is spread over those still to come, in the way that costs least:

    err = (w_j − ŵ_j) / U_jj        w_k ← w_k − err · U_jk  for k > j        H⁻¹ = UᵀU, U upper triangular

All rows go at once, since they share H.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger("fastattn.compress")

# Columns whose errors are spread among themselves at once and over the rest in one matrix product.
_BLOCK = 128
_MAX_DAMP = 1.0

# (columns from the present one on, its number in the weight, their pivots U_jj) → what it becomes; see `compensate`.
Rounder = Callable[[Tensor, int, Tensor], Tensor]


class Hessian:
    """Mean of x xᵀ over calibration inputs, (K, K) fp32: twice it is the Hessian of a row's squared error, and 2 cancels."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.matrix = torch.zeros(size, size, device=device)
        self.num_tokens = 0

    def add(self, inputs: Tensor) -> None:
        """inputs (tokens, K)."""
        x = inputs.float()
        total = self.num_tokens + x.shape[0]
        # A running mean: the numbers stay of one size however long the text is.
        self.matrix.mul_(self.num_tokens / total).addmm_(x.t(), x, alpha=1 / total)
        self.num_tokens = total

    @property
    def diagonal(self) -> Tensor:
        return self.matrix.diagonal()


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """‖(W − Ŵ)X‖² / ‖WX‖²."""
    wrong = weight - rounded
    energy = ((weight @ hessian) * weight).sum()
    return float(((wrong @ hessian) * wrong).sum() / energy.clamp(min=torch.finfo(torch.float32).tiny))


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """U (K, K), upper triangular, with UᵀU = (H + damp · mean(diag H) · I)⁻¹. More damping where H is too near singular."""
    h = hessian.double()
    mean = h.diagonal().mean()
    if mean == 0:
        h, mean = torch.eye(h.shape[0], dtype=h.dtype, device=h.device), torch.ones((), dtype=h.dtype, device=h.device)
    while damp <= _MAX_DAMP:
        damped = h + torch.eye(h.shape[0], dtype=h.dtype, device=h.device) * (damp * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed and bool(upper.isfinite().all()):
                return upper.float()
        logger.warning("a Hessian is not positive definite with damping %g, trying %g", damp, damp * 10)
        damp *= 10
    raise ValueError("the calibration inputs of a layer are not finite, or give a Hessian that cannot be factored")


def compensate(
    weight: Tensor, hessian: Tensor, rounder: Rounder, *, damp: float = 0.01, reorder: bool = True
) -> Tensor:
    """The weight (N, K) fp32 with each column replaced by the rounder's, errors spread over the columns that follow.

    rounder(rest, j, pivots): ``rest`` (N, …) are columns in the order of processing, as they have become, pivots (…) their
    U_jj; it returns what the first of them is replaced by. j is its number in ``weight``. reorder: columns with the largest
    inputs first, while there is still room to make up for them; the result is in the weight's own order.
    """
    order = (
        hessian.diagonal().argsort(descending=True) if reorder else torch.arange(weight.shape[1], device=weight.device)
    )
    work = weight[:, order].clone()
    upper = inverse_factor(hessian[order][:, order], damp)
    out = torch.empty_like(work)
    columns, pivots = order.tolist(), upper.diagonal()
    for start in range(0, work.shape[1], _BLOCK):
        end = min(start + _BLOCK, work.shape[1])
        errors = torch.empty(work.shape[0], end - start, device=work.device)
        for i in range(start, end):
            out[:, i] = rounder(work[:, i:end], columns[i], pivots[i:end])
            errors[:, i - start] = (work[:, i] - out[:, i]) / pivots[i]
            work[:, i + 1 : end].addr_(errors[:, i - start], upper[i, i + 1 : end], alpha=-1)
        work[:, end:].addmm_(errors, upper[start:end, end:], alpha=-1)
    result = torch.empty_like(out)
    result[:, order] = out
    return result
