"""Ends that nobody planned: aborts, refused requests, steps that fail."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from fastattn.engine.engine import Engine, EngineBusyError
from fastattn.engine.sampling_params import SamplingParams
from fastattn.models.decoder import DecoderModel
from tests.engine.requests import GREEDY, PROMPTS, Alone, Faulty, MakeEngine, only, with_
from tests.engine.tiny import drain, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("num_steps", [0, 1, 2, 4, 12, 30])
@pytest.mark.parametrize("n", [1, 2])
def test_abort_at_each_stage(make_engine: MakeEngine, alone: Alone, num_steps: int, n: int) -> None:
    """Waiting, in the middle of a prompt, generating, preempted: the blocks come back and the others do not notice."""
    expected = [completion.token_ids for completion in alone("greedy")]
    for victim in range(len(PROMPTS)):
        engine = make_engine(max_num_batched_tokens=16, num_kv_blocks=13)
        for i, prompt in enumerate(PROMPTS):
            engine.add_request(str(i), prompt, with_(GREEDY, n=n) if i == victim else GREEDY)
        outputs = []
        for _ in range(num_steps):
            outputs += engine.step()
        free = engine.stats().num_usable_kv_blocks
        last = engine.abort_request(str(victim))
        if last is not None:
            assert last.finished
            assert {c.finish_reason for c in last.outputs} <= {"abort", "length"}
            assert engine.stats().num_usable_kv_blocks >= free
            assert last.metrics.finished_time is not None
        assert engine.abort_request(str(victim)) is None
        outputs += drain(engine)
        ends = {output.request_id: output for output in outputs if output.finished}
        others = [i for i in range(len(PROMPTS)) if i != victim]
        assert [only(ends[str(i)]).token_ids for i in others] == [expected[i] for i in others]
        if last is not None:
            assert str(victim) not in ends
            for completion in last.outputs:
                assert completion.token_ids == expected[victim][: len(completion.token_ids)]


def test_abort_of_an_unknown_request(engine: Engine) -> None:
    assert engine.abort_request("nobody") is None


def test_abort_of_many_that_wait_is_quick(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1)
    for i in range(5000):
        engine.add_request(str(i), {"prompt_token_ids": [5, 6]}, GREEDY)
    engine.step()
    for i in range(5000):
        if i != 4321:
            assert engine.abort_request(str(i)) is not None
    assert engine.stats().num_waiting == 1
    assert len(engine.scheduler.waiting._heap._entries) < 100
    (last,) = [output for output in drain(engine) if output.finished]
    assert last.request_id == "4321"


REFUSED = [
    ("", {}, "add_request: prompt is a NoneType, expected a string or {'prompt_token_ids': [...]}", {"prompt": None}),
    ("", {}, "add_request: prompt is a dict, expected a string or {'prompt_token_ids': [...]}", {"prompt": {"text": "a"}}),
    ("", {}, "add_request: prompt_token_ids is a str, expected a list of integers", {"prompt": {"prompt_token_ids": "a"}}),
    ("", {}, "add_request: the prompt has 0 tokens, expected at least 1", {"prompt": {"prompt_token_ids": []}}),
    ("", {}, "add_request: prompt_token_ids has -1, allowed are integers from 0 to 106", {"prompt": {"prompt_token_ids": [3, -1]}}),
    ("", {}, "add_request: prompt_token_ids has 107, allowed are integers from 0 to 106", {"prompt": {"prompt_token_ids": [107]}}),
    ("", {}, "add_request: prompt_token_ids has True, allowed are integers from 0 to 106", {"prompt": {"prompt_token_ids": [True]}}),
    ("", {}, "add_request: prompt_token_ids has 1.0, allowed are integers from 0 to 106", {"prompt": {"prompt_token_ids": [1.0]}}),
    ("", {}, "add_request: the prompt has 64 tokens, allowed are up to 63, max_model_len less one to generate", {"prompt": {"prompt_token_ids": [5] * 64}}),
    ("", {}, "add_request: 40 prompt and up to 24 new tokens need 8 KV blocks of 8 tokens, but the cache has 5", {"prompt": {"prompt_token_ids": [5] * 40}}),
    ("", {"logit_bias": {107: 1.0}}, "add_request: logit_bias or stop_token_ids has 107, allowed are ids from 0 to 106", {}),
    ("", {"stop_token_ids": [500]}, "add_request: logit_bias or stop_token_ids has 500, allowed are ids from 0 to 106", {}),
    ("", {}, "add_request: params is a dict, expected SamplingParams or PoolingParams", {"params": {}}),
    ("", {}, "add_request: request_id 'taken' is already in use", {"request_id": "taken"}),
    ("", {}, "add_request: request_id is 7, expected str", {"request_id": 7}),
    ("", {}, "add_request: priority is 'high', expected int", {"priority": "high"}),
    ("", {}, "add_request: tenant is None, expected str", {"tenant": None}),
    ("busy", {"n": 3}, "1 requests are waiting, allowed are 3", {}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "params", "message", "changes"), REFUSED, ids=[case[2] for case in REFUSED])
def test_refused_requests(
    make_engine: MakeEngine, error: str, params: dict[str, Any], message: str, changes: dict[str, Any]
) -> None:
    """One line that names both numbers; nothing is queued, and the engine goes on."""
    engine = make_engine(max_model_len=64, num_kv_blocks=5, max_num_waiting=3)
    engine.add_request("taken", "the", with_(GREEDY, max_tokens=5))
    call: dict[str, Any] = {"request_id": "r", "prompt": "the", "params": SamplingParams(max_tokens=24, **params)}
    with pytest.raises(EngineBusyError if error == "busy" else (TypeError, ValueError)) as caught:
        engine.add_request(**(call | changes))
    assert str(caught.value) == message
    assert engine.stats().num_waiting == 1
    assert [output.request_id for output in drain(engine) if output.finished] == ["taken"]


@pytest.mark.parametrize("bad_step", [1, 2, 7])
def test_a_step_that_fails(
    make_engine: MakeEngine, network: DecoderModel, bad_step: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Its requests end with the error, those that waited go on, and the blocks come back."""
    expected = [only(output).token_ids for output in run(make_engine(), PROMPTS, GREEDY)]
    engine = make_engine(max_num_seqs=3, max_num_batched_tokens=40)
    engine.runner.model = Faulty(network, bad_step, RuntimeError("out of magic"))  # type: ignore[assignment]
    completions = [only(output) for output in run(engine, PROMPTS, GREEDY)]
    failed = [i for i, c in enumerate(completions) if c.finish_reason == "error"]
    assert failed in ([0, 1], [0, 1, 2])
    for i, completion in enumerate(completions):
        assert completion.token_ids == expected[i][: len(completion.token_ids)]
        assert completion.stop_reason == ("RuntimeError: out of magic" if i in failed else None)
        assert len(completion.token_ids) < 7 if i in failed else len(completion.token_ids) == 40
    assert "out of magic" in caplog.text
    assert [only(output).token_ids for output in run(engine, PROMPTS, GREEDY)] == expected


