"""What a request gets, whatever else the engine does."""

from __future__ import annotations

from typing import Any

import pytest

from fastattn.engine.config import EngineConfig
from fastattn.engine.engine import Engine
from fastattn.models.decoder import DecoderModel
from tests.engine.requests import DRAWN, GREEDY, PARAMS, PROMPTS, Alone, MakeEngine, only, with_
from tests.engine.tiny import assert_idle, drain, full_logits, run

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the same answer, whatever else happens ----


@pytest.mark.parametrize("how", PARAMS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_seqs": 2},
        {"max_num_batched_tokens": 5},
        {"num_kv_blocks": 13},
        {"enable_prefix_caching": False},
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 256},
        {"block_size": 16, "num_kv_blocks": 9, "max_num_batched_tokens": 7},
        {"policy": "priority"},
    ],
    ids=str,
)
def test_the_batch_changes_nothing(make_engine: MakeEngine, alone: Alone, how: str, options: dict[str, Any]) -> None:
    params, expected = PARAMS[how], alone(how)
    engine = make_engine(**options)
    together = [only(output) for output in run(engine, PROMPTS, params)]
    again = [only(output) for output in run(engine, PROMPTS[::-1], params)][::-1]
    assert [c.token_ids for c in together] == [c.token_ids for c in expected]
    assert [c.token_ids for c in again] == [c.token_ids for c in expected]
    assert [c.text for c in together] == [c.text for c in expected]
    if options.get("num_kv_blocks", 128) < 20:
        assert engine.stats().num_preemptions > 0


def test_seeds(make_engine: MakeEngine) -> None:
    def tokens(engine: Engine, seed: int | None) -> list[int]:
        return only(run(engine, PROMPTS[:1], with_(DRAWN, seed=seed))[0]).token_ids

    engine = make_engine()
    assert tokens(engine, 3) == tokens(engine, 3)
    assert tokens(engine, 3) != tokens(engine, 4)
    assert tokens(engine, -(2**63)) != tokens(engine, 2**63 - 1)
    # Without a seed each request has its own, but the same engine seed and order give the same again.
    first, second = tokens(make_engine(seed=5), None), tokens(make_engine(seed=6), None)
    assert first != second
    engine = make_engine(seed=5)
    assert tokens(engine, None) == first
    assert tokens(engine, None) != first


def test_n_completions_are_those_of_n_seeds(make_engine: MakeEngine) -> None:
    engine = make_engine()
    (output,) = run(engine, PROMPTS[2:3], with_(DRAWN, n=5))
    assert [c.index for c in output.outputs] == list(range(5))
    alone = [only(run(make_engine(), PROMPTS[2:3], with_(DRAWN, seed=7 + i))[0]) for i in range(5)]
    assert [c.token_ids for c in output.outputs] == [c.token_ids for c in alone]
    assert len({c.text for c in output.outputs}) == 5
    # The prompt's whole blocks are computed once, by the first; the rest by each.
    num_prompt = len(output.prompt_token_ids)
    assert engine.stats().num_prompt_tokens == num_prompt + 4 * (num_prompt - (num_prompt - 1) // 8 * 8)


def test_n_without_a_shared_prefix(make_engine: MakeEngine) -> None:
    expected = [c.token_ids for c in run(make_engine(), PROMPTS[2:3], with_(DRAWN, n=3))[0].outputs]
    engine = make_engine(enable_prefix_caching=False)
    assert [c.token_ids for c in run(engine, PROMPTS[2:3], with_(DRAWN, n=3))[0].outputs] == expected
    engine = make_engine(max_num_seqs=1, num_kv_blocks=14)
    assert [c.token_ids for c in run(engine, PROMPTS[2:3], with_(DRAWN, n=3))[0].outputs] == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.8},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 0.6},
        {"presence_penalty": -1.0, "frequency_penalty": -0.3},
        {"logit_bias": {10: 3.0, 20: -1000.0, 30: 3.5}},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2, "logit_bias": {40: 4.0}},
    ],
    ids=str,
)
def test_penalties(engine: Engine, network: DecoderModel, changes: dict[str, Any]) -> None:
    """Token by token from the formulas, with other requests in the batch that have none."""
    params = with_(GREEDY, max_tokens=20, **changes)
    outputs = run(engine, PROMPTS * 2, [params] * len(PROMPTS) + [GREEDY] * len(PROMPTS))
    plain = [only(output).token_ids[:20] for output in outputs[len(PROMPTS) :]]
    for output in outputs[: len(PROMPTS)]:
        prompt, generated = output.prompt_token_ids, list[int]()
        for _ in range(20):
            logits = full_logits(network, prompt + generated)[-1].double()
            for token in set(prompt + generated):
                factor = params.repetition_penalty
                logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
            for token in set(generated):
                logits[token] -= params.presence_penalty + params.frequency_penalty * generated.count(token)
            for token, bias in (params.logit_bias or {}).items():
                logits[token] += bias
            generated.append(int(logits.argmax()))
        assert only(output).token_ids == generated
    assert [only(output).token_ids for output in outputs[: len(PROMPTS)]] != plain


