"""Rows in 8 bits, as quantizers and norms make them, and dense layers of such rows and weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
    NonNegative,
    TensorArg,
    compile_check,
    fail_type,
    fail_value,
)
from fastattn.ops.gated_linear import ACTIVATIONS
from fastattn.reference import quantized as reference

# Above it a sum of K products of int8 may leave int32, and with zero points of codes less one.
MAX_INT8_K = 2**17 - 1
MAX_INT8_K_ASYMMETRIC = 2**16 - 1


def _fake_quantize(x: Tensor, activation: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], x.shape[1] // 2 if activation else x.shape[1])
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape[:1], dtype=torch.float32)


def _fake_int8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    x_zero_point: Tensor | None,
    weight_sum: Tensor | None,
    out_dtype: torch.dtype,
    activation: str = "",
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0] // (2 if activation else 1)), dtype=out_dtype)


def _fake_fp8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool,
    batch_invariant: bool = False,
    activation: str = "",
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0] // (2 if activation else 1)), dtype=out_dtype)


_quantize_int8 = define(
    "quantize_int8(Tensor x, str activation) -> (Tensor, Tensor)",
    reference.quantize_int8,
    lambda x, activation: _fake_quantize(x, activation, torch.int8),
)
_quantize_int8_asymmetric = define(
    "quantize_int8_asymmetric(Tensor x, str activation) -> (Tensor, Tensor, Tensor)",
    reference.quantize_int8_asymmetric,
    lambda x, activation: (
        *_fake_quantize(x, activation, torch.int8),
        x.new_empty(x.shape[:1], dtype=torch.int32),
    ),
)
_quantize_fp8 = define(
    "quantize_fp8(Tensor x, str activation) -> (Tensor, Tensor)",
    reference.quantize_fp8,
    lambda x, activation: _fake_quantize(x, activation, FP8),
)
_rms_norm_quantize_int8, _rms_norm_quantize_fp8 = (
    define(
        f"{op.__name__}(Tensor x, Tensor(a!)? residual, Tensor weight, float eps) -> (Tensor, Tensor)",
        op,
        partial(lambda dtype, x, residual, weight, eps: _fake_quantize(x, "", dtype), dtype),
    )
    for op, dtype in ((reference.rms_norm_quantize_int8, torch.int8), (reference.rms_norm_quantize_fp8, FP8))
)
_int8_linear = define(
    "int8_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? x_zero_point,"
    " Tensor? weight_sum, ScalarType out_dtype, str activation='') -> Tensor",
    reference.int8_linear,
    _fake_int8,
)
_fp8_linear = define(
    "fp8_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType out_dtype,"
    " bool fast_accum, bool batch_invariant=False, str activation='') -> Tensor",
    reference.fp8_linear,
    _fake_fp8,
)


def _check_activation(op: str, activation: str | None) -> str:
    """Its name for the operator, "" for none."""
    if activation is not None and activation not in ACTIVATIONS:
        fail_value(op, f"activation is {activation!r}, expected None or one of {', '.join(map(repr, ACTIVATIONS))}")
    return activation or ""


def _check_gates(op: str, activation: str | None, weight: Tensor) -> str:
    """The same of a dense layer, whose weight then has as many rows of gates as of ups."""
    if activation is not None and weight.shape[0] % 2:
        fail_value(
            op, f"weight has shape {tuple(weight.shape)}, expected (2N, K), an even number of rows, with an activation"
        )
    return _check_activation(op, activation)


def compile_quantize_check(op: str) -> Callable[[Tensor, str | None], str]:
    """The check of the quantizer `op`, which is defined: of x and the activation, whose name for the operator it gives, "" for none."""
    check, check_gated = (compile_check(op, TensorArg("x", shape, FLOAT)) for shape in ("M K", "M 2K"))

    def check_call(x: Tensor, activation: str | None) -> str:
        name = _check_activation(op, activation)
        (check_gated if name else check)(x)
        return name

    return check_call


_check_quantize_int8 = compile_quantize_check("quantize_int8")
_check_quantize_int8_asymmetric = compile_quantize_check("quantize_int8_asymmetric")
_check_quantize_fp8 = compile_quantize_check("quantize_fp8")
_check_rms_norm_quantize_int8, _check_rms_norm_quantize_fp8 = (
    compile_check(
        op,
        TensorArg("x", "M K", FLOAT),
        TensorArg("weight", "K", "x"),
        TensorArg("residual", "like x", "x", optional=True, mutated=True),
        NonNegative("eps"),
    )
    for op in ("rms_norm_quantize_int8", "rms_norm_quantize_fp8")
)
_check_int8 = compile_check(
    "int8_linear",
    TensorArg("x", "M K", INT8),
    TensorArg("x_scale", "Sx", FP32),
    TensorArg("weight", "N K", INT8),
    TensorArg("weight_scale", "Sw", FP32),
    TensorArg("bias", "N", FLOAT, optional=True),
    TensorArg("x_zero_point", "Sx", INT32, optional=True),
    TensorArg("weight_sum", "N", INT32, optional=True),
)
_check_fp8 = compile_check(
    "fp8_linear",
    TensorArg("x", "M K", E4M3),
    TensorArg("x_scale", "Sx", FP32),
    TensorArg("weight", "N K", E4M3),
    TensorArg("weight_scale", "Sw", FP32),
    TensorArg("bias", "N", FLOAT, optional=True),
    Flag("fast_accum"),
    Flag("batch_invariant"),
)


def check_may_be_one(op: str, name: str, scale: Tensor, letter: str, rows: int) -> None:
    """A scale for each of the rows, or one for all."""
    if scale.shape[0] not in (1, rows):
        fail_value(op, f"{name} has shape {tuple(scale.shape)}, expected ({letter},) or (1,), with {letter} = {rows}")


def check_out_dtype(op: str, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> None:
    """out_dtype is one that x's device has, and bias has it."""
    allowed = FLOAT.cpu if x.is_cpu else FLOAT.cuda
    if out_dtype not in allowed:
        fail_type(op, f"out_dtype is {out_dtype!r}, expected {' or '.join(map(str, allowed))}")
    if bias is not None and bias.dtype is not out_dtype:
        fail_type(op, f"bias is {bias.dtype}, expected {out_dtype} as out_dtype")


