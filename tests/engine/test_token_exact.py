"""Greedy tokens equal those of Hugging Face transformers in fp32 on the CPU, however the engine batches the work.

50 prompts x 64 tokens: alone, batched at random, prefilled in chunks, with prefix hits, with forced preemption, and all of it
mixed by schedules that hypothesis draws. Gemma 3 does a part of it by default, and everything under the marker `slow`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastattn.engine.engine import Engine
from fastattn.engine.kv_cache import MIN_COPIED_TOKENS
from fastattn.engine.sampling_params import SamplingParams
from fastattn.models.loader import ModelFileError, open_model
from fastattn.models.registry import load_model
from tests.engine.exact import Exact, hf_model
from tests.engine.prompts import PROMPTS
from tests.engine.tiny import assert_idle, make_engine

pytestmark = [pytest.mark.timeout(1800), pytest.mark.long]

CASES = [
    pytest.param(("smollm2", 50, 64), id="smollm2"),
    pytest.param(("gemma3-270m", 8, 24), id="gemma3-270m-part"),
    pytest.param(("gemma3-270m", 50, 64), id="gemma3-270m", marks=pytest.mark.slow),
]
_OPENED: dict[tuple[str, int, int], Exact] = {}


@pytest.fixture(params=CASES)
def exact(request: pytest.FixtureRequest) -> Exact:
    """Loaded once a session, so that what transformers says is asked once."""
    return opened(request.param)


def opened(case: tuple[str, int, int]) -> Exact:
    name, num_prompts, num_tokens = case
    if case not in _OPENED:
        try:
            source = open_model(name)
        except ModelFileError as error:
            pytest.skip(f"{name} cannot be had: {error}")
        tokenizer = source.tokenizer()
        _OPENED[case] = Exact(
            source,
            load_model(source, torch.device("cpu"), torch.float32, 1024),
            tokenizer,
            hf_model(source),
            # Every sixth and so on, so that a part has some of each kind.
            [tokenizer.encode(prompt) for prompt in PROMPTS[:: len(PROMPTS) // num_prompts][:num_prompts]],
            num_tokens,
        )
    return _OPENED[case]


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes, what it wants, and after how many steps in the engine it is aborted."""

    prompt: int
    step: int = 0
    num_tokens: int = 64
    priority: int = 0
    abort_after: int | None = None


def engine_for(exact: Exact, **options: Any) -> Engine:
    defaults = {"max_model_len": 1024, "num_kv_blocks": 600, "block_size": 16, "enable_prefix_caching": False}
    return make_engine(exact.network, exact.tokenizer, **(defaults | options))


def serve(exact: Exact, engine: Engine, arrivals: Sequence[Arrival]) -> None:
    """Runs the arrivals to their ends and compares every token of each, those of the aborted too."""
    tokens: dict[int, list[int]] = {}
    for step in range(100_000):
        for index, arrival in enumerate(arrivals):
            if arrival.step == step:
                params = SamplingParams(
                    temperature=0, max_tokens=min(arrival.num_tokens, exact.num_tokens), ignore_eos=True
                )
                prompt = {"prompt_token_ids": exact.prompts[arrival.prompt]}
                engine.add_request(str(index), prompt, params, priority=arrival.priority)
                tokens[index] = []
            if arrival.abort_after is not None and arrival.step + arrival.abort_after == step:
                engine.abort_request(str(index))
        for output in engine.step():
            tokens[int(output.request_id)] = output.outputs[0].token_ids
        if len(tokens) == len(arrivals) and not engine.has_unfinished_requests():
            break
    assert_idle(engine)
    for index, arrival in enumerate(arrivals):
        if arrival.abort_after is None:
            assert len(tokens[index]) == min(arrival.num_tokens, exact.num_tokens)
        exact.compare(arrival.prompt, tokens[index])


def all_at_once(exact: Exact) -> list[Arrival]:
    return [Arrival(prompt) for prompt in range(len(exact.prompts))]


def test_alone(exact: Exact) -> None:
    engine = engine_for(exact)
    for prompt in range(len(exact.prompts)):
        serve(exact, engine, [Arrival(prompt)])


