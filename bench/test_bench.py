"""A few cases under pytest-benchmark, on the CPU: `pytest bench`, with `--benchmark-compare` from one commit to the next."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from bench.families import flash_fwd, gemm_bf16, paged, small_ops, small_ops_logits
from bench.harness.case import Case, Context
from fastattn._runtime import BlockPool, TokenSequence
from fastattn.engine.config import EngineConfig
from fastattn.engine.engine import Engine
from fastattn.engine.runner import Runner
from fastattn.engine.sampling_params import SamplingParams
from fastattn.models.config import ModelConfig, RopeConfig
from fastattn.models.registry import build_model

pytestmark = pytest.mark.benchmark(max_time=0.3, min_rounds=3)

CASES: dict[str, Callable[[Context], Case]] = {
    "rms_norm": partial(small_ops.rms_norm, tokens=64, width=576),
    "add_rms_norm": partial(small_ops.add_rms_norm, tokens=64, width=576),
    "rope_kv_write": partial(small_ops.rope_kv_write, tokens=64, heads=9, kv_heads=3),
    "swiglu": partial(small_ops.swiglu, tokens=64, width=1536),
    "sample": partial(small_ops_logits.sample, kind="topk_topp", rows=8, vocab=49152),
    "linear 1 row": partial(gemm_bf16.gemm, m=1, n=1536, k=576),
    "linear 64 rows": partial(gemm_bf16.gemm, m=64, n=1536, k=576),
    "attention": partial(flash_fwd.flash, dim=64, length=256, causal=True, heads=9, tokens=256),
    "paged decode": partial(paged.paged, page=16, batch=8, new=1, length=200, heads=9, kv_heads=3),
}


@pytest.mark.parametrize("name", CASES)
def test_operator(name: str, benchmark: Any) -> None:
    case = CASES[name](Context(torch.device("cpu")))
    assert case.check().share <= 1
    benchmark(case.ours)


def small_engine() -> Engine:
    """Two layers with random weights: the step's host work weighs as much as its arithmetic."""
    config = ModelConfig(
        architecture="llama",
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_word_embeddings=True,
        layer_is_sliding=(False, False),
    )
    device, dtype = torch.device("cpu"), torch.float32
    model = build_model(config, device, dtype, max_model_len=2048)
    torch.manual_seed(0)
    for weight in model.weights():
        torch.nn.init.normal_(weight.out, std=0.1)
    options = EngineConfig(max_model_len=2048, num_kv_blocks=2048, enable_prefix_caching=False)
    return Engine(Runner(model, options, device, dtype), options, NoTokenizer())  # type: ignore[arg-type]


class NoTokenizer:
    """Ids in, ids out."""

    vocab_size = 512
    eos_token_ids = (0,)
    bos_token_id = None
    has_chat_template = False

    def stream(self, skip_special_tokens: bool = True) -> NoTokenizer:
        return self

    def step(self, token_id: int) -> str | None:
        return None

    def steps(self, token_ids: list[int]) -> str:
        return ""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return ""


@pytest.mark.parametrize("num_requests", [1, 16])
def test_engine_step(num_requests: int, benchmark: Any) -> None:
    """A decode step of the whole engine: schedule, fill the buffers, run the model, sample, give outputs."""
    engine = small_engine()
    for i in range(num_requests):
        params = SamplingParams(temperature=0.0, max_tokens=2000, ignore_eos=True)
        engine.add_request(str(i), {"prompt_token_ids": [1 + i, 2, 3]}, params)
    engine.step()
    outputs = benchmark.pedantic(engine.step, rounds=10, iterations=5, warmup_rounds=1)
    assert len(outputs) == num_requests
    assert not any(output.finished for output in outputs)


def test_block_pool(benchmark: Any) -> None:
    """allocate + release of 100 blocks one by one: 200 block operations."""
    pool = BlockPool(1000)

    def churn() -> None:
        for _ in range(100):
            blocks = pool.allocate(1)
            assert blocks is not None
            pool.release(blocks)

    benchmark(churn)
    assert pool.num_free == 1000


def test_token_sequence(benchmark: Any) -> None:
    """A thousand appended tokens."""

    def fill() -> TokenSequence:
        sequence = TokenSequence([1, 2, 3])
        for token in range(1000):
            sequence.append(token)
        return sequence

    assert len(benchmark(fill)) == 1003
