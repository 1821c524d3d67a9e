"""Whole models with weights of few bits on the GPU: logits near those of fp32 on the CPU, the same tokens with and without graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch

from fastattn import nn, ops
from fastattn.engine.sampling_params import SamplingParams
from fastattn.engine.setup import EngineOptions, build_engine
from fastattn.models.config import ModelConfig
from fastattn.models.loader import TensorInfo
from fastattn.models.loader.quantized_source import with_quantization
from fastattn.models.quantization import QuantizationConfig
from fastattn.models.registry import build_meta, load_model
from fastattn.models.weight_formats import FORMATS
from fastattn.reference import quantize as q
from fastattn.reference import quantized as reference
from tests.engine import tiny
from tests.models.quantized import in_blocks

# Without a GPU the CPU stands in for it: then the test is of the source below, and of the CPU against itself.
SCHEMES: Mapping[str, nn.Scheme] = {
    "int8": nn.Int8Scheme(),
    "int8 zero points": nn.Int8Scheme(symmetric=False),
    "fp8": nn.Fp8Scheme(),
    "fp8 blocks": nn.Fp8BlockScheme(),
    "int4": nn.Int4Scheme(32, True),
    "int4 zero points": nn.Int4Scheme(32, False),
    "int4 rows": nn.Int4Scheme(None, True),
    "nvfp4": nn.Fp4Scheme(16),
    "mxfp4": nn.Fp4Scheme(32),
    "nvfp4 fp8": nn.Fp4Scheme(16, fp8_activations=True),
    "mxfp4 fp8": nn.Fp4Scheme(32, fp8_activations=True),
}
CONFIG = replace(tiny.CONFIG, hidden_size=64, intermediate_size=96, head_dim=16)
IDS = [7, 12, 90, 33, 50, 2, 11, 11, 64]


@dataclass(frozen=True)
class QuantizedSource(tiny.TinySource):
    """The tiny model with its linear layers' weights rounded, stored as checkpoints store them."""

    config: ModelConfig = CONFIG

    def tensors(self) -> Mapping[str, TensorInfo]:
        return {
            w.name: TensorInfo(w.full_shape, w.stored_as[0] if w.stored_as else "F32", 4 * w.out.numel())
            for w in build_meta(self.config, 8).weights()
        }

    def read(self, name: str, out: torch.Tensor, shard: nn.Shard | None = None, copier: object = None) -> None:
        layer, _, kind = name.rpartition(".")
        assert self.config.quantization is not None
        scheme = self.config.quantization.scheme(layer) if layer.endswith("_proj") else None
        if scheme is None:
            return super().read(name, out, shard)
        dense = torch.empty(self.shapes()[layer])
        super().read(f"{layer}.weight", dense)
        out.copy_(stored(dense, scheme)[kind].view(out.shape))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        plain = build_meta(replace(self.config, quantization=None), 8)
        return {w.name.removesuffix(".weight"): w.full_shape for w in plain.weights()}


def stored(weight: torch.Tensor, scheme: nn.Scheme) -> dict[str, torch.Tensor]:
    columns = weight.shape[1]
    if isinstance(scheme, nn.Int8Scheme):
        step = q.int_step(q.group_amax(weight, columns), 8)
        return {"weight": q.quantize_int(weight, step, 8), "weight_scale": step}
    if isinstance(scheme, nn.Fp8Scheme):
        codes, step = reference.quantize_fp8(weight)
        return {"weight": codes.view(torch.uint8), "weight_scale": step[:, None]}
    if isinstance(scheme, nn.Fp8BlockScheme):
        codes, scale, _ = in_blocks(weight)
        return {"weight": codes.view(torch.uint8), scheme.scale_name: scale}
    if isinstance(scheme, nn.Int4Scheme):
        group = scheme.group_size or columns
        groups = weight.unflatten(1, (-1, group))
        step, zero = q.int_step_asymmetric(groups.amin(-1), groups.amax(-1), 4)
        if scheme.symmetric:
            step, zero = q.int_step(q.group_amax(weight, group), 4), torch.zeros_like(zero)
        codes = q.quantize_int(weight, q.per_column(step, group, columns), 4, q.per_column(zero, group, columns))
        found = {"weight_packed": q.pack_int4(codes), "weight_scale": step, "weight_shape": torch.tensor(weight.shape)}
        return found | {"weight_zero_point": q.pack_int4_zero_points(zero)}
    amax = q.group_amax(weight, scheme.group_size)
    if scheme.group_size == 16:
        whole = q.nvfp4_global_scale(weight)
        scale = q.nvfp4_scale(amax, whole)
        step, extra = q.nvfp4_step(scale, whole), {"weight_global_scale": whole}
    else:
        scale, extra = q.mxfp4_scale(amax), {}
        step = q.e8m0_step(scale)
    values = q.quantize_e2m1(weight, q.per_column(step, scheme.group_size, columns))
    return {"weight_packed": q.pack_e2m1(values), "weight_scale": scale.view(torch.uint8), **extra}


