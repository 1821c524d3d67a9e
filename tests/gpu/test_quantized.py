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
from fastattn.models.quantization import QuantizationConfig
from fastattn.models.registry import build_meta, load_model
from fastattn.reference import quantize as q
from fastattn.reference import quantized as reference
from tests.engine import tiny

# Without a GPU the CPU stands in for it: then the test is of the source below, and of the CPU against itself.
SCHEMES: Mapping[str, nn.Scheme] = {
    "int8": nn.Int8Scheme(),
    "fp8": nn.Fp8Scheme(),
    "int4": nn.Int4Scheme(32, True),
    "int4 zero points": nn.Int4Scheme(32, False),
    "int4 rows": nn.Int4Scheme(None, True),
    "nvfp4": nn.Fp4Scheme(16),
    "mxfp4": nn.Fp4Scheme(32),
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

    def read(self, name: str, out: torch.Tensor, shard: nn.Shard | None = None) -> None:
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_logits(name: str, dtype: torch.dtype, device: str) -> None:
    """At most three times the error of the CPU's operators, which round as often."""
    exact, plain = (
        tiny.full_logits(load_model(source(name), torch.device("cpu"), d, 64), IDS) for d in (torch.float32, dtype)
    )
    logits = tiny.full_logits(load_model(source(name), torch.device(device), dtype, 64), IDS).cpu()
    assert float((logits - exact).abs().max()) <= 3 * float((plain - exact).abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["int4", "int4 zero points", "nvfp4", "mxfp4"])
def test_weights_are_exact(name: str, dtype: torch.dtype, device: str) -> None:
    """Products with unit vectors are single weights: every code with every scale, to the bit, whichever kernel has the rows."""
    rng = torch.Generator().manual_seed(3)
    n, k, group = 200, 512, {"nvfp4": 16, "mxfp4": 32}.get(name, 128)

    def draw(low: int, high: int, *size: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.randint(low, high, size, generator=rng, dtype=dtype)

    if "fp4" in name:
        codes, scale = draw(0, 256, n, k // 2), draw(0, 127, n, k // group) | draw(0, 2, n, k // group) << 7
        if name == "mxfp4":
            scale = draw(20, 230, n, k // group) if dtype is torch.bfloat16 else draw(110, 132, n, k // group)
        weight = reference.fp4_weight(codes, scale, group, k, dtype)
        call = {"weight_packed": codes, "weight_scale": scale}
    else:
        words, scale = draw(-(2**31), 2**31, n, k // 8, dtype=torch.int32), torch.rand(n, k // group, generator=rng)
        zero_point = draw(-8, 8, n, k // group, dtype=torch.int8) if "zero" in name else None
        weight = reference.int4_weight(words, scale.to(dtype), zero_point, group, k)
        call = {"weight_packed": words, "weight_scale": scale.to(dtype), "zero_point": zero_point}
    call = {argument: None if t is None else t.to(device) for argument, t in call.items()}
    op = ops.fp4_linear if "fp4" in name else ops.int4_linear
    units = torch.eye(k, dtype=dtype, device=device)
    for rows in (units[:1], units[:40], units[40:168], units[168:424], units):
        columns = rows.argmax(1).cpu()
        assert torch.equal(op(rows, group_size=group, **call).cpu(), weight.t()[columns])


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
