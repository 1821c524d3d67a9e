"""Valid and bad calls of the operators on numbers of few bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tests.harness.generators import Gen
from tests.harness.opspec import Bad, Call

# leading sizes of x, K, N: around the tiles (16, 64, 128 rows; steps of 32 to 256 columns), and what no tile fits
_SIZES: tuple[tuple[tuple[int, ...], int, int], ...] = (
    ((3,), 64, 48),
    ((1,), 576, 96),
    ((0,), 64, 16),
    ((17,), 160, 65),
    ((65,), 1056, 39),
    ((130,), 320, 40),
    ((5,), 129, 33),
    ((2,), 7, 3),
    ((4,), 0, 8),
)

# Weights of 4 bits: also without leading dimensions, with K to be shared out and rows beyond a tile of Hopper's kernel for few
# rows, and with the rows of its kernel for many.
_FOUR_BIT_SIZES = (
    *_SIZES,
    ((2, 3), 96, 20),
    ((), 64, 16),
    ((33,), 2048, 264),
    ((200,), 1088, 136),
    ((257,), 192, 72),
    ((521,), 640, 328),
)


# In 8 bits also more rows than a kernel for few of them has.
_SIZES_8BIT = (*_SIZES, ((300,), 512, 264))


def quantize_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for rows, columns in ((3, 64), (1, 8), (0, 16), (65, 129), (7, 1), (4, 9000), (3, 0)):
        yield f"{(rows, columns)}", {"x": gen.randn(rows, columns, dtype=dtype)}
    hostile = gen.randn(6, 40, dtype=dtype)
    hostile[0] = 0
    hostile[1, 3] = torch.finfo(dtype).max
    hostile[2] *= torch.finfo(dtype).tiny
    hostile[3, 1] = torch.nan
    hostile[4, 2] = -torch.inf
    hostile[5] = torch.arange(-20, 20)  # ties
    yield "hostile", {"x": hostile}


def verify_quantize_int8(call: Call, results: list[Tensor]) -> None:
    _verify_quantize(call, results, torch.int8, 127)
    q = results[0]
    assert q.numel() == 0 or int(q.min()) >= -127
    assert not bool(q[call["x"].isnan()].any())


def verify_quantize_fp8(call: Call, results: list[Tensor]) -> None:
    _verify_quantize(call, results, torch.float8_e4m3fn, 448)


def verify_quantize_int8_asymmetric(call: Call, results: list[Tensor]) -> None:
    """0 is a code, and the row's ends are near the codes' ends: then a value is off by half a step, of an end by a little more."""
    x, (q, scale, zero_point) = call["x"].double(), results
    assert q.dtype is torch.int8 and scale.dtype is torch.float32 and zero_point.dtype is torch.int32
    assert q.shape == x.shape and scale.shape == zero_point.shape == x.shape[:1]
    finite = x.isfinite().all(1)
    ends = torch.cat([x, x.new_zeros(len(x), 1)], 1).aminmax(dim=1)
    # Where fp32 has no number for the range, the row counts as one with an infinity.
    finite &= (ends.max - ends.min).float().isfinite()
    expected = torch.where(ends.max == ends.min, 1.0, (ends.max - ends.min) / 255)
    assert not bool(scale[~finite].isfinite().any())
    assert bool((q == zero_point[:, None])[~finite].all())
    torch.testing.assert_close(scale[finite].double(), expected[finite], rtol=1e-6, atol=2e-45)
    assert bool(((zero_point >= -128) & (zero_point <= 127)).all())
    off = ((q.double() - zero_point[:, None]) - x / scale.double()[:, None])[finite].abs()
    # A scale below fp32's normal numbers is coarse, and what it divides may leave the codes.
    coarse = (scale[finite] < 2**-120)[:, None]
    assert bool((off <= torch.where(coarse, 260.0, 1.0 + 2e-4)).all())
    assert bool((off <= 0.5 + 2e-4)[(q[finite] > -128) & (q[finite] < 127) & ~coarse].all())


def quantize_group_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    yield from quantize_calls(gen, dtype)
    for rows, columns in ((5, 512), (33, 264), (2, 257)):  # more groups than one, the last one whole, of 8 and of 1
        yield f"{(rows, columns)}", {"x": gen.randn(rows, columns, dtype=dtype)}


def verify_quantize_fp8_groups(call: Call, results: list[Tensor]) -> None:
    """Each group of columns as a row of its own."""
    x, (q, scale) = call["x"], results
    assert q.shape == x.shape and scale.shape == (-(-x.shape[1] // 128), x.shape[0])
    for group, (x_part, q_part) in enumerate(zip(x.split(128, 1), q.split(128, 1), strict=True)):
        if x.shape[1]:  # split gives a part of no columns
            verify_quantize_fp8({"x": x_part}, [q_part, scale[group]])


def _verify_quantize(call: Call, results: list[Tensor], dtype: torch.dtype, largest: int) -> None:
    """scale and q are those of their definition; a q is off by at most half a step, whichever way a tie went."""
    x, (q, scale) = call["x"].double(), results
    finite = x.isfinite().all(1)
    amax = x.abs().amax(1) if x.shape[1] else torch.zeros(x.shape[0], dtype=torch.float64)
    expected = torch.where(amax == 0, 1.0, amax / largest)
    assert q.dtype is dtype and scale.dtype is torch.float32 and q.shape == x.shape and scale.shape == x.shape[:1]
    assert not bool(scale[~finite].isfinite().any())
    torch.testing.assert_close(scale[finite].double(), expected[finite], rtol=1e-6, atol=2e-45)
    exact = (x / scale.double()[:, None])[finite]
    # e4m3 has three bits behind the first one, and below 2^-6 steps of 2^-9.
    half_step = 0.5 if dtype is torch.int8 else exact.abs().clamp(2**-6, largest).log2().floor().exp2() / 16
    off = (q.double()[finite] - exact.clamp(-largest, largest)).abs()
    assert bool((off <= half_step * (1 + 2e-4)).all())


def rms_norm_quantize_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for rows, columns in ((3, 64), (1, 8), (0, 16), (65, 129), (7, 1), (4, 9000), (2, 17000), (3, 0)):
        x, residual = (gen.randn(rows, columns, dtype=dtype) for _ in range(2))
        yield (
            f"{(rows, columns)}",
            {"x": x, "residual": residual, "weight": gen.randn(columns, dtype=dtype), "eps": 1e-5},
        )
    x = gen.randn(2, 40, dtype=dtype)
    yield "zeros", {"x": x, "residual": -x, "weight": gen.randn(40, dtype=dtype), "eps": 1e-6}


def verify_rms_norm_quantize_int8(call: Call, results: list[Tensor]) -> None:
    _verify_rms_norm_quantize(call, results, torch.int8, 127)


def verify_rms_norm_quantize_fp8(call: Call, results: list[Tensor]) -> None:
    _verify_rms_norm_quantize(call, results, torch.float8_e4m3fn, 448)


def _verify_rms_norm_quantize(call: Call, results: list[Tensor], dtype: torch.dtype, largest: int) -> None:
    """The residual is what `add_rms_norm` leaves, and a code is that of the exact norm but for a rounding to x's dtype before."""
    x, weight, (q, scale, residual) = call["x"], call["weight"].double(), results
    total, rounding = residual.double(), torch.finfo(x.dtype).eps / 2
    torch.testing.assert_close(total, x.double() + call["residual"].double(), rtol=rounding, atol=0)
    assert q.dtype is dtype and scale.dtype is torch.float32 and q.shape == x.shape and scale.shape == x.shape[:1]
    norm = total / (total.pow(2).mean(1, keepdim=True) + call["eps"]).sqrt() * weight
    off = rounding + 1e-6  # of a norm's element, relative
    amax = norm.abs().amax(1) if x.shape[1] else torch.zeros(x.shape[0], dtype=torch.float64)
    expected = torch.where(amax == 0, 1.0, amax / largest)
    torch.testing.assert_close(scale.double(), expected, rtol=off, atol=0)
    exact = norm / scale.double()[:, None]
    half_step = (
        0.5 if dtype is torch.int8 else (exact.abs() * (1 + off)).clamp(2**-6, largest).log2().floor().exp2() / 16
    )
    assert bool(((q.double() - exact).abs() <= (half_step + off * exact.abs()) * (1 + 1e-6)).all())