def quantize_int8(x: Tensor, *, activation: str | None = None) -> tuple[Tensor, Tensor]:
    """Each row in 8 bits: `scale = max|x| / 127`, `q = round(x / scale)`, ties to even.

    x: (M, K) bf16 or fp16, on the CPU also fp32; the last dimension contiguous.
    activation: "silu", "gelu_tanh" or "gelu": x is (M, 2K), gate in its first half, and what is rounded is `act(gate) * up`, in
        x's dtype, as `swiglu` and `geglu` give it: the same codes from one kernel.

    Returns q (M, K) int8 from −127 to 127 and scale (M) fp32, so that x ≈ q · scale. A row of zeros has scale 1. A row with
    a NaN or an infinity has that as its scale, so that what is computed from it is NaN.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    q, scale = _quantize_int8(x, _check_quantize_int8(x, activation))
    return q, scale


def quantize_int8_asymmetric(x: Tensor, *, activation: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Each row in all of 8 bits: `scale = (high − low) / 255`, `zero_point = round(−128 − low / scale)`,
    `q = round(x / scale + zero_point)`, ties to even, with low ≤ 0 ≤ high the row's least and largest element.

    For rows that are not about 0, as what an activation function leaves. As compressed-tensors' `symmetric: false`.

    x: (M, K) bf16 or fp16, on the CPU also fp32; the last dimension contiguous.
    activation: as in `quantize_int8`.

    Returns q (M, K) int8, scale (M) fp32 and zero_point (M) int32 from −128 to 127, so that x ≈ (q − zero_point) · scale, and 0 is
    exact. A row of zeros has scale 1. A row with a NaN or an infinity has that as its scale, so that what is computed from it is NaN.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    q, scale, zero_point = _quantize_int8_asymmetric(x, _check_quantize_int8_asymmetric(x, activation))
    return q, scale, zero_point


def quantize_fp8(x: Tensor, *, activation: str | None = None) -> tuple[Tensor, Tensor]:
    """Each row in fp8: `scale = max|x| / 448`, `q = x / scale` rounded to e4m3, ties to even.

    x: (M, K) bf16 or fp16, on the CPU also fp32; the last dimension contiguous.
    activation: as in `quantize_int8`.

    Returns q (M, K) float8_e4m3fn and scale (M) fp32, so that x ≈ q · scale. A row of zeros has scale 1. A row with a NaN
    or an infinity has that as its scale, so that what is computed from it is NaN.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    q, scale = _quantize_fp8(x, _check_quantize_fp8(x, activation))
    return q, scale


