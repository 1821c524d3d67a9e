"""Dense layers with 2:4 sparse weights in bf16, int8 and fp8, beside our own of the same weight and torch's (cuSPARSELt): the projections of gemm_bf16.

Weights are packed and rows quantized before it. Operations are those of the numbers that are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.families.gemm_bf16 import ROWS, WEIGHTS
from bench.harness import accuracy, formulas
from bench.harness.case import Case, CaseSpec, Checked, Context, Family, PeerBuilder, op_case
from bench.harness.ceilings import Work
from fastattn import ops

BF16 = torch.bfloat16
KINDS = ("bf16", "int8", "fp8")
_QUICK = {(1, 6144, 4096), (64, 28672, 4096), (1024, 4096, 14336)}


def case(context: Context, kind: str, m: int, n: int, k: int) -> Case:
    rng = context.generator(m)

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, k, generator=rng, device=context.device).to(BF16)

    x, weight = draw(m), draw(n)
    kept = torch.rand(n, k // 4, 4, generator=rng, device=context.device).argsort(-1) < 2
    weight *= kept.view(n, k)
    peers: dict[str, PeerBuilder] = {}
    call: dict[str, Any]
    if kind == "bf16":
        values, metadata = ops.pack_sparse_24(weight)
        call = {"x": x, "values": values, "metadata": metadata}
        op: Callable[..., Tensor] = ops.sparse_linear
        formula, rate = formulas.sparse_linear, "bf16_tflop_s"
        peers = {"dense": lambda: lambda: ops.linear(x, weight)}
        if x.is_cuda:
            peers["cusparselt"] = lambda: _cusparselt(x, weight)
    else:
        quantize = ops.quantize_int8 if kind == "int8" else ops.quantize_fp8
        (q, x_scale), (weight_q, weight_scale) = quantize(x), quantize(weight)
        values, metadata = ops.pack_sparse_24(weight_q)
        call = {"x": q, "x_scale": x_scale, "values": values, "metadata": metadata, "weight_scale": weight_scale}
        call["out_dtype"] = BF16
        op, dense = (
            (ops.sparse_int8_linear, ops.int8_linear) if kind == "int8" else (ops.sparse_fp8_linear, ops.fp8_linear)
        )
        formula = formulas.sparse_int8_linear if kind == "int8" else formulas.sparse_fp8_linear
        rate = "int8_top_s" if kind == "int8" else "fp8_tflop_s"
        peers = {"dense": lambda: lambda: dense(q, x_scale, weight_q, weight_scale, out_dtype=BF16)}

    def judge(call: dict[str, Any], results: list[Tensor]) -> Checked:
        """Sums in fp64, rounded once: the best there is."""
        (exact,) = formula(torch.float64, **call)
        return Checked(accuracy.check_results(op.__name__, results, [exact], [exact.to(BF16)]), exact)

    num_bytes = sum(t.nbytes for t in call.values() if isinstance(t, Tensor)) + 2 * m * n
    return op_case(
        op,
        call,
        formula,
        peers=peers,
        work=Work(num_bytes=num_bytes, num_ops=m * n * k, rate=rate),
        config=f"x {m} × {k}, weight {n} × {k}, two of four stored, {call['x'].dtype}",
        judge=judge,
    )


def _cusparselt(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    sparse = torch.sparse.to_sparse_semi_structured(weight)  # type: ignore[no-untyped-call]
    return lambda: torch.nn.functional.linear(x, sparse)


def _specs() -> Iterator[CaseSpec]:
    for kind in KINDS:
        for n, k in WEIGHTS:
            for m in ROWS:
                name = f"m{m}_n{n}_k{k}_{kind}"
                yield CaseSpec(name, partial(case, kind=kind, m=m, n=n, k=k), quick=(m, n, k) in _QUICK)


FAMILY = Family(
    "gemm_sparse", "cuda", "products with 2:4 sparse weights beside dense ones and torch's", tuple(_specs())
)
