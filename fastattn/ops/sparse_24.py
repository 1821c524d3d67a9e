"""Dense layers whose weights are 2:4 sparse: of each four neighbours in a row at most two are not zero, as `fastattn prune` makes them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops._library import define
from fastattn.ops.checks import (
    E4M3,
    FLOAT,
    FP8,
    FP32,
    INT8,
    INT32,
    Flag,
    TensorArg,
    compile_check,
    fail_type,
    fail_value,
)
from fastattn.ops.eight_bits import MAX_INT8_K, check_may_be_one, check_out_dtype
from fastattn.reference import sparse_24 as reference

_DTYPES = (*FLOAT.cpu, torch.int8, FP8)


def _fake(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _fake_8bit(
    x: Tensor,
    x_scale: Tensor,
    values: Tensor,
    metadata: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool = False,
) -> Tensor:
    return x.new_empty((x.shape[0], values.shape[0]), dtype=out_dtype)


_sparse_linear = define(
    "sparse_linear(Tensor x, Tensor values, Tensor metadata, Tensor? bias) -> Tensor", reference.sparse_linear, _fake
)
_sparse_int8_linear = define(
    "sparse_int8_linear(Tensor x, Tensor x_scale, Tensor values, Tensor metadata, Tensor weight_scale, Tensor? bias,"
    " ScalarType out_dtype) -> Tensor",
    reference.sparse_int8_linear,
    _fake_8bit,
)
_sparse_fp8_linear = define(
    "sparse_fp8_linear(Tensor x, Tensor x_scale, Tensor values, Tensor metadata, Tensor weight_scale, Tensor? bias,"
    " ScalarType out_dtype, bool fast_accum) -> Tensor",
    reference.sparse_fp8_linear,
    _fake_8bit,
)

_METADATA = TensorArg("metadata", "B U T", INT32)
_check_sparse = compile_check(
    "sparse_linear",
    TensorArg("x", "... K", FLOAT),
    TensorArg("values", "N H", "x"),
    _METADATA,
    TensorArg("bias", "N", "x", optional=True),
)
_check_int8, _check_fp8 = (
    compile_check(
        op,
        TensorArg("x", "M K", dtype),
        TensorArg("x_scale", "Sx", FP32),
        TensorArg("values", "N H", dtype),
        _METADATA,
        TensorArg("weight_scale", "Sw", FP32),
        TensorArg("bias", "N", FLOAT, optional=True),
        *flags,
    )
    for op, dtype, flags in (("sparse_int8_linear", INT8, ()), ("sparse_fp8_linear", E4M3, (Flag("fast_accum"),)))
)


def _check_packing(op: str, x: Tensor, values: Tensor, metadata: Tensor) -> None:
    """values are half of x's columns, metadata what `pack_sparse_24` makes beside them."""
    columns, rows = x.shape[-1], values.shape[0]
    if columns % 4:
        fail_value(op, f"x has shape {tuple(x.shape)}, expected K a multiple of 4")
    if values.shape[1] != columns // 2:
        expected = f"(N, {columns // 2}), two of each four columns, with K = {columns} from x {tuple(x.shape)}"
        fail_value(op, f"values has shape {tuple(values.shape)}, expected {expected}")
    shape = reference.metadata_shape(rows, columns)
    if metadata.shape != shape:
        expected = f"{shape}, from pack_sparse_24, with N = {rows} and K = {columns}"
        fail_value(op, f"metadata has shape {tuple(metadata.shape)}, expected {expected}")