@pytest.mark.parametrize(
    "options",
    [{}, {"num_kv_blocks": 12}, {"padded": True}, {"max_num_batched_tokens": 7}, {"max_num_seqs": 2}],
    ids=str,
)
def test_copied_beginnings_change_nothing(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Prompts that part after any number of tokens, alone and as completions of one request, and all of them again."""
    base = list(range(2, 42))
    prompts: list[Any] = [{"prompt_token_ids": [*base[:count], 50 + count, 60, 61]} for count in range(1, 40, 2)]
    params = with_(GREEDY, max_tokens=6, n=2)
    expected = run(make_engine(enable_prefix_caching=False), prompts, params)
    engine = make_engine(block_size=8, **options)
    copied: list[tuple[int, int, int, int]] = []
    copy = engine.runner._copy_blocks
    monkeypatch.setattr(engine.runner, "_copy_blocks", lambda copies: (copied.extend(copies), copy(copies))[1])
    for _ in range(2):
        for ours, right in zip(run(engine, prompts, params), expected, strict=True):
            assert [c.token_ids for c in ours.outputs] == [c.token_ids for c in right.outputs]
    assert len(copied) > 20
    assert engine.kv.reset() + engine.kv.pool.num_free >= engine.config.num_kv_blocks


def test_generated_tokens_are_cached_too(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=8)
    (first,) = run(engine, PROMPTS[:1], GREEDY)
    turn = first.prompt_token_ids + only(first).token_ids + [9, 9]
    (second,) = run(engine, [{"prompt_token_ids": turn}], GREEDY)
    # The last generated token was never computed.
    assert second.num_cached_tokens == (len(turn) - 3) // 8 * 8
    assert only(second).token_ids == only(run(make_engine(), [{"prompt_token_ids": turn}], GREEDY)[0]).token_ids


def test_priorities(make_engine: MakeEngine) -> None:
    priorities = [3, 1, 2, 1, 0]

    def order(policy: str) -> list[str]:
        engine = make_engine(policy=policy, max_num_seqs=1)
        for i, priority in enumerate(priorities):
            engine.add_request(str(i), PROMPTS[i], with_(GREEDY, max_tokens=3), priority=priority)
        return [output.request_id for output in drain(engine) if output.finished]

    assert order("priority") == ["4", "1", "3", "2", "0"]
    assert order("fcfs") == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_model_len": 0}, "EngineConfig: max_model_len is 0, allowed is an integer from 1 to 2**31 - 1"),
        ({"max_num_seqs": 2.5}, "EngineConfig: max_num_seqs is 2.5, allowed is an integer from 1 to 2**31 - 1"),
        ({"num_kv_blocks": True}, "EngineConfig: num_kv_blocks is True, allowed is an integer from 1 to 2**31 - 1"),
        ({"block_size": 12}, "EngineConfig: block_size is 12, allowed are 8, 16, 32, 64, 128 and 256"),
        ({"policy": "lifo"}, "EngineConfig: policy is 'lifo', allowed are 'fcfs', 'priority' and 'fair'"),
        (
            {"num_kv_blocks": 2**27},
            "EngineConfig: num_kv_blocks * block_size is 2147483648, allowed is below 2**31",
        ),
        (
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 99},
            "EngineConfig: max_num_batched_tokens is 99, but without chunked prefill a whole prompt must fit a step: "
            "allowed is at least max_model_len = 100",
        ),
    ],
)
def test_bad_configs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        EngineConfig(**({"max_model_len": 100, "num_kv_blocks": 10} | changes))
    assert str(caught.value) == message


def test_idle_steps_do_nothing(engine: Engine) -> None:
    assert engine.step() == []
    assert_idle(engine)