def bad_quantize(gen: Gen, base: Call) -> Bad:
    x = base["x"]
    for t in (x[0], x[None], x[None, None], x[None, None, None]):
        yield f"{t.dim()} dimensions", {"x": t}, ValueError, (f"x has {t.dim()} dimensions", "expected")
    for dtype in (torch.int16, torch.uint8, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2):
        yield f"{dtype}", {"x": x.to(dtype)}, TypeError, ("x is", str(dtype))
    yield "transposed", {"x": x.t().contiguous().t()}, ValueError, ("x has strides",)
    yield "sparse rows", {"x": x.to_sparse_csr()}, ValueError, ("x has layout", "sparse_csr")
    yield "every third element", {"x": x[:, ::3]}, ValueError, ("x has strides",)
    for value in (x.shape, Tensor, b"x", {1.0}, range(3), lambda: x, NotImplemented, bytearray(1), frozenset(), 1j):
        yield f"{value!r}", {"x": value}, TypeError, ("x is a", "expected a torch.Tensor")
    odd = x[:, : x.shape[1] // 2 * 2 - 1]
    yield "an odd half", {"x": odd, "activation": "silu"}, ValueError, ("x has shape", "2K")
    for name in ("relu", "", "SiLU", 1):
        yield f"activation {name!r}", {"activation": name}, ValueError, (f"activation is {name!r}", "'silu'", "None")
    yield "meta, one row", {"x": x[:1].to("meta")}, ValueError, ("x is on meta",)
    yield "one row, grad", {"x": x[:1].clone().requires_grad_()}, ValueError, ("x requires grad",)


def _activations(n: int) -> tuple[str, ...]:
    """Of so many rows of gates and ups together."""
    return () if n % 2 else ("silu", "gelu_tanh", "gelu") if n >= 40 else ("silu",)


def _bad_gates(base: Call) -> Bad:
    for name in ("relu", "", "SiLU", 1):
        yield f"activation {name!r}", {"activation": name}, ValueError, (f"activation is {name!r}", "'silu'", "None")
    odd = {
        name: None if base.get(name) is None else base[name][:-1].clone() for name in ("weight", "weight_scale", "bias")
    }
    odd |= {"activation": "silu"} | ({"weight_sum": base["weight_sum"][:-1].clone()} if "weight_sum" in base else {})
    yield "a gate without its up", odd, ValueError, ("weight has shape", "2N", "even")


_SYMMETRIC: Call = {"x_zero_point": None, "weight_sum": None}


def int8_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for (rows,), k, n in _SIZES_8BIT:
        call: Call = {
            "x": gen.ints(-128, 128, rows, k, dtype=torch.int8),
            "x_scale": gen.rand(rows) * 0.02,
            "weight": gen.ints(-128, 128, n, k, dtype=torch.int8),
            "weight_scale": gen.rand(n) * 0.01,
            "out_dtype": dtype,
        }
        zero: Call = {
            "x_zero_point": gen.ints(-128, 128, rows, dtype=torch.int32),
            "weight_sum": call["weight"].sum(1, dtype=torch.int32),
        }
        yield f"{rows} {k} {n} zero points", call | zero | {"bias": gen.randn(n, dtype=dtype)}
        yield f"{rows} {k} {n}", call | _SYMMETRIC | {"bias": gen.randn(n, dtype=dtype)}
        yield f"{rows} {k} {n} no bias", call | _SYMMETRIC | {"bias": None}
        for activation in _activations(n):
            yield (
                f"{rows} {k} {n} {activation}",
                call | zero | {"bias": gen.randn(n, dtype=dtype), "activation": activation},
            )
            yield f"{rows} {k} {n} {activation} no bias", call | _SYMMETRIC | {"bias": None, "activation": activation}
    of_all = {"x_scale": gen.rand(1) * 0.02, "x_zero_point": gen.ints(-128, 128, 1, dtype=torch.int32)}
    yield "one scale and zero point", call | zero | of_all | {"weight_scale": gen.rand(1) * 0.01, "bias": None}


def bad_int8(gen: Gen, base: Call) -> Bad:
    for value in (torch.int8, torch.float64, torch.int32, "float32", None, float):
        yield f"out_dtype {value}", {"out_dtype": value}, TypeError, ("out_dtype is", "expected")
    other = torch.float16 if base["out_dtype"] is not torch.float16 else torch.bfloat16
    yield "bias of another dtype", {"bias": base["bias"].to(other)}, TypeError, ("bias is", "as out_dtype")
    long = {name: base[name].new_zeros(1, 2**17) for name in ("x", "weight")}
    scales = {name: base[name][:1] for name in ("x_scale", "weight_scale", "bias")}
    yield "long sums", long | scales | _SYMMETRIC, ValueError, ("x has shape (1, 131072)", "K ≤ 131071")
    one = torch.zeros(1, dtype=torch.int32, device=base["x"].device)
    half = {name: t[:, : 2**16] for name, t in long.items()} | scales
    half |= {"x_zero_point": one, "weight_sum": one}
    yield "long sums with zero points", half, ValueError, ("x has shape (1, 65536)", "K ≤ 65535 with x_zero_point")
    for name, other in (("x_zero_point", "weight_sum"), ("weight_sum", "x_zero_point")):
        yield f"{name} alone", {other: None}, ValueError, (f"{name} is given and {other} is None", "both or neither")
    for name, rows in (("x_scale", len(base["x"])), ("weight_scale", len(base["weight"]))):
        for size in (0, 2, rows - 1, rows + 1):
            if size not in (1, rows):
                says = (f"{name} has shape ({size},)", "or (1,)", f"= {rows}")
                yield f"{name} of {size}", _SYMMETRIC | {name: base["x_scale"].new_ones(size)}, ValueError, says


def bad_int8_linear(gen: Gen, base: Call) -> Bad:
    yield from bad_int8(gen, base)
    yield from _bad_gates(base)


def fp8_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for index, ((rows,), k, n) in enumerate(_SIZES_8BIT):
        call: Call = {
            "x": (gen.randn(rows, k) * 64).to(torch.float8_e4m3fn),
            "x_scale": gen.rand(1 if index % 4 == 1 else rows) * 0.02,
            "weight": (gen.randn(n, k) * 64).to(torch.float8_e4m3fn),
            "weight_scale": gen.rand(1 if index % 4 == 2 else n) * 0.01,
            "out_dtype": dtype,
        }
        yield f"{rows} {k} {n}", call | {"bias": gen.randn(n, dtype=dtype), "batch_invariant": True}
        yield f"{rows} {k} {n} no bias", call | {"bias": None}
        for activation in _activations(n):
            gates = call | {"activation": activation, "bias": gen.randn(n, dtype=dtype)}
            yield f"{rows} {k} {n} {activation}", gates | {"batch_invariant": True}
            yield f"{rows} {k} {n} {activation} no bias", gates | {"bias": None}


def bad_fp8(gen: Gen, base: Call) -> Bad:
    for value in (torch.float8_e4m3fn, torch.float64, torch.int32, "float32", None, float):
        yield f"out_dtype {value}", {"out_dtype": value}, TypeError, ("out_dtype is", "expected")
    other = torch.float16 if base["out_dtype"] is not torch.float16 else torch.bfloat16
    yield "bias of another dtype", {"bias": base["bias"].to(other)}, TypeError, ("bias is", "as out_dtype")
    for name, rows in (("x_scale", len(base["x"])), ("weight_scale", len(base["weight"]))):
        for size in (0, 2, rows - 1, rows + 1):
            if size not in (1, rows):
                says = (f"{name} has shape ({size},)", "or (1,)", f"= {rows}")
                yield f"{name} of {size}", {name: base["x_scale"].new_ones(size)}, ValueError, says


def bad_fp8_linear(gen: Gen, base: Call) -> Bad:
    yield from bad_fp8(gen, base)
    yield from _bad_gates(base)


def fp8_block_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    # Blocks cut short in N, in K and in both; more of each than a tile has; what the plain kernel takes.
    sizes = ((3, 64, 48), (0, 64, 16), (4, 0, 8), (5, 129, 33), (17, 160, 65), (7, 400, 200), (40, 1168, 392))
    for rows, k, n in (*sizes, (200, 256, 144), (300, 512, 264)):
        call: Call = {
            "x": (gen.randn(rows, k) * 64).to(torch.float8_e4m3fn),
            "x_scale": gen.rand(-(-k // 128), rows) * 0.02,
            "weight": (gen.randn(n, k) * 64).to(torch.float8_e4m3fn),
            "weight_scale": gen.rand(-(-n // 128), -(-k // 128)) * 0.01,
            "out_dtype": dtype,
        }
        yield f"{rows} {k} {n}", call | {"bias": gen.randn(n, dtype=dtype)}
        yield f"{rows} {k} {n} no bias", call | {"bias": None}


def bad_fp8_blocks(gen: Gen, base: Call) -> Bad:
    for value in (torch.float8_e4m3fn, torch.float64, torch.int32, "float32", None, float):
        yield f"out_dtype {value}", {"out_dtype": value}, TypeError, ("out_dtype is", "expected")
    other = torch.float16 if base["out_dtype"] is not torch.float16 else torch.bfloat16
    yield "bias of another dtype", {"bias": base["bias"].to(other)}, TypeError, ("bias is", "as out_dtype")
    for name, dim in (("x_scale", 0), ("weight_scale", 0), ("weight_scale", 1)):
        scale = base[name]
        says = (f"{name} has shape", f"expected {tuple(scale.shape)}", "128")
        yield f"{name} grown in {dim}", {name: torch.cat([scale, scale], dim)}, ValueError, says
    k, n = base["x"].shape[1], len(base["weight"])
    rows = {"weight": base["weight"].new_zeros(n + 128, k), "bias": base["bias"].new_zeros(n + 128)}
    yield "rows of another block", rows, ValueError, ("weight_scale has shape", "expected (2, 1)")


def _sized(gen: Gen, dtype: torch.dtype, leading: tuple[int, ...], k: int, n: int) -> Iterator[tuple[str, Call]]:
    name = f"{leading} {k} {n}"
    x = gen.randn(*leading, k, dtype=dtype)
    yield name, {"x": x, "bias": gen.randn(n, dtype=dtype)}
    yield f"{name} no bias", {"x": x, "bias": None}


def int4_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for index, (leading, k, n) in enumerate(_FOUR_BIT_SIZES):
        # 32 and 64 go through the fast kernels and 24 through the plain one; a group may be longer than K
        group = (32, 64, 32, 32, 96, 128, 24, 3, 16, 1000, 24, 128, 64, 64, 128)[index]
        for with_zero, (name, call) in enumerate(_sized(gen, dtype, leading, k, n)):
            groups = -(-k // group)
            call |= {
                "weight_packed": gen.ints(-(2**31), 2**31, n, -(-k // 8)),
                "weight_scale": (gen.rand(n, groups) * 0.1).to(dtype),
                "group_size": group,
                "zero_point": gen.ints(-8, 8, n, groups, dtype=torch.int8) if (with_zero + index) % 2 == 0 else None,
            }
            yield f"{name} groups of {group}", call


def _bad_packed(base: Call, per_element: int) -> Bad:
    packed, scale, x = base["weight_packed"], base["weight_scale"], base["x"]
    for change in (-1, 1):
        wide = torch.cat([packed, packed], 1)[:, : packed.shape[1] + change]
        says = ("weight_packed has shape", f"expected (N, {packed.shape[1]}): {per_element} columns to an element")
        yield f"weight_packed {change:+}", {"weight_packed": wide}, ValueError, (*says, f"K = {x.shape[-1]}")
    long = torch.cat([x, x[..., :1]], -1)
    yield "one column more", {"x": long}, ValueError, ("weight_packed has shape", f"K = {long.shape[-1]}", "expected")
    grown = torch.cat([scale, scale], 1)
    others = {name: torch.cat([base[name]] * 2, 1) for name in ("zero_point",) if base.get(name) is not None}
    says = ("weight_scale has shape", f"expected (N, {scale.shape[1]})", "columns to an element")
    yield "twice the groups", {"weight_scale": grown} | others, ValueError, says


def bad_int4(gen: Gen, base: Call) -> Bad:
    yield from _bad_packed(base, 8)
    groups = base["weight_scale"].shape[1]
    for size in (1, 7, base["x"].shape[-1]):
        yield f"group_size {size}", {"group_size": size}, ValueError, ("weight_scale", f"{size} columns", str(groups))


def fp4_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for group in (16, 32):
        for index, (leading, k, n) in enumerate(_FOUR_BIT_SIZES):
            for with_global, (name, call) in enumerate(_sized(gen, dtype, leading, k, n)):
                groups = -(-k // group)
                # every finite e4m3 from 0 to 448; powers of two that fp16 can hold with their products
                bits = gen.ints(0, 127, n, groups) if group == 16 else gen.ints(110, 132, n, groups)
                call |= {
                    "weight_packed": gen.ints(0, 256, n, -(-k // 2), dtype=torch.uint8),
                    "weight_scale": bits.to(torch.uint8),
                    "group_size": group,
                    "global_scale": gen.rand(n) * 100 + 50 if (with_global + index) % 2 == 0 else None,
                }
                if (
                    dtype is torch.float16 and call["global_scale"] is None
                ):  # results of thousands of 6 · 448 leave fp16
                    call["weight_scale"] = call["weight_scale"] // 2
                yield f"{name} groups of {group}", call


def bad_fp4(gen: Gen, base: Call) -> Bad:
    yield from _bad_packed(base, 2)
    for size in (1, 8, 64, 128, 576):
        yield f"group_size {size}", {"group_size": size}, ValueError, (f"group_size is {size}", "16", "32")
    yield "the other group_size", {"group_size": 48 - base["group_size"]}, ValueError, ()


def fp4_fp8_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for group in (16, 32):
        for index, ((rows,), k, n) in enumerate(_SIZES_8BIT):
            groups = -(-k // group)
            # e4m3 from 0.25 to 7.5; powers of two, some far below the others
            low, high = (40, 80) if group == 16 else (101, 121)
            call: Call = {
                "x": (gen.randn(rows, k) * 64).to(torch.float8_e4m3fn),
                "x_scale": gen.rand(1 if index % 4 == 1 else rows) * 0.02,
                "weight_packed": gen.ints(0, 256, n, -(-k // 2), dtype=torch.uint8),
                "weight_scale": gen.ints(low, high, n, groups).to(torch.uint8),
                "group_size": group,
                "global_scale": gen.rand(n) * 10 + 5 if index % 2 == 0 else None,
                "out_dtype": dtype,
                "fast_accum": index % 3 == 0,
            }
            yield f"{rows} {k} {n} groups of {group}", call | {"bias": gen.randn(n, dtype=dtype)}
            yield f"{rows} {k} {n} groups of {group} no bias", call | {"bias": None}


def bad_fp4_fp8(gen: Gen, base: Call) -> Bad:
    yield from _bad_packed(base, 2)
    for value in (torch.float8_e4m3fn, torch.float64, torch.int32, "float32", None, float):
        yield f"out_dtype {value}", {"out_dtype": value}, TypeError, ("out_dtype is", "expected")
    other = torch.float16 if base["out_dtype"] is not torch.float16 else torch.bfloat16
    yield "bias of another dtype", {"bias": base["bias"].to(other)}, TypeError, ("bias is", "as out_dtype")
    rows = len(base["x"])
    for size in (0, 2, rows - 1, rows + 1):
        if size not in (1, rows):
            says = (f"x_scale has shape ({size},)", "or (1,)", f"= {rows}")
            yield f"x_scale of {size}", {"x_scale": base["x_scale"].new_ones(size)}, ValueError, says
    for size in (1, 8, 64, 128, 576):
        yield f"group_size {size}", {"group_size": size}, ValueError, (f"group_size is {size}", "16", "32")
    yield "the other group_size", {"group_size": 48 - base["group_size"]}, ValueError, ()