def test_the_judge_is_what_generate_says(exact: Exact) -> None:
    """The tokens found by checking a draft are those of transformers' own generation with its own cache."""
    for index in range(0, len(exact.prompts), max(1, len(exact.prompts) // 4)):
        ids = torch.tensor([exact.prompts[index]])
        with torch.inference_mode():
            out = exact.judge.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=exact.num_tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
        exact.compare(index, out[0, ids.shape[1] :].tolist())


def test_batched_at_random(exact: Exact) -> None:
    rng = random.Random(0)
    arrivals = [Arrival(prompt, rng.randrange(60)) for prompt in range(len(exact.prompts))]
    serve(exact, engine_for(exact), sorted(arrivals, key=lambda _: rng.random()))


def test_chunked_prefill(exact: Exact) -> None:
    serve(exact, engine_for(exact, max_num_batched_tokens=19, max_num_seqs=16), all_at_once(exact))


def test_a_head_that_draws(exact: Exact, monkeypatch: pytest.MonkeyPatch, rows_of_heads: list[int]) -> None:
    """As on a GPU: the head is a matrix, which gives tokens and no logits."""
    monkeypatch.setattr(exact.network, "packed_head", None)
    arrivals = [Arrival(prompt, num_tokens=8 + 4 * prompt) for prompt in range(5)]
    serve(exact, engine_for(exact, max_num_batched_tokens=61), arrivals)
    assert min(rows_of_heads) == 1 and max(rows_of_heads) >= 4


def num_hits(prompt: list[int], cached: list[list[int]]) -> int:
    """Tokens that are not computed: whole blocks of 16 that a cached one begins with, and of the next block the beginning
    that is copied. The last token is computed anew; of what is cached the last block is missing if it is not full."""
    most = 0
    for other in cached:
        pairs = zip(prompt[:-1], other[: len(other) // 16 * 16], strict=False)
        most = max(most, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return most if most % 16 >= MIN_COPIED_TOKENS else most // 16 * 16


def test_prefix_hits(exact: Exact) -> None:
    engine = engine_for(exact, enable_prefix_caching=True)
    prompts = exact.prompts
    for prompt in range(len(prompts)):  # one by one, so that those with the same beginning find it
        serve(exact, engine, [Arrival(prompt, num_tokens=1)])
    num_shared = engine.stats().num_prefix_hit_tokens
    expected = [num_hits(prompt, prompts[:i]) for i, prompt in enumerate(prompts)]
    assert num_shared == sum(expected)
    if len(prompts) == len(PROMPTS):  # a part of them may have none that ends inside a block
        assert any(hits % 16 > 0 for hits in expected)
    serve(exact, engine, all_at_once(exact))
    assert engine.stats().num_prefix_hit_tokens == num_shared + sum(num_hits(prompt, prompts) for prompt in prompts)


def test_forced_preemption(exact: Exact) -> None:
    longest = max(map(len, exact.prompts)) + exact.num_tokens
    engine = engine_for(exact, num_kv_blocks=-(-longest // 8) + 6, block_size=8)
    serve(exact, engine, all_at_once(exact))
    assert engine.stats().num_preemptions > len(exact.prompts) // 8


@st.composite
def schedules(draw: st.DrawFn) -> tuple[dict[str, Any], list[tuple[float, int, int, int, int | None]]]:
    """Engine options, and requests as (which prompt as a fraction, step, tokens, priority, abort)."""
    options = {
        "max_num_batched_tokens": draw(st.sampled_from([7, 16, 61, 256])),
        "max_num_seqs": draw(st.integers(2, 8)),
        "spare_blocks": draw(st.sampled_from([0, 3, 20])),
        "enable_prefix_caching": draw(st.booleans()),
        "policy": draw(st.sampled_from(["fcfs", "priority"])),
        "block_size": draw(st.sampled_from([8, 16, 32])),
        "async_scheduling": draw(st.booleans()),
    }
    if options["enable_prefix_caching"]:
        options["num_host_kv_blocks"] = draw(st.sampled_from([0, 4, 100]))
    request = st.tuples(
        st.floats(0, 0.999),
        st.integers(0, 30),
        st.integers(1, 32),
        st.integers(0, 2),
        st.one_of(st.none(), st.none(), st.integers(0, 30)),
    )
    return options, draw(st.lists(request, min_size=4, max_size=10))


def mixed(exact: Exact, drawn: tuple[dict[str, Any], list[tuple[float, int, int, int, int | None]]]) -> None:
    options, requests = dict(drawn[0]), drawn[1]
    arrivals = [Arrival(int(at * len(exact.prompts)), *rest) for at, *rest in requests]
    longest = max(len(exact.prompts[arrival.prompt]) + arrival.num_tokens for arrival in arrivals)
    num_blocks = -(-longest // options["block_size"]) + options.pop("spare_blocks")
    serve(exact, engine_for(exact, num_kv_blocks=num_blocks, **options), arrivals)


_SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}


@given(drawn=schedules())
@settings(max_examples=12, derandomize=True, **_SETTINGS)  # type: ignore[arg-type]
def test_mixed_schedules(drawn: Any) -> None:
    mixed(opened(("smollm2", 50, 64)), drawn)


@given(drawn=schedules())
@settings(max_examples=3, derandomize=True, **_SETTINGS)  # type: ignore[arg-type]
def test_mixed_schedules_of_gemma(drawn: Any) -> None:
    mixed(opened(("gemma3-270m", 8, 24)), drawn)


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[0], CASES[2]])
def test_many_mixed_schedules(case: tuple[str, int, int]) -> None:
    """New ones each time."""

    @given(drawn=schedules())
    @settings(max_examples=60, derandomize=False, **_SETTINGS)  # type: ignore[arg-type]
    def check(drawn: Any) -> None:
        mixed(opened(case), drawn)

    check()