def pack_sparse_24(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight that is 2:4 sparse as the numbers that are stored and metadata, once, for the products below.

    weight: (N, K) bf16, fp16, int8 or float8_e4m3fn, on the CPU also fp32; K a multiple of 4. Of each four neighbours in a row,
        columns 4i to 4i + 3, at most two are not zero. What is quantized is pruned before: zeros stay zeros.

    Returns values (N, K/2) in weight's dtype, of each four the two that are stored, in their order, and metadata
    (⌈N/128⌉, 8·⌈K/512⌉, 256) int32, which they are, four bits for four columns, as Hopper's tensor cores want them: in another
    order for 8 bits than for 16.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for another shape, or naming the first four columns
    of which more than two are not zero.
    """
    op = "pack_sparse_24"
    if not isinstance(weight, Tensor):
        fail_type(op, f"weight is {type(weight).__name__}, expected a tensor")
    if weight.dtype not in _DTYPES:
        fail_type(op, f"weight is {weight.dtype}, expected {' or '.join(map(str, _DTYPES))}")
    if weight.dim() != 2 or weight.shape[1] % 4:
        fail_value(op, f"weight has shape {tuple(weight.shape)}, expected (N, K) with K a multiple of 4")
    weight = weight.detach().contiguous()
    denser = (reference.places(weight) == reference.TOO_MANY).nonzero()
    if len(denser):
        row, four = denser[0].tolist()
        numbers = weight[row, 4 * four : 4 * four + 4].float().tolist()
        where = f"weight[{row}, {4 * four}:{4 * four + 4}] is {numbers}"
        fail_value(
            op,
            f"{where}, expected at most 2 of 4 other than zero; {len(denser)} of {weight.numel() // 4} groups have more",
        )
    return reference.pack(weight)


def unpack_sparse_24(values: Tensor, metadata: Tensor) -> Tensor:
    """The weight (N, K) that `pack_sparse_24` has made values (N, K/2) and metadata of.

    Raises TypeError for what is not a tensor or has another dtype, ValueError for shapes that do not fit together.
    """
    op = "unpack_sparse_24"
    for name, t, allowed in (("values", values, _DTYPES), ("metadata", metadata, INT32.cpu)):
        if not isinstance(t, Tensor):
            fail_type(op, f"{name} is {type(t).__name__}, expected a tensor")
        if t.dtype not in allowed:
            fail_type(op, f"{name} is {t.dtype}, expected {' or '.join(map(str, allowed))}")
    if values.dim() != 2 or values.shape[1] % 2:
        fail_value(op, f"values has shape {tuple(values.shape)}, expected (N, K/2) with K a multiple of 4")
    shape = reference.metadata_shape(values.shape[0], 2 * values.shape[1])
    if metadata.shape != shape:
        fail_value(op, f"metadata has shape {tuple(metadata.shape)}, expected {shape} for values {tuple(values.shape)}")
    return reference.unpack(values, metadata)


def sparse_linear(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weightᵀ + bias` with a 2:4 sparse weight, accumulated in fp32, rounded once.

    On Hopper, where N is a multiple of 8, K of 16 and rows are 16-byte aligned, on its sparse tensor cores, which read half of the
    weight and 1/16 of it as metadata. Other calls, and other GPUs, write the weight out first.

    x: (…, K), 1 to 3 dimensions, bf16 or fp16, on the CPU also fp32; the last dimension contiguous.
    values: (N, K/2) in x's dtype and metadata: (⌈N/128⌉, 8·⌈K/512⌉, 256) int32, from `pack_sparse_24`.
    bias: (N) in x's dtype.

    Returns (…, N) in x's dtype, contiguous.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    _check_sparse(x, values, metadata, bias)
    _check_packing("sparse_linear", x, values, metadata)
    out: Tensor = _sparse_linear(x, values, metadata, bias)
    return out


def sparse_int8_linear(
    x: Tensor,
    x_scale: Tensor,
    values: Tensor,
    metadata: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    """`(x @ weightᵀ) · x_scale · weight_scale + bias` with a 2:4 sparse weight: the product is exact in int32, the rest fp32, rounded once.

    On Hopper, where N is a multiple of 8, K of 32 and rows are 16-byte aligned, on its sparse tensor cores, which read half of the
    weight and 1/8 of it as metadata. Other calls, and other GPUs, write the weight out first.

    x: (M, K) int8 and x_scale: (M) fp32, from `quantize_int8`, or (1), a scale for all rows. K < 2¹⁷.
    values: (N, K/2) int8 and metadata: (⌈N/128⌉, 8·⌈K/512⌉, 256) int32, from `pack_sparse_24`; weight_scale: (N) fp32, a
        scale a row, or (1).
    bias: (N) in out_dtype.
    out_dtype: bf16 or fp16, on the CPU also fp32.

    Returns (M, N) in out_dtype, contiguous.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    op = "sparse_int8_linear"
    _check_int8(x, x_scale, values, metadata, weight_scale, bias)
    _check_packing(op, x, values, metadata)
    check_may_be_one(op, "x_scale", x_scale, "M", x.shape[0])
    check_may_be_one(op, "weight_scale", weight_scale, "N", values.shape[0])
    check_out_dtype(op, x, bias, out_dtype)
    if x.shape[1] > MAX_INT8_K:
        fail_value(op, f"x has shape {tuple(x.shape)}, expected K ≤ {MAX_INT8_K}: longer sums leave int32")
    out: Tensor = _sparse_int8_linear(x, x_scale, values, metadata, weight_scale, bias, out_dtype)
    return out


def sparse_fp8_linear(
    x: Tensor,
    x_scale: Tensor,
    values: Tensor,
    metadata: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    fast_accum: bool = False,
) -> Tensor:
    """`(x @ weightᵀ) · x_scale · weight_scale + bias` in fp8 with a 2:4 sparse weight; the sums in fp32, rounded once.

    On Hopper, where N is a multiple of 8, K of 32 and rows are 16-byte aligned, on its sparse tensor cores, as `sparse_int8_linear`.

    x: (M, K) float8_e4m3fn and x_scale: (M) fp32, from `quantize_fp8`, or (1), a scale for all rows.
    values: (N, K/2) float8_e4m3fn and metadata: (⌈N/128⌉, 8·⌈K/512⌉, 256) int32, from `pack_sparse_24`; weight_scale: (N) fp32, a
        scale a row, or (1).
    bias: (N) in out_dtype.
    out_dtype: bf16 or fp16, on the CPU also fp32.
    fast_accum: sums may have the 14 bits that Hopper's tensor cores keep of them, where that is faster; otherwise such sums
        are of 128 products that are not zero, and fp32 from there on.

    Returns (M, N) in out_dtype, contiguous.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    op = "sparse_fp8_linear"
    _check_fp8(x, x_scale, values, metadata, weight_scale, bias, fast_accum)
    _check_packing(op, x, values, metadata)
    check_may_be_one(op, "x_scale", x_scale, "M", x.shape[0])
    check_may_be_one(op, "weight_scale", weight_scale, "N", values.shape[0])
    check_out_dtype(op, x, bias, out_dtype)
    out: Tensor = _sparse_fp8_linear(x, x_scale, values, metadata, weight_scale, bias, out_dtype, fast_accum)
    return out