def rms_norm_quantize_int8(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`quantize_int8(rms_norm(x, weight, eps))`, or with a residual `quantize_int8(add_rms_norm(x, residual, weight, eps))`: the same
    codes from one kernel.

    x: (M, K) bf16 or fp16, on the CPU also fp32; the last dimension contiguous.
    weight: (K), x's dtype. eps: finite, ≥ 0.
    residual: (M, K) in x's dtype, updated in place: `residual ← round(x + residual)`, of which the norm is.

    Returns q (M, K) int8 and scale (M) fp32, as `quantize_int8`.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    _check_rms_norm_quantize_int8(x, weight, residual, eps)
    q, scale = _rms_norm_quantize_int8(x, residual, weight, eps)
    return q, scale


def rms_norm_quantize_fp8(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`rms_norm_quantize_int8` in fp8: q (M, K) float8_e4m3fn and scale (M) fp32, as `quantize_fp8`."""
    _check_rms_norm_quantize_fp8(x, weight, residual, eps)
    q, scale = _rms_norm_quantize_fp8(x, residual, weight, eps)
    return q, scale


def int8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    x_zero_point: Tensor | None = None,
    weight_sum: Tensor | None = None,
    out_dtype: torch.dtype,
    activation: str | None = None,
) -> Tensor:
    """`((x − x_zero_point) @ weightᵀ) · x_scale · weight_scale + bias`: the product is exact in int32, the rest fp32, rounded once.

    x: (M, K) int8 and x_scale: (M) fp32, from `quantize_int8`, or (1), a scale for all rows. K < 2¹⁷.
    weight: (N, K) int8, weight_scale: (N) fp32, a scale a row, or (1).
    bias: (N) in out_dtype.
    x_zero_point: as x_scale, int32, the code of 0 in each row, from `quantize_int8_asymmetric`: −128 to 127, which nobody checks.
        It takes weight_sum beside it, and K < 2¹⁶.
    weight_sum: (N) int32, the sum of each row of weight's codes, `weight.sum(1, dtype=torch.int32)`, made once.
    out_dtype: bf16 or fp16, on the CPU also fp32.
    activation: None, or a gate's: "silu", "gelu_tanh" or "gelu". Rows of weight, and what is beside them, are then gates and ups in
        turns, as `gated_linear` has them, and `act(gate) * up` is what is rounded: as one kernel where `gated_linear` is one, on
        Hopper where K is a multiple of 16 and N of 16. Elsewhere gates and ups are rounded between two.

    Returns (M, N), with an activation (M, N / 2), in out_dtype, contiguous; a row's bits do not depend on other rows.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    _check_int8(x, x_scale, weight, weight_scale, bias, x_zero_point, weight_sum)
    check_may_be_one("int8_linear", "x_scale", x_scale, "M", x.shape[0])
    check_may_be_one("int8_linear", "weight_scale", weight_scale, "N", weight.shape[0])
    check_out_dtype("int8_linear", x, bias, out_dtype)
    if (x_zero_point is None) != (weight_sum is None):
        given, missing = ("x_zero_point", "weight_sum") if weight_sum is None else ("weight_sum", "x_zero_point")
        fail_value("int8_linear", f"{given} is given and {missing} is None, expected both or neither")
    longest, why = (MAX_INT8_K, "") if x_zero_point is None else (MAX_INT8_K_ASYMMETRIC, " with x_zero_point")
    if x.shape[1] > longest:
        fail_value("int8_linear", f"x has shape {tuple(x.shape)}, expected K ≤ {longest}{why}: longer sums leave int32")
    gates = _check_gates("int8_linear", activation, weight)
    out: Tensor = _int8_linear(x, x_scale, weight, weight_scale, bias, x_zero_point, weight_sum, out_dtype, gates)
    return out


def fp8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    fast_accum: bool = False,
    batch_invariant: bool = False,
    activation: str | None = None,
) -> Tensor:
    """`(x @ weightᵀ) · x_scale · weight_scale + bias` in fp8; the sums in fp32, rounded once.

    x: (M, K) float8_e4m3fn and x_scale: (M) fp32, from `quantize_fp8`, or (1), a scale for all rows.
    weight: (N, K) float8_e4m3fn, weight_scale: (N) fp32, a scale a row, or (1).
    bias: (N) in out_dtype.
    out_dtype: bf16 or fp16, on the CPU also fp32.
    fast_accum: sums may have the 14 bits that Hopper's tensor cores keep of them, where that is faster; otherwise such sums
        are of 128 products, and fp32 from there on. As torch._scaled_mm's use_fast_accum.
    batch_invariant: as in `linear`; not with fast_accum.
    activation: as in `int8_linear`; with batch_invariant two kernels.

    Returns (M, N), with an activation (M, N / 2), in out_dtype, contiguous.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    _check_fp8(x, x_scale, weight, weight_scale, bias, fast_accum, batch_invariant)
    check_may_be_one("fp8_linear", "x_scale", x_scale, "M", x.shape[0])
    check_may_be_one("fp8_linear", "weight_scale", weight_scale, "N", weight.shape[0])
    check_out_dtype("fp8_linear", x, bias, out_dtype)
    if batch_invariant and fast_accum:
        fail_value("fp8_linear", "batch_invariant is True with fast_accum, expected one of them at most")
    gates = _check_gates("fp8_linear", activation, weight)
    out: Tensor = _fp8_linear(x, x_scale, weight, weight_scale, bias, out_dtype, fast_accum, batch_invariant, gates)
    return out
