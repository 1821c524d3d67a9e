"""Dense layers with weights of 4 bits beside Marlin and Machete, as vLLM ships them, and beside cuBLAS with the same weights in bf16.

w4a8: x in fp8, quantized before the measured call as in gemm_fp8; the peer is cuBLAS with all in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.families.gemm_bf16 import ROWS, SMOLLM2, WEIGHTS
from bench.harness import accuracy, formulas, peers
from bench.harness.case import Case, CaseSpec, Checked, Context, Family, op_case
from bench.harness.ceilings import Work
from bench.harness.timing import Call
from fastattn import ops
from fastattn.reference import quantized as reference

FORMATS = {"nvfp4": 16, "mxfp4": 32, "int4": 128}  # columns of a group
FP8_ROWS = (1, 64, 256, 512, 1024, 4096, 8192)
_QUICK = {(1, 6144, 4096), (64, 28672, 4096), (256, 6144, 4096), (1024, 28672, 4096)}
# Of x in fp8 on tiles: NVFP4's weights are then as they are, not rounded to e4m3 (csrc/gemm/gemm_sm90_w4_tiles_formats.cuh).
_EXACT_ROWS = 16
_GLOBAL_SCALE = 64.0  # a power of two: dense weights hold its quotient


def quantized_weight(context: Context, name: str, n: int, k: int) -> dict[str, Any]:
    """Random codes and scales, as arguments of the operator; results of rows of ordinary size are about 1."""
    rng, device = context.generator(), context.device
    groups = (n, k // FORMATS[name])
    if name == "int4":
        words = torch.randint(-(2**31), 2**31, (n, k // 8), generator=rng, device=device, dtype=torch.int32)
        scale = torch.rand(groups, generator=rng, device=device).to(torch.bfloat16) * (0.3 * k**-0.5)
        return {"weight_packed": words, "weight_scale": scale, "group_size": FORMATS[name]}
    codes = torch.randint(0, 256, (n, k // 2), generator=rng, device=device, dtype=torch.uint8)
    low, high = (48, 64) if name == "nvfp4" else (117, 121)  # e4m3 from 0.5 to 1.9; powers of two
    scale = torch.randint(low, high, groups, generator=rng, device=device, dtype=torch.uint8)
    call = {"weight_packed": codes, "weight_scale": scale, "group_size": FORMATS[name]}
    return call | ({"global_scale": torch.full((n,), _GLOBAL_SCALE, device=device)} if name == "nvfp4" else {})


def _takes_tiles(weight: dict[str, Any]) -> bool:
    device = weight["weight_packed"].device
    return bool(device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0))


def on_tiles(op: Callable[..., Tensor], weight: dict[str, Any], order: int) -> Callable[..., Tensor]:
    """The operator on the weight in tiles, as a model on Hopper has it, made once; it is given the weight that they are made of."""
    if not _takes_tiles(weight):
        return op
    tiles = {"weight_packed": ops.pack_w4_tiles(weight["weight_packed"], order)}
    if weight["weight_packed"].dtype is torch.uint8:
        scales = ops.pack_w4_scales(weight["weight_scale"], weight["group_size"], weight.get("global_scale"))
        tiles |= dict(zip(("weight_scale", "global_scale"), scales, strict=True))

    @wraps(op)
    def call(**given: Any) -> Tensor:
        return op(**(given | tiles))

    return call


def dense_weight(name: str, call: dict[str, Any], k: int) -> Tensor:
    """The same in bf16, which holds all of it."""
    packed, scale, group = call["weight_packed"], call["weight_scale"], call["group_size"]
    if name == "int4":
        return reference.int4_weight(packed, scale, None, group, k)
    weight = reference.fp4_weight(packed, scale, group, k, torch.bfloat16)
    return weight / _GLOBAL_SCALE if name == "nvfp4" else weight


def marlin(name: str, x: Tensor, call: dict[str, Any], n: int, k: int) -> Call:
    """The same codes and scales, rearranged by vLLM's own functions."""
    vllm = peers.vllm_ops()
    folder = "vllm.model_executor.layers.quantization.utils"
    utils, fp4 = (peers.require(f"{folder}.{module}") for module in ("marlin_utils", "marlin_utils_fp4"))
    workspace, none = utils.marlin_make_workspace_new(x.device), utils.marlin_make_empty_g_idx(x.device)
    words = call["weight_packed"].view(torch.int32).t().contiguous()
    weight = vllm.gptq_marlin_repack(words, none, k, n, 4)
    scale, group = call["weight_scale"], call["group_size"]
    if name == "int4":
        scale = utils.marlin_permute_scales(scale.t(), k, n, group)
        kind = peers.require("vllm.scalar_type").scalar_types.uint4b8
        return partial(
            utils.apply_gptq_marlin_linear, x, weight, scale, none, none, none, workspace, kind, n, k, is_k_full=True
        )
    kind = torch.float8_e4m3fn if name == "nvfp4" else torch.float8_e8m0fnu
    scale = utils.marlin_permute_scales(scale.view(kind).t().to(x.dtype), k, n, group)
    if name == "nvfp4":
        scale, factor = fp4.nvfp4_marlin_process_scales(scale)
        whole = torch.tensor(1 / _GLOBAL_SCALE, device=x.device, dtype=x.dtype)
        whole = fp4.nvfp4_marlin_process_global_scale(whole).float() / factor
    else:
        scale, whole = fp4.mxfp4_marlin_process_scales(scale), None
    return partial(fp4.apply_fp4_marlin_linear, x, weight, scale, whole, workspace, n, k)


