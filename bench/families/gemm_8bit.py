"""Dense layers in 8 bits, with a scale a token and one an output channel, or those of blocks, beside torch and vLLM's CUTLASS: the projections of gemm_bf16.

Times are of the product alone: rows are quantized before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.families.gemm_bf16 import ROWS, SMOLLM2, WEIGHTS
from bench.harness import accuracy, formulas
from bench.harness.case import Case, CaseSpec, Checked, Context, Family, PeerBuilder, op_case
from bench.harness.ceilings import Work
from bench.harness.peers import vllm_ops
from fastattn import ops

BF16 = torch.bfloat16
_QUICK = {(1, 6144, 4096), (64, 28672, 4096), (512, 6144, 4096), (4096, 4096, 14336)}


def _case(
    op: Callable[..., Tensor],
    formula: Callable[..., list[Tensor]],
    call: dict[str, Any],
    peers: dict[str, PeerBuilder],
    rate: str,
) -> Case:
    (m, k), n = call["x"].shape, len(call["weight"])
    scales_bytes = 4 * (call["x_scale"].numel() + call["weight_scale"].numel())

    def judge(call: dict[str, Any], results: list[Tensor]) -> Checked:
        """Sums in fp64, rounded once: the best there is."""
        (exact,) = formula(torch.float64, **call)
        return Checked(accuracy.check_results(op.__name__, results, [exact], [exact.to(BF16)]), exact)

    return op_case(
        op,
        call | {"out_dtype": BF16},
        formula,
        peers={"vllm": lambda: _vllm(call), **peers},
        work=Work(num_bytes=m * k + n * k + 2 * m * n + scales_bytes, num_ops=2 * m * n * k, rate=rate),
        config=f"x {m} × {k}, weight {n} × {k}, {call['x'].dtype}",
        judge=judge,
    )


def _vllm(call: dict[str, Any]) -> Callable[[], Tensor]:
    product, weight = vllm_ops().cutlass_scaled_mm, call["weight"].t()
    scales = call["x_scale"][:, None], call["weight_scale"][None]
    return lambda: product(call["x"], weight, *scales, BF16)


def int8(context: Context, m: int, n: int, k: int) -> Case:
    rng = context.generator(m)
    x = torch.randint(-127, 128, (m, k), generator=rng, device=context.device, dtype=torch.int8)
    # On CPUs without VNNI torch's product saturates what two products of 8 bits can add up to.
    largest = 127 if context.device.type == "cuda" else 63
    weight = torch.randint(-largest, largest + 1, (n, k), generator=rng, device=context.device, dtype=torch.int8)
    x_scale, weight_scale = (torch.rand(rows, generator=rng, device=context.device) * 0.01 for rows in (m, n))

    def int_mm() -> Callable[[], Tensor]:
        columns = weight.t()
        return lambda: (torch._int_mm(x, columns) * x_scale[:, None] * weight_scale).to(BF16)

    call = {"x": x, "x_scale": x_scale, "weight": weight, "weight_scale": weight_scale}
    return _case(ops.int8_linear, formulas.int8_linear, call, {"int_mm": int_mm}, "int8_top_s")


def fp8(context: Context, m: int, n: int, k: int) -> Case:
    rng = context.generator(m)
    quantized = [
        ops.quantize_fp8(torch.randn(rows, k, generator=rng, device=context.device).to(BF16)) for rows in (m, n)
    ]
    (x, x_scale), (weight, weight_scale) = quantized

    def scaled_mm() -> Callable[[], Tensor]:
        columns, scales = weight.t(), (x_scale[:, None], weight_scale[None])
        return lambda: torch._scaled_mm(x, columns, *scales, out_dtype=BF16, use_fast_accum=False)

    call = {"x": x, "x_scale": x_scale, "weight": weight, "weight_scale": weight_scale}
    return _case(ops.fp8_linear, formulas.fp8_linear, call, {"scaled_mm": scaled_mm}, "fp8_tflop_s")


def fp8_blocks(context: Context, m: int, n: int, k: int) -> Case:
    """The peer as vLLM's layers call it: scales of x column-major, of rows that are a multiple of 4."""
    rng = context.generator(m)
    x, x_scale = ops.quantize_fp8_groups(torch.randn(m, k, generator=rng, device=context.device).to(BF16))
    weight, _ = ops.quantize_fp8(torch.randn(n, k, generator=rng, device=context.device).to(BF16))
    weight_scale = torch.rand(-(-n // 128), -(-k // 128), generator=rng, device=context.device) * 0.01 + 0.001
    call = {"x": x, "x_scale": x_scale, "weight": weight, "weight_scale": weight_scale}

    def vllm() -> Callable[[], Tensor]:
        product, padding = vllm_ops().cutlass_scaled_mm, (0, -m % 4)
        rows = torch.nn.functional.pad(x.view(torch.uint8), (0, 0, *padding)).view(x.dtype)
        scales = torch.nn.functional.pad(x_scale, padding).t(), weight_scale.t()
        return lambda: product(rows, weight.t(), *scales, BF16)[:m]

    return _case(ops.fp8_block_linear, formulas.fp8_block_linear, call, {"vllm": vllm}, "fp8_tflop_s")


def _specs(build: Callable[..., Case]) -> Iterator[CaseSpec]:
    for n, k in (*WEIGHTS, *SMOLLM2):
        for m in ROWS:
            yield CaseSpec(f"m{m}_n{n}_k{k}", partial(build, m=m, n=n, k=k), quick=(m, n, k) in _QUICK)


INT8 = Family("gemm_int8", "cuda", "int8_linear beside torch._int_mm and CUTLASS", tuple(_specs(int8)))
FP8_BLOCKS = Family(
    "gemm_fp8_block", "cuda", "fp8_block_linear beside CUTLASS as vLLM calls it", tuple(_specs(fp8_blocks))
)
FP8 = Family("gemm_fp8", "cuda", "fp8_linear beside torch._scaled_mm and CUTLASS", tuple(_specs(fp8)))