def source(name: str) -> QuantizedSource:
    groups = ((("Linear",), SCHEMES[name]),)
    return QuantizedSource(config=replace(CONFIG, quantization=QuantizationConfig(groups, ignore=("lm_head",))))


def few_rows_source(name: str) -> QuantizedSource:
    """W4A8 as it is for so few rows on Hopper: those of weights in tiles are taken as they are (`Fp4Weight.exact_rows`), but
    `down_proj` has no whole tiles."""
    groups = ((("re:.*down_proj",), SCHEMES[name]), (("Linear",), SCHEMES[name.removesuffix(" fp8")]))
    return QuantizedSource(config=replace(CONFIG, quantization=QuantizationConfig(groups, ignore=("lm_head",))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_logits(name: str, dtype: torch.dtype, device: str) -> None:
    """At most three times the error of the CPU's operators, which round as often."""
    judge = source(name)
    if device == "cuda" and name.endswith("fp4 fp8") and torch.cuda.get_device_capability() == (9, 0):
        judge = few_rows_source(name)
    exact, plain = (
        tiny.full_logits(load_model(judge, torch.device("cpu"), d, 64), IDS) for d in (torch.float32, dtype)
    )
    logits = tiny.full_logits(load_model(source(name), torch.device(device), dtype, 64), IDS).cpu()
    assert float((logits - exact).abs().max()) <= 3 * float((plain - exact).abs().max())


def draw_weight(name: str, n: int, k: int, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor | None], torch.Tensor]:
    """Arguments of the operator, with every code and scale, and the weight (n, k) that they are, to the bit."""
    rng = torch.Generator().manual_seed(3)
    group = {"nvfp4": 16, "mxfp4": 32}.get(name, 128)

    def draw(low: int, high: int, *size: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.randint(low, high, size, generator=rng, dtype=dtype)

    if "fp4" in name:
        codes, scale = draw(0, 256, n, k // 2), draw(0, 127, n, k // group) | draw(0, 2, n, k // group) << 7
        if name == "mxfp4":
            scale = draw(20, 230, n, k // group) if dtype is torch.bfloat16 else draw(110, 132, n, k // group)
        return {"weight_packed": codes, "weight_scale": scale}, reference.fp4_weight(codes, scale, group, k, dtype)
    words, scale = draw(-(2**31), 2**31, n, k // 8, dtype=torch.int32), torch.rand(n, k // group, generator=rng)
    zero_point = draw(-8, 8, n, k // group, dtype=torch.int8) if "zero" in name else None
    weight = reference.int4_weight(words, scale.to(dtype), zero_point, group, k)
    return {"weight_packed": words, "weight_scale": scale.to(dtype), "zero_point": zero_point}, weight


def four_bit_linear(name: str, x: torch.Tensor, call: dict[str, torch.Tensor | None]) -> torch.Tensor:
    on_device = {argument: None if t is None else t.to(x.device) for argument, t in call.items()}
    op = ops.fp4_linear if "fp4" in name else ops.int4_linear
    return op(x, group_size={"nvfp4": 16, "mxfp4": 32}.get(name, 128), **on_device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["int4", "int4 zero points", "nvfp4", "mxfp4"])
def test_weights_are_exact(name: str, dtype: torch.dtype, device: str) -> None:
    """Products with unit vectors are single weights: every code with every scale, to the bit, whichever kernel has the rows."""
    k = 512
    call, weight = draw_weight(name, 200, k, dtype)
    units = torch.eye(k, dtype=dtype, device=device)
    for rows in (units[:1], units[:40], units[40:168], units[168:424], units):
        columns = rows.argmax(1).cpu()
        assert torch.equal(four_bit_linear(name, rows, call).cpu(), weight.t()[columns])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["int4", "int4 zero points", "nvfp4", "mxfp4"])
@pytest.mark.parametrize(("m", "n", "k"), [(257, 328, 1152), (300, 1544, 128), (512, 4104, 384), (1021, 264, 2048)])
def test_many_rows(m: int, n: int, k: int, name: str, dtype: torch.dtype, device: str) -> None:
    """Also of a matrix with NaN between its rows; and twice the same bits."""
    call, weight = draw_weight(name, n, k, dtype)
    gapped = torch.full((m, k + 8), torch.nan, dtype=dtype)
    gapped[:, :k] = torch.randn(m, k, generator=torch.Generator().manual_seed(m)) * 0.05
    gapped = gapped.to(device)
    out = four_bit_linear(name, gapped[:, :k], call)
    assert torch.equal(out, four_bit_linear(name, gapped[:, :k].contiguous(), call))
    x = gapped[:, :k].cpu().double()
    exact, size = x @ weight.double().t(), x.abs() @ weight.double().abs().t()
    kind = torch.finfo(dtype)
    allowed = exact.abs() * kind.eps + kind.smallest_normal * kind.eps + size * 2**-18
    assert bool(((out.cpu().double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", [16, 32])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 72, 4096), (257, 328, 1120), (300, 1544, 128), (512, 4104, 384)])
def test_fp8_activations(m: int, n: int, k: int, group_size: int, dtype: torch.dtype, device: str) -> None:
    """Also of a matrix with NaN between its rows; twice the same bits; sums of 14 bits and of 128 products. Scales are within five
    powers of two: what the tensor cores drop of products far below the largest is not in the bound."""
    rng = torch.Generator().manual_seed(m)
    name = "nvfp4" if group_size == 16 else "mxfp4"
    codes = torch.randint(0, 256, (n, k // 2), generator=rng, dtype=torch.uint8)
    low, high = (40, 80) if name == "nvfp4" else (80, 121)
    scale = torch.randint(low, high, (n, k // group_size), generator=rng, dtype=torch.uint8)
    gapped = torch.full((m, k + 16), torch.nan).to(torch.float8_e4m3fn)
    gapped[:, :k] = (torch.randn(m, k, generator=rng) * 8).to(torch.float8_e4m3fn)
    x_scale = torch.rand(m, generator=rng) * 2**-14
    weight, factor = (t.double() for t in reference.fp4_as_fp8(codes, scale, None, group_size, k))
    x = gapped[:, :k].double() * x_scale.double()[:, None]
    exact, size = (x @ weight.t()) * factor, (x.abs() @ weight.abs().t()) * factor
    on_device = [t.to(device) for t in (gapped, x_scale, codes, scale)]
    for fast_accum in (False, True):
        outs = [
            ops.fp4_fp8_linear(q[:, :k], *on_device[1:], group_size, out_dtype=dtype, fast_accum=fast_accum)
            for q in (on_device[0], on_device[0][:, :k].contiguous().view(m, k))
        ]
        assert torch.equal(*outs)
        kind, lost = torch.finfo(dtype), 2**-13 * (k / 32 if fast_accum else 4) + 2**-18
        allowed = exact.abs() * kind.eps + kind.smallest_normal * kind.eps + size * lost
        assert bool(((outs[0].cpu().double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 72, 4096), (9, 264, 1168), (33, 520, 640), (64, 200, 2064), (100, 1544, 912), (257, 328, 1120), (384, 1032, 912),
     (1021, 1544, 400)],
)  # fmt: skip
def test_fp8_blocks(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> None:
    """Also of matrices with NaN between their rows; twice the same bits; scales of every size, and blocks cut short. What the tensor
    cores drop of a product is at most 2⁻¹³ of a panel's sum at each of its four steps."""
    rng = torch.Generator().manual_seed(m)

    def draw(rows: int) -> torch.Tensor:
        gapped = torch.full((rows, k + 16), torch.nan).to(torch.float8_e4m3fn)
        gapped[:, :k] = (torch.randn(rows, k, generator=rng) * 8).to(torch.float8_e4m3fn)
        return gapped

    panels, blocks = -(-k // 128), -(-n // 128)
    x, weight = draw(m), draw(n)
    x_scale = torch.exp2(torch.randn(panels, m, generator=rng) * 2) * 2**-8
    weight_scale = torch.exp2(torch.randn(blocks, panels, generator=rng) * 2) * 2**-4
    bias = torch.randn(n, generator=rng).to(dtype)
    rows = reference.fp8_group_rows(x[:, :k], x_scale.double())
    columns = reference.fp8_block_weight(weight[:, :k], weight_scale.double())
    exact, size = rows @ columns.t() + bias.double(), rows.abs() @ columns.abs().t()
    on_device = [t.to(device) for t in (x, x_scale, weight, weight_scale, bias)]
    outs = []
    for packed in (False, True):
        q, own = (t[:, :k].contiguous() if packed else t[:, :k] for t in (on_device[0], on_device[2]))
        outs.append(ops.fp8_block_linear(q, on_device[1], own, on_device[3], on_device[4], out_dtype=dtype))
    assert torch.equal(*outs)
    kind = torch.finfo(dtype)
    allowed = exact.abs() * kind.eps + kind.smallest_normal * kind.eps + size * (2**-11 + 2**-18)
    assert bool(((outs[0].cpu().double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("group_size", [16, 32])
def test_weights_in_fp8(group_size: int, device: str) -> None:
    """Products with unit vectors are single weights in e4m3, to the bit; how far those are from the weights."""
    k = 512
    rng = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 256, (256, k // 2), generator=rng, dtype=torch.uint8)
    low, high = (
        (8, 127) if group_size == 16 else (113, 128)
    )  # e4m3's normal numbers; 14 powers of two below the largest
    scale = torch.randint(low, high, (256, k // group_size), generator=rng, dtype=torch.uint8)
    weight, factor = reference.fp4_as_fp8(codes, scale, None, group_size, k)
    units = torch.eye(k).to(torch.float8_e4m3fn).to(device)
    ones = torch.ones(1, device=device)
    out = ops.fp4_fp8_linear(units, ones, codes.to(device), scale.to(device), group_size, out_dtype=torch.bfloat16)
    assert torch.equal(out.t().float().cpu(), weight.float() * factor[:, None])
    exact = reference.fp4_weight(codes, scale, group_size, k, torch.float32)
    off = (weight.float() * factor[:, None] - exact).abs()
    allowed = torch.zeros_like(off) if group_size == 32 else (exact.abs() / 16).clamp(min=2**-7)
    assert bool((off <= allowed).all())


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEMES)
def test_graphs_give_the_same_tokens(name: str) -> None:
    """Prefill, then decode steps of 1 and of 5 sequences."""
    texts = []
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    for graphs in (True, False):
        options = EngineOptions(device="cuda", dtype="bfloat16", max_model_len=128, use_cuda_graphs=graphs)
        engine = build_engine(source(name), options)
        prompts = [{"prompt_token_ids": IDS[i:]} for i in range(5)]
        texts.append([o.outputs[0].token_ids for o in tiny.run(engine, prompts, params)])
    assert texts[0] == texts[1] and all(len(t) == 16 for t in texts[0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_rounded_on_the_gpu_as_on_the_cpu(name: str) -> None:
    """`quantization`: what a GPU stores of a weight is the CPU's, to the bit; and the model runs."""
    fly = with_quantization(tiny.TinySource(config=CONFIG), name)
    for weight in build_meta(fly.config, 8).weights():
        if weight.name.startswith("model.layers.0."):
            on_cpu, on_gpu = (torch.empty_like(weight.out, device=device) for device in ("cpu", "cuda"))
            fly.read(weight.name, on_cpu)
            fly.read(weight.name, on_gpu)
            assert torch.equal(on_cpu, on_gpu.cpu()), weight.name
    exact, plain = (
        tiny.full_logits(load_model(fly, torch.device("cpu"), d, 64), IDS) for d in (torch.float32, torch.bfloat16)
    )
    logits = tiny.full_logits(load_model(fly, torch.device("cuda"), torch.bfloat16, 64), IDS).cpu()
    assert float((logits - exact).abs().max()) <= 3 * float((plain - exact).abs().max())
