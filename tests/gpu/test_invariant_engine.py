"""batch_invariant on a GPU: rows of products whatever M is, and whole requests, have the bits that they have alone."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import LLM, ops
from fastattn.models.config import ModelConfig
from tests.engine.test_batch_invariance import BASE, drawn_params, facts, serve
from tests.engine.tiny import CONFIG, TinySource

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

ROWS = (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 100, 128, 129, 200, 256, 257, 384, 700, 1025)
# (N, K): of large models and small, of one tile, of sizes that the portable kernel takes.
SIZES = [(4096, 4096), (576, 1536), (1536, 576), (1024, 14336), (64, 72), (1001, 512)]


def bits(t: Tensor) -> Tensor:
    return t.view(torch.int16)


def check_rows(product: Any, num_rows: int) -> None:
    """product(first, end): results of these rows, computed together."""
    whole = bits(product(0, num_rows))
    for rows in ROWS:
        for first in (0, num_rows - rows):
            found = bits(product(first, first + rows))
            assert torch.equal(found, whole[first : first + rows]), f"{rows} rows from {first} on"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_products(n: int, k: int, dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(n + k)
    x, weight = (torch.randn(rows, k, device="cuda", dtype=dtype) for rows in (1025, n))
    b = torch.randn(n, device="cuda", dtype=dtype) if bias else None
    check_rows(lambda i, j: ops.linear(x[i:j], weight, b, batch_invariant=True), len(x))
    if n % 2 == 0:
        weight *= k**-0.5
        for activation in ("silu", "gelu_tanh"):
            check_rows(lambda i, j, a=activation: ops.gated_linear(x[i:j], weight, b, a, batch_invariant=True), len(x))


@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (576, 1536), (1024, 14336), (1001, 528)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_in_8_bits(n: int, k: int, bias: bool) -> None:
    torch.manual_seed(n + k)
    x, weight = (torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for rows in (1025, n))
    b = torch.randn(n, device="cuda", dtype=torch.bfloat16) if bias else None
    like = {"out_dtype": torch.bfloat16}
    q, scale, wq, weight_scale = *ops.quantize_fp8(x), *ops.quantize_fp8(weight)
    check_rows(
        lambda i, j: ops.fp8_linear(q[i:j], scale[i:j], wq, weight_scale, b, batch_invariant=True, **like), len(x)
    )
    q, scale, wq, weight_scale = *ops.quantize_int8(x), *ops.quantize_int8(weight)
    check_rows(lambda i, j: ops.int8_linear(q[i:j], scale[i:j], wq, weight_scale, b, **like), len(x))


def config(head_dim: int, **changes: Any) -> ModelConfig:
    return replace(
        CONFIG, hidden_size=256, intermediate_size=512, num_heads=6, num_kv_heads=2, head_dim=head_dim, **changes
    )


MODELS: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "64": (config(64, vocab_size=128), {}),
    "128": (config(128, vocab_size=128, attention_bias=True, qk_norm=True), {}),
    "window": (config(64, vocab_size=128, sliding_window=40), {}),
    "odd vocabulary": (config(64), {"dtype": "float16"}),
    "int8": (config(64, vocab_size=128), {"quantization": "int8", "kv_cache_dtype": "int8"}),
    "fp8": (config(128, vocab_size=128, attention_bias=True), {"quantization": "fp8"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_requests(name: str) -> None:
    """Alone, and in drawn schedules with chunks, prefix hits, preemptions, CUDA graphs and without, and steps that overlap."""
    rng = random.Random(name)
    model, own = MODELS[name]
    requests = []
    for _ in range(24):
        prompt = BASE[: rng.randrange(len(BASE))] + "".join(rng.choices("the quick 01", k=rng.randint(1, 150)))
        requests.append((prompt, drawn_params(rng), rng.randrange(6)))

    def make(**options: Any) -> LLM:
        common = {"device": "cuda", "dtype": "bfloat16", "max_model_len": 256, "quiet": True, "num_kv_blocks": 600}
        return LLM(TinySource(config=model), batch_invariant=True, **(common | own | options))

    plain = make(enable_prefix_caching=False)
    alone = [facts(serve(plain.engine, [(prompt, params, 0)])[0]) for prompt, params, _ in requests]
    for options in (
        {},
        {"max_num_batched_tokens": 40, "max_num_seqs": 20, "num_kv_blocks": 40, "block_size": 8},
        {"max_num_batched_tokens": 150, "use_cuda_graphs": False, "async_scheduling": False, "num_kv_blocks": 60},
        {"num_kv_blocks": 20, "kv_offloading_size": 0.01},
    ):
        engine = make(**options).engine
        for index, (found, expected) in enumerate(zip(serve(engine, requests), alone, strict=True)):
            assert facts(found) == expected, f"request {index} with {options}"
