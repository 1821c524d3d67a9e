"""Valid and bad calls of the operators on 2:4 sparse weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn import ops
from tests.harness.generators import Gen
from tests.harness.opspec import Bad, Call
from tests.harness.quantized_calls import bad_fp8

# leading sizes of x, K, N: around the tiles (16, 64, 128, 256 rows; blocks of 128 rows of weight and 512 columns of metadata),
# and what no tile fits
_SIZES: tuple[tuple[tuple[int, ...], int, int], ...] = (
    ((3,), 64, 48),
    ((0,), 64, 16),
    ((65,), 1056, 40),
    ((130,), 544, 136),
    ((5,), 132, 33),
    ((4,), 0, 8),
    ((300,), 512, 136),
)


def sparse_24(gen: Gen, rows: int, columns: int) -> Tensor:
    """(rows, columns) fp32 of which each four have two, one or no numbers other than zero, anywhere."""
    kept = gen.rand(rows, columns // 4, 4).argsort(-1) < 2
    return gen.randn(rows, columns) * (kept & (gen.rand(*kept.shape) < 0.9)).view(rows, columns)


def sparse_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for leading, k, n in (*_SIZES, ((2, 3), 4, 3), ((), 64, 16)):
        values, metadata = ops.pack_sparse_24(sparse_24(gen, n, k).to(dtype))
        call: Call = {"x": gen.randn(*leading, k, dtype=dtype), "values": values, "metadata": metadata}
        yield f"{leading} {k} {n}", call | {"bias": gen.randn(n, dtype=dtype) if k % 64 == 0 else None}


def sparse_int8_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for (rows,), k, n in _SIZES:
        weight = (sparse_24(gen, n, k) * 40).round().clamp(-128, 127).to(torch.int8)
        values, metadata = ops.pack_sparse_24(weight)
        call: Call = {
            "x": gen.ints(-128, 128, rows, k, dtype=torch.int8),
            "x_scale": gen.rand(rows) * 0.02,
            "values": values,
            "metadata": metadata,
            "weight_scale": gen.rand(n) * 0.01,
            "out_dtype": dtype,
        }
        yield f"{rows} {k} {n}", call | {"bias": gen.randn(n, dtype=dtype) if k % 64 == 0 else None}


def sparse_fp8_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for index, ((rows,), k, n) in enumerate(_SIZES):
        values, metadata = ops.pack_sparse_24((sparse_24(gen, n, k) * 64).to(torch.float8_e4m3fn))
        call: Call = {
            "x": (gen.randn(rows, k) * 64).to(torch.float8_e4m3fn),
            "x_scale": gen.rand(1 if index % 4 == 1 else rows) * 0.02,
            "values": values,
            "metadata": metadata,
            "weight_scale": gen.rand(1 if index % 4 == 2 else n) * 0.01,
            "out_dtype": dtype,
        }
        yield f"{rows} {k} {n}", call | {"bias": gen.randn(n, dtype=dtype) if k % 64 == 0 else None}


def bad_sparse(gen: Gen, base: Call) -> Bad:
    x = base["x"]
    k, n = x.shape[-1], len(base["values"])
    for change in (-4, 4, -2, 1):
        other = torch.cat([x, x], -1)[..., : k + change].contiguous()
        says = (
            (f"(N, {(k + change) // 2})", f"K = {k + change}") if change % 4 == 0 else ("expected K a multiple of 4",)
        )
        yield f"{change:+} columns", {"x": other}, ValueError, says
    shape = tuple(base["metadata"].shape)
    says = ("metadata has shape", f"expected {shape}, from pack_sparse_24", f"with N = {n} and K = {k}")
    for dim in range(3):
        for size in (0, 2 * shape[dim]):
            other_shape = [*shape]
            other_shape[dim] = size
            yield f"metadata {other_shape}", {"metadata": base["metadata"].new_zeros(other_shape)}, ValueError, says


def bad_sparse_int8(gen: Gen, base: Call) -> Bad:
    yield from bad_sparse(gen, base)
    for value in (torch.int8, torch.float64, "float32", None):
        yield f"out_dtype {value}", {"out_dtype": value}, TypeError, ("out_dtype is", "expected")
    one = {name: base[name][:1] for name in ("x_scale", "weight_scale", "bias")}
    values, metadata = ops.pack_sparse_24(base["values"].new_zeros(1, 2**17))
    long = one | {"x": base["x"].new_zeros(1, 2**17), "values": values, "metadata": metadata}
    yield "long sums", long, ValueError, ("x has shape (1, 131072)", "K ≤ 131071")


def bad_sparse_fp8(gen: Gen, base: Call) -> Bad:
    yield from bad_sparse(gen, base)
    yield from bad_fp8(gen, base | {"weight": base["values"]})
