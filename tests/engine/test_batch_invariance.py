"""With batch_invariant a request has the same tokens and log-probabilities, bit by bit, as when it is alone."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from fastattn.engine.config import EngineConfig
from fastattn.engine.engine import Engine
from fastattn.engine.outputs import RequestOutput
from fastattn.engine.pooling_params import PoolingParams
from fastattn.engine.query_groups import group_size, query_groups
from fastattn.engine.runner import Runner
from fastattn.engine.sampling_params import SamplingParams
from fastattn.engine.setup import EngineOptions, build_engine
from fastattn.models.decoder import DecoderModel
from fastattn.models.loader.quantized_source import with_quantization
from fastattn.models.registry import load_model
from fastattn.speculative.config import SpeculativeConfig
from tests.engine import tiny
from tests.engine.tiny import CONFIG, TinySource, assert_idle, make_engine

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = tiny.make_tokenizer()
CPU = torch.device("cpu")
BASE = "0 1 2 3 4 5 6 7 8 9 and so on, and so on, "
MODELS = {
    "plain": (TinySource(), "auto"),
    "window": (TinySource(config=replace(CONFIG, sliding_window=9, qk_norm=True)), "auto"),
    "int8": (with_quantization(TinySource(config=replace(CONFIG, head_dim=16, num_kv_heads=1)), "int8"), "int8"),
    "fp8": (with_quantization(TinySource(config=replace(CONFIG, attention_bias=True)), "fp8"), "auto"),
}


@cache
def network(name: str) -> DecoderModel:
    return load_model(MODELS[name][0], CPU, torch.float32, 256, batch_invariant=True)


def drawn_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 1.0]),
        seed=rng.randrange(100),
        max_tokens=rng.randint(4, 12),
        ignore_eos=True,
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        logprobs=rng.choice([0, 3]),
        prompt_logprobs=rng.choice([None, 2]),
        n=rng.choice([1, 1, 2]),
    )


def serve(engine: Engine, requests: list[tuple[str, SamplingParams, int]]) -> list[RequestOutput]:
    last: dict[str, RequestOutput] = {}
    for step in range(10_000):
        for index, (prompt, params, arrival) in enumerate(requests):
            if arrival == step:
                engine.add_request(str(index), prompt, params)
        for output in engine.step():
            last[output.request_id] = output
        if step > 20 and not engine.has_unfinished_requests():
            break
    assert_idle(engine)
    return [last[str(index)] for index in range(len(requests))]


def facts(output: RequestOutput) -> Any:
    """All that must not change by a bit: floats are compared as they are."""
    return output.prompt_logprobs, [(c.token_ids, c.logprobs, c.text) for c in output.outputs]


@pytest.mark.parametrize("name", MODELS)
def test_a_request_has_the_bits_that_it_has_alone(name: str) -> None:
    """Drawn schedules: chunks of prompts, prefix hits, both tiers, preemptions, padding, steps that overlap."""
    rng = random.Random(name)
    preempted = hits = 0
    for _ in range(1 if name in ("int8", "fp8") else 2):
        requests = []
        for _ in range(6):
            prompt = BASE[: rng.randrange(len(BASE))] + "".join(rng.choices("the quick 01", k=rng.randint(1, 24)))
            requests.append((prompt, drawn_params(rng), rng.randrange(5)))
        common: dict[str, Any] = {"batch_invariant": True, "kv_cache_dtype": MODELS[name][1]}
        plain = make_engine(network(name), TOKENIZER, enable_prefix_caching=False, **common)
        alone = [facts(serve(plain, [(prompt, params, 0)])[0]) for prompt, params, _ in requests]
        for tight in (True, False):  # in the cache: some give way, and are computed again
            caching = not tight or rng.random() < 0.5
            engine = make_engine(
                network(name),
                TOKENIZER,
                max_num_batched_tokens=rng.choice([5, 16, 256]),
                max_num_seqs=rng.randint(3, 8),
                num_kv_blocks=10 if tight else 128,
                block_size=8 if tight else 16,
                enable_prefix_caching=caching,
                num_host_kv_blocks=rng.choice([0, 30]) if caching else 0,
                async_scheduling=rng.random() < 0.5,
                padded=rng.random() < 0.5,
                **common,
            )
            for found, expected in zip(serve(engine, requests), alone, strict=True):
                assert facts(found) == expected
            preempted += engine.stats().num_preemptions
            hits += engine.stats().num_prefix_hit_tokens
    assert preempted > 0
    assert hits > 0


def test_groups_of_queries_are_cut_at_their_positions() -> None:
    """Of three sequences: a chunk, nobody's, a decode."""
    starts, used, sequence = query_groups(np.array([0, 11, 11, 12]), np.array([24, 7, 100]), 8)
    assert (starts.tolist(), used.tolist(), sequence.tolist()) == ([0, 3, 11, 12], [16, 24, 100], [0, 0, 2])
    assert [group_size(group, None, False) for group in (1, 3, 4, 5, 32)] == [32, 8, 8, 4, 1]
    assert group_size(1, None, True) == group_size(1, 5000, False) == 1
    assert group_size(1, 4096, False) == 32


def test_what_cannot_be_invariant_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_invariant is True, allowed is False with speculative decoding"):
        EngineConfig(64, 64, batch_invariant=True, speculative=SpeculativeConfig(method="ngram"))
    with pytest.raises(ValueError, match="batch_invariant is True with kv_cache_scales 'calculate'"):
        EngineConfig(64, 64, batch_invariant=True, kv_cache_dtype="fp8", kv_cache_scales="calculate")
    with pytest.raises(ValueError, match="tensor_parallel_size is 2 with batch_invariant, allowed is 1"):
        EngineOptions(batch_invariant=True, tensor_parallel_size=2)
    options = EngineOptions(
        device="cpu", batch_invariant=True, max_model_len=64, num_kv_blocks=16, quantization="nvfp4"
    )
    with pytest.raises(ValueError, match=r"batch_invariant is True with Fp4Weight at layers\.0\.self_attn\.qkv_proj"):
        build_engine(TinySource(), options)
    many = TinySource(config=replace(CONFIG, num_heads=33, num_kv_heads=1))
    with pytest.raises(ValueError, match="33 query heads to a KV head, allowed are up to 32"):
        build_engine(many, replace(options, quantization=None))
    with pytest.raises(ValueError, match=r"config\.batch_invariant is False, expected the model's, True"):
        Runner(network("plain"), EngineConfig(64, 64), CPU, torch.float32)
    engine = make_engine(network("plain"), TOKENIZER, batch_invariant=True)
    with pytest.raises(ValueError, match="pooling is 'mean' with batch_invariant, allowed is 'last'"):
        engine.add_request("0", "the", PoolingParams())
