"""x · weightᵀ + bias, accumulated in fp32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

# Up to so many rows the product is written as (weight · xᵀ)ᵀ. It is the same sum, but BLAS libraries split the rows of their
# first operand over threads: with x first, a few rows leave most of the machine idle (3 to 7 times slower for 1 to 3 rows).
_FEW_ROWS = 16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, batch_invariant: bool = False) -> Tensor:
    """x (…, K), weight (N, K), bias (N) → (…, N)."""
    if batch_invariant:
        return row_by_row(lambda row: linear(row, weight, bias), x)
    if x.dtype is torch.float32:
        return _product(x, weight, bias)
    if x.dtype is torch.bfloat16 and bias is None:
        # torch's own bf16 product accumulates in fp32 and rounds once; its fp16 product and its bias do not.
        return functional.linear(x, weight)
    return _product(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def row_by_row(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """product(x), of x (…, K), one row at a time: in what order a BLAS library adds up depends on the number of rows, and on where
    in memory one begins."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if rows.shape[0] == 0:
        return product(x)
    out = torch.cat([product(row.clone()) for row in torch.split(rows, 1)])
    return out.view(*x.shape[:-1], out.shape[-1])


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """The same and residual (…, N), rounded once."""
    product = _product(x.float(), weight.float(), None if bias is None else bias.float())
    return product.add_(residual.float()).to(x.dtype)


SQUARES_PART = 32  # columns of a row whose squares are one sum: all tiles of the kernels have whole ones


def linear_add_sums(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and the `sums_of_squares` of what it gives."""
    out = linear_add(x, weight, bias, residual)
    return out, sums_of_squares(out)


def sums_of_squares(x: Tensor) -> Tensor:
    """x (…, N) → of the squares of 32 neighbouring columns each, (…, ⌈N / 32⌉) fp32."""
    squares = functional.pad(x.float().square(), (0, -x.shape[-1] % SQUARES_PART))
    return squares.view(*squares.shape[:-1], squares.shape[-1] // SQUARES_PART, SQUARES_PART).sum(-1)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])  # not -1: K may be 0
    num_rows = rows.shape[0]
    if not 0 < num_rows <= _FEW_ROWS:
        return functional.linear(x, weight, bias)
    # One row would be a matrix-vector product, which runs on one thread: a row of zeros beside it makes it a matrix.
    padded = functional.pad(rows, (0, 0, 0, 1)) if num_rows == 1 else rows
    out = (weight @ padded.t()).t()[:num_rows]
    out = out if bias is None else out + bias
    return out.contiguous().view(*x.shape[:-1], weight.shape[0])  # the sum keeps the turned strides


# Rows that oneDNN lays a weight out for. From 8 on the layout is the same, and it is good for one row too.
_PACKED_FOR_ROWS = 32


def can_pack(weight: Tensor) -> bool:
    """Whether `pack` can lay out this weight: fp32 on a CPU, in a torch that was built with oneDNN."""
    return weight.device.type == "cpu" and weight.dtype is torch.float32 and torch._C._has_mkldnn


def pack(weight: Tensor) -> Tensor:
    """The weight (N, K) as an opaque tensor in oneDNN's blocked layout, for `packed_linear` alone.

    BLAS packs its operands anew in each call, which costs more than the product where x has few rows: packed once, 4 to 64
    rows take about half the time.
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, batch_invariant: bool = False) -> Tensor:
    """`linear` with a weight from `pack`. x (…, K) fp32 → (…, N)."""
    if batch_invariant:
        return row_by_row(lambda row: packed_linear(row, packed, bias), x)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out
