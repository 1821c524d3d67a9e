"""The first half of a gated MLP in one kernel, with a norm inside or without, beside cuBLAS and an activation of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness import formulas
from bench.harness.case import Case, CaseSpec, Context, Family, op_case
from bench.harness.ceilings import Work
from bench.harness.peers import flashinfer, vllm_ops
from fastattn import ops
from fastattn.nn import interleave_gate_up

# 2N × K of Llama 3 8B, Llama 2 7B, Qwen2.5 7B and Llama 3.2 1B.
WEIGHTS = ((28672, 4096), (22016, 4096), (37888, 3584), (16384, 2048))
ROWS = (1, 16, 64, 128, 256, 512, 1024, 4096, 8192)
_QUICK = {(1, 28672, 4096), (64, 28672, 4096), (512, 22016, 4096), (4096, 28672, 4096)}


def gated_linear(context: Context, m: int, n: int, k: int, norm: bool) -> Case:
    """n: rows of weight, of gates and ups together."""
    rng = context.generator(m)
    x = torch.randn(m, k, generator=rng, device=context.device, dtype=torch.bfloat16)
    stacked = torch.randn(n, k, generator=rng, device=context.device, dtype=torch.bfloat16) * k**-0.5
    weight, ones = interleave_gate_up(*stacked.chunk(2)), torch.ones_like(x[0])

    def product() -> Tensor:
        return F.linear(ops.rms_norm(x, ones, 1e-6) if norm else x, stacked)

    def plain() -> Tensor:
        gate, up = product().chunk(2, -1)
        return F.silu(gate) * up

    def vllm() -> Callable[[], Tensor]:
        vllm_ops()
        out = x.new_empty(m, n // 2)

        def call() -> Tensor:
            torch.ops._C.silu_and_mul(out, product())
            return out

        return call

    def infer() -> Callable[[], Tensor]:
        activate = flashinfer("flashinfer.activation").silu_and_mul
        return lambda: activate(product())

    return op_case(
        ops.rms_norm_gated_linear if norm else ops.gated_linear,
        {"x": x, "weight": weight},
        formulas.rms_norm_gated_linear if norm else formulas.gated_linear,
        peers={
            "cublas_swiglu": lambda: lambda: ops.swiglu(product()),
            "cublas_vllm": vllm,
            "cublas_flashinfer": infer,
            "cublas_torch": lambda: plain,
        },
        work=Work(num_bytes=2 * (m * k + n * k + m * n // 2), num_ops=2 * m * n * k),
        config=f"x {m} × {k}, weight {n} × {k}, bf16, SiLU{'; peers with our rms_norm in front' if norm else ''}",
    )


FAMILY = Family(
    "gated_linear",
    "cuda",
    "gated_linear and rms_norm_gated_linear beside cuBLAS and a gated activation behind it",
    tuple(
        CaseSpec(
            f"m{m}_n{n}_k{k}{'_rms' if norm else ''}",
            partial(gated_linear, m=m, n=n, k=k, norm=norm),
            quick=(m, n, k) in _QUICK,
        )
        for norm in (False, True)
        for n, k in WEIGHTS
        for m in ROWS
    ),
)
