"""Dense layers in bf16 beside cuBLAS: the projections of an 8B-class decoder and of SmolLM2, from one token to a long prefill."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from bench.harness import formulas
from bench.harness.case import Case, CaseSpec, Context, Family, op_case
from bench.harness.ceilings import Work
from fastattn import ops

# N × K: QKV, gate + up, down, and a square one.
WEIGHTS = ((6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192))
SMOLLM2 = ((960, 576), (576, 576), (3072, 576), (576, 1536))  # 135M: QKV, output, gate + up, down
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
_QUICK = {(1, 6144, 4096), (64, 28672, 4096), (512, 6144, 4096), (4096, 4096, 14336)}


def gemm(context: Context, m: int, n: int, k: int) -> Case:
    rng = context.generator(m)
    x = torch.randn(m, k, generator=rng, device=context.device, dtype=torch.bfloat16)
    weight = torch.randn(n, k, generator=rng, device=context.device, dtype=torch.bfloat16) * k**-0.5
    return op_case(
        ops.linear,
        {"x": x, "weight": weight},
        formulas.linear,
        peers={"cublas": lambda: lambda: F.linear(x, weight)},
        work=Work(num_bytes=2 * (m * k + n * k + m * n), num_ops=2 * m * n * k),
        config=f"x {m} × {k}, weight {n} × {k}, bf16",
    )


FAMILY = Family(
    "gemm_bf16",
    "cuda",
    "linear in bf16 beside cuBLAS",
    tuple(
        CaseSpec(f"m{m}_n{n}_k{k}", partial(gemm, m=m, n=n, k=k), quick=(m, n, k) in _QUICK)
        for n, k in (*WEIGHTS, *SMOLLM2)
        for m in ROWS
    ),
)
