"""A norm and the dense layer behind it in one kernel, beside cuBLAS's product alone: what the norm costs, and what adding a
residual and its squares costs the product in front of it."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from bench.families.gemm_bf16 import SMOLLM2, WEIGHTS
from bench.harness import formulas
from bench.harness.case import Case, CaseSpec, Context, Family, op_case
from bench.harness.ceilings import Work
from fastattn import ops

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
_QUICK = {(1, 6144, 4096), (64, 28672, 4096), (512, 6144, 4096), (4096, 4096, 14336)}


def residual_gemm(context: Context, m: int, n: int, k: int) -> Case:
    rng = context.generator(m)
    x = torch.randn(m, k, generator=rng, device=context.device, dtype=torch.bfloat16)
    weight = torch.randn(n, k, generator=rng, device=context.device, dtype=torch.bfloat16) * k**-0.5
    residual = torch.randn(m, n, generator=rng, device=context.device, dtype=torch.bfloat16)
    ones = torch.ones_like(residual[0])

    def ours(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, weight, residual=residual, with_sums=True)[0]

    def gemm_alone() -> None:
        F.linear(x, weight)

    def with_norm() -> None:  # into a copy of the residual, which is added to again and again
        ops.add_rms_norm(F.linear(x, weight), stream, ones, 1e-6)

    stream = residual.clone()
    return op_case(
        ours,
        {"x": x, "weight": weight, "residual": residual},
        formulas.linear,
        peers={"cublas": lambda: gemm_alone, "cublas_add_rms_norm": lambda: with_norm},
        work=Work(num_bytes=2 * (m * k + n * k + 2 * m * n), num_ops=2 * m * n * k),
        config=f"x {m} × {k}, weight {n} × {k}, bf16; cublas without the residual, or with add_rms_norm behind",
    )


def norm_gemm(context: Context, m: int, n: int, k: int, norm: str) -> Case:
    """norm: "rms", "rms_given" with the sums of x's squares given, "layer"."""
    rng = context.generator(m)
    x = torch.randn(m, k, generator=rng, device=context.device, dtype=torch.bfloat16)
    weight = torch.randn(n, k, generator=rng, device=context.device, dtype=torch.bfloat16) * k**-0.5
    call = {"x": x, "weight": weight}
    if norm == "layer":
        call["weight_sum"] = weight.sum(1, dtype=torch.float64).float()
    if norm == "rms_given":
        call["sums_of_squares"] = x.float().square().view(m, -1, 32).sum(-1)

    def gemm_alone() -> None:  # its result is another one: there is nothing to compare
        F.linear(x, weight)

    def torch_norm(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (k,)) if norm == "layer" else F.rms_norm(x, (k,), eps=1e-6)

    return op_case(
        ops.layer_norm_linear if norm == "layer" else ops.rms_norm_linear,
        call,
        formulas.layer_norm_linear if norm == "layer" else formulas.rms_norm_linear,
        peers={"cublas": lambda: gemm_alone, "torch": lambda: lambda: F.linear(torch_norm(x), weight)},
        work=Work(num_bytes=2 * (m * k + n * k + m * n), num_ops=2 * m * n * k),
        config=f"x {m} × {k}, weight {n} × {k}, bf16; cublas without the norm",
    )


FAMILY = Family(
    "norm_gemm",
    "cuda",
    "rms_norm_linear, layer_norm_linear and linear with a residual beside cuBLAS's product alone",
    tuple(
        CaseSpec(f"m{m}_n{n}_k{k}_{norm}", partial(norm_gemm, m=m, n=n, k=k, norm=norm), quick=(m, n, k) in _QUICK)
        for norm in ("rms", "rms_given", "layer")
        for n, k in (*WEIGHTS, *SMOLLM2)
        for m in ROWS
    )
    + tuple(
        CaseSpec(f"m{m}_n{n}_k{k}_residual", partial(residual_gemm, m=m, n=n, k=k), quick=(m, n, k) in _QUICK)
        for n, k in (*WEIGHTS, *SMOLLM2)
        for m in ROWS
    ),
)