def test_logits_that_are_not_numbers_end_one_request(make_engine: MakeEngine, network: DecoderModel) -> None:
    expected = [only(output).token_ids for output in run(make_engine(), PROMPTS[:3], GREEDY)]
    engine = make_engine()
    engine.runner.model = Faulty(network, 4)  # type: ignore[assignment]
    params = [GREEDY, with_(GREEDY, logprobs=2), GREEDY]
    completions = [only(output) for output in run(engine, PROMPTS[:3], params)]
    assert [c.finish_reason for c in completions] == ["length", "error", "length"]
    assert completions[1].stop_reason == "the logits are not finite"
    assert completions[1].token_ids == expected[1][:3]
    assert len(completions[1].logprobs or []) == 3
    assert [completions[0].token_ids, completions[2].token_ids] == [expected[0], expected[2]]


def test_a_lost_device_ends_the_engine(engine: Engine, network: DecoderModel) -> None:
    engine.runner.model = Faulty(network, 1, torch.AcceleratorError("the GPU fell off the bus"))  # type: ignore[assignment]
    engine.add_request("r", "the", GREEDY)
    with pytest.raises(torch.AcceleratorError):
        engine.step()


def test_nothing_leaks_in_a_long_random_run(make_engine: MakeEngine) -> None:
    """Hundreds of requests of every kind that come, end and are aborted at random times, in a cache that is too small."""
    rng = random.Random(0)
    engine = make_engine(num_kv_blocks=20, max_num_batched_tokens=20, max_num_seqs=6, policy="priority")
    alive: list[str] = []
    reasons: dict[str | None, int] = {}
    for step in range(600):
        if rng.random() < 0.4:
            params = SamplingParams(
                n=rng.choice([1, 1, 1, 3]),
                temperature=rng.choice([0.0, 1.0]),
                max_tokens=rng.randint(1, 30),
                stop=rng.choice([None, ["a", "zq"]]),
                logprobs=rng.choice([None, 2]),
                prompt_logprobs=rng.choice([None, None, 1]),
                repetition_penalty=rng.choice([1.0, 1.2]),
                output_kind=rng.choice(["delta", "cumulative", "final"]),
            )
            prompt = rng.choice(PROMPTS)[: rng.randint(1, 50)]
            engine.add_request(str(step), prompt, params, priority=rng.randrange(3), tenant=rng.choice(["", "t"]))
            alive.append(str(step))
        if alive and rng.random() < 0.1:
            engine.abort_request(alive.pop(rng.randrange(len(alive))))
        for output in engine.step():
            if output.finished:
                alive.remove(output.request_id)
                for completion in output.outputs:
                    reasons[completion.finish_reason] = reasons.get(completion.finish_reason, 0) + 1
    drain(engine)
    assert set(reasons) == {"stop", "length"}
    assert min(reasons.values()) > 20
    assert engine.stats().num_preemptions > 20
    engine.kv.reset()
    assert engine.kv.pool.num_free == 20
