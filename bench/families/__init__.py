"""The families by name. Building their cases is left to the run; here are ids alone."""

from __future__ import annotations

from bench.families import (
    cascade,
    engine,
    engine_cpu,
    engine_gpu,
    flash_bwd,
    flash_fwd,
    flash_fwd_fp8,
    flash_sm80,
    gated_linear,
    gemm_8bit,
    gemm_bf16,
    gemm_fp4,
    gemm_sparse,
    host,
    lm_head,
    norm_gemm,
    paged,
    small_ops,
    speculation,
)
from bench.harness.case import Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        small_ops.FAMILY,
        gemm_bf16.FAMILY,
        gemm_8bit.INT8,
        gemm_8bit.FP8,
        gemm_8bit.FP8_BLOCKS,
        gemm_fp4.FAMILY,
        gemm_sparse.FAMILY,
        norm_gemm.FAMILY,
        gated_linear.FAMILY,
        lm_head.FAMILY,
        flash_fwd.FAMILY,
        flash_fwd_fp8.FAMILY,
        flash_bwd.FAMILY,
        flash_sm80.FAMILY,
        paged.DECODE,
        paged.PREFILL,
        paged.INVARIANT,
        cascade.FAMILY,
        host.FAMILY,
        engine_cpu.FAMILY,
        engine_gpu.FAMILY,
        engine.FAMILY,
        engine.SATURATED,
        speculation.CPU,
        speculation.GPU,
    )
}