def machete(x: Tensor, call: dict[str, Any]) -> Call:
    """Machete has no FP4. Its words are ours, with the columns of the transpose side by side, as `t` leaves them."""
    vllm, kind = peers.vllm_ops(), peers.require("vllm.scalar_type").scalar_types.uint4b8
    words = vllm.machete_prepack_B(call["weight_packed"].t(), x.dtype, kind, x.dtype)
    scale = call["weight_scale"].t().contiguous()
    return partial(vllm.machete_mm, a=x, b_q=words, b_type=kind, b_group_scales=scale, b_group_size=call["group_size"])


def gemm(context: Context, name: str, m: int, n: int, k: int) -> Case:
    x = torch.randn(m, k, generator=context.generator(m), device=context.device, dtype=torch.bfloat16)
    weight = quantized_weight(context, name, n, k)

    def cublas() -> Call:
        dense = dense_weight(name, weight, k)
        return lambda: F.linear(x, dense)

    op, formula = (ops.int4_linear, formulas.int4_linear) if name == "int4" else (ops.fp4_linear, formulas.fp4_linear)
    stored = sum(t.numel() * t.element_size() for t in weight.values() if isinstance(t, Tensor))
    return op_case(
        on_tiles(op, weight, 16),
        {"x": x, **weight},
        formula,
        peers={"marlin": lambda: marlin(name, x, weight, n, k), "cublas": cublas}
        | ({"machete": lambda: machete(x, weight)} if name == "int4" else {}),
        work=Work(num_bytes=stored + 2 * (m * k + m * n), num_ops=2 * m * n * k),
        config=f"x {m} × {k} in bf16, weight {n} × {k} in {name.upper()}",
    )


def gemm_fp8(context: Context, name: str, m: int, n: int, k: int) -> Case:
    x = torch.randn(m, k, generator=context.generator(m), device=context.device, dtype=torch.bfloat16)
    q, x_scale = ops.quantize_fp8(x)
    weight = quantized_weight(context, name, n, k)
    call = {"x": q, "x_scale": x_scale, **weight, "out_dtype": torch.bfloat16}

    def cublas() -> Call:
        dense = dense_weight(name, weight, k)
        return lambda: F.linear(x, dense)

    def judge(call: dict[str, Any], results: list[Tensor]) -> Checked:
        """The same weights in e4m3, sums in fp64, rounded once. Of few rows weights are not rounded, and sums are fp32's."""
        if m <= _EXACT_ROWS and _takes_tiles(weight):
            (exact,) = formulas.fp4_linear(torch.float64, q.double() * x_scale.double()[:, None], **weight)
            noise = 0.0
        else:
            (exact,) = formulas.fp4_fp8_linear(torch.float64, **call)
            noise = accuracy.fp8_sums(exact, k if call["fast_accum"] else 128)
        rounded = exact.to(torch.bfloat16)
        return Checked(accuracy.check_results("fp4_fp8_linear", results, [exact], [rounded], noise), exact)

    stored = sum(t.numel() * t.element_size() for t in weight.values() if isinstance(t, Tensor))
    return op_case(
        on_tiles(ops.fp4_fp8_linear, weight, 8),
        call | {"fast_accum": context.device.type == "cuda"},
        formulas.fp4_fp8_linear,
        peers={"cublas": cublas},
        work=Work(num_bytes=stored + m * k + 2 * m * n + 4 * m, num_ops=2 * m * n * k, rate="fp8_tflop_s"),
        config=f"x {m} × {k} in e4m3, weight {n} × {k} in {name.upper()}",
        judge=judge,
    )


FAMILY = Family(
    "gemm_fp4",
    "cuda",
    "int4_linear, fp4_linear and fp4_fp8_linear beside Marlin, Machete and cuBLAS in bf16",
    tuple(
        CaseSpec(f"m{m}_n{n}_k{k}_{name}_w4a16", partial(gemm, name=name, m=m, n=n, k=k), quick=(m, n, k) in _QUICK)
        for name in FORMATS
        for n, k in (*WEIGHTS, *SMOLLM2)
        if k % FORMATS[name] == 0  # Marlin and Machete have no group that is cut short
        for m in ROWS
    )
    + tuple(
        CaseSpec(f"w4a8_m{m}_n{n}_k{k}_{name}", partial(gemm_fp8, name=name, m=m, n=n, k=k), quick=(m, n, k) in _QUICK)
        for name in ("nvfp4", "mxfp4")
        for n, k in (*WEIGHTS, *SMOLLM2)
        for m in FP8_ROWS
    ),
)
