"""Embeddings: pooled hidden states, however the prompt was cut up on its way through the scheduler."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastattn import LLM, AsyncEngine, PoolingParams, SamplingParams
from fastattn.engine.engine import Engine
from fastattn.models.decoder import DecoderModel
from tests.engine.tiny import TinySource, assert_idle, drain, full_hidden, run

pytestmark = pytest.mark.usefixtures("one_thread")

MakeEngine = Callable[..., Engine]
TEXTS = [
    "the quick brown fox",
    "a",
    "0 1 2 3 4 5 6 7 8 9 and so on, and so on, and so on",
    "What is 00?",
    "the the the",
]


def expected(network: DecoderModel, token_ids: list[int], params: PoolingParams) -> torch.Tensor:
    hidden = full_hidden(network, token_ids).double()
    vector = hidden.mean(0) if params.pooling == "mean" else hidden[-1]
    return vector / vector.norm() if params.normalize else vector


@pytest.mark.parametrize(
    "params", [PoolingParams(), PoolingParams("last"), PoolingParams("mean", normalize=False)], ids=str
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 5},
        {"max_num_batched_tokens": 1, "max_num_seqs": 1},
        {"num_kv_blocks": 8, "max_num_batched_tokens": 7},
        {"enable_prefix_caching": False},
    ],
    ids=str,
)
def test_pooled_hidden_states(
    make_engine: MakeEngine, network: DecoderModel, params: PoolingParams, options: dict[str, Any]
) -> None:
    """Alone, in chunks, with others that generate, and with everything in the prefix cache already."""
    engine = make_engine(**options)
    for _ in range(2):
        engine.add_request("text", TEXTS[2][:20], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
        for index, text in enumerate(TEXTS):
            engine.add_request(str(index), text, params)
        last = {output.request_id: output for output in drain(engine)}
        assert len(last.pop("text").outputs[0].token_ids) == 30
        for index in range(len(TEXTS)):
            output = last[str(index)]
            assert output.embedding is not None
            vector = torch.tensor(output.embedding, dtype=torch.float64)
            torch.testing.assert_close(
                vector, expected(network, output.prompt_token_ids, params), rtol=1e-4, atol=1e-5, msg=lambda m: m
            )
            (completion,) = output.outputs
            assert (completion.text, completion.token_ids, completion.finish_reason) == ("", [], "stop")
    assert engine.stats().num_generated_tokens == 60


def test_a_preempted_prompt_is_summed_anew(make_engine: MakeEngine, network: DecoderModel) -> None:
    engine = make_engine(num_kv_blocks=32, max_num_batched_tokens=10, policy="priority")
    text = "0 1 2 3 4 5 6 7 8 9 " * 11
    for index in range(2):
        params = SamplingParams(temperature=0, max_tokens=90, ignore_eos=True)
        engine.add_request(str(index), "1 2 3 4 5 6 7", params, priority=0)
    for _ in range(4):
        engine.step()
    engine.add_request("slow", text, PoolingParams(normalize=False), priority=5)
    (slow,) = [output for output in drain(engine) if output.request_id == "slow"]
    assert slow.metrics.num_preemptions > 0
    assert slow.embedding is not None
    wanted = expected(network, slow.prompt_token_ids, PoolingParams(normalize=False))
    torch.testing.assert_close(torch.tensor(slow.embedding).double(), wanted, rtol=1e-4, atol=1e-5)


def test_the_cache_helps_the_last_token_but_not_the_mean(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for pooling, cached in (("last", 0), ("mean", 0), ("last", 56)):
        (output,) = run(engine, [TEXTS[2] + " and so on"], PoolingParams(pooling))
        assert output.num_cached_tokens == cached, pooling


def test_a_prompt_as_long_as_the_model(make_engine: MakeEngine) -> None:
    engine = make_engine()
    (output,) = run(engine, [{"prompt_token_ids": [5] * 256}], PoolingParams())
    assert output.embedding is not None
    with pytest.raises(ValueError, match="the prompt has 257 tokens, allowed are up to 256, max_model_len"):
        engine.add_request("a", {"prompt_token_ids": [5] * 257}, PoolingParams())
    with pytest.raises(ValueError, match="the prompt has 0 tokens"):
        engine.add_request("a", {"prompt_token_ids": []}, PoolingParams())
    with pytest.raises(ValueError, match="need 20 KV blocks of 8 tokens, but the cache has 19"):
        make_engine(num_kv_blocks=19).add_request("a", {"prompt_token_ids": [5] * 153}, PoolingParams())
    with pytest.raises(ValueError, match="resume_token_ids is given with PoolingParams"):
        engine.add_request("a", "a", PoolingParams(), resume_token_ids=[[1]])
    assert_idle(engine)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_hidden_states_that_are_no_numbers(
    make_engine: MakeEngine, network: DecoderModel, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    engine = make_engine()
    forward = network.forward

    def broken(token_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        hidden = forward(token_ids, *rest)
        hidden[token_ids == 7] = value
        return hidden

    monkeypatch.setattr(network, "forward", broken)
    engine.add_request("bad", {"prompt_token_ids": [5, 7, 9]}, PoolingParams())
    engine.add_request("good", {"prompt_token_ids": [5, 8, 9]}, PoolingParams())
    last = {output.request_id: output for output in drain(engine)}
    assert last["bad"].embedding is None
    assert last["bad"].outputs[0].finish_reason == "error"
    assert "not finite" in str(last["bad"].outputs[0].stop_reason)
    assert last["good"].embedding is not None


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"pooling": "max"}, "pooling is 'max', allowed are 'mean' and 'last'"),
        ({"normalize": 1}, "normalize is 1, allowed are True and False"),
    ],
)
def test_bad_parameters(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PoolingParams(**values)


def test_the_fronts() -> None:
    llm = LLM(TinySource(), max_model_len=128, num_kv_blocks=64, quiet=True)
    outputs = llm.embed(TEXTS, use_tqdm=False)
    assert [len(output.embedding or []) for output in outputs] == [32] * len(TEXTS)
    (alone,) = llm.embed(TEXTS[3], PoolingParams("last"), use_tqdm=False)
    assert alone.embedding != outputs[3].embedding
    with pytest.raises(ValueError, match="pooling_params has 1 entries, expected one or 5"):
        llm.embed(TEXTS, [PoolingParams()], use_tqdm=False)
    front = AsyncEngine(llm.engine)

    async def embed(index: int) -> Any:
        return [output async for output in front.generate(TEXTS[index], PoolingParams(), str(index))]

    async def all_of_them() -> Any:
        return await asyncio.gather(*map(embed, range(len(TEXTS))))

    found = asyncio.run(asyncio.wait_for(all_of_them(), 60))
    front.close()
    assert [len(o) for o in found] == [1] * len(TEXTS)
    for (one,), other in zip(found, outputs, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
