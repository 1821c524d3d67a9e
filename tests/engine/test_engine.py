"""What a request may ask of the engine: where it ends, what it reports, what it must not disturb."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from fastattn.engine.config import EngineConfig
from fastattn.engine.engine import Engine, EngineBusyError
from fastattn.engine.outputs import CompletionOutput, RequestOutput
from fastattn.engine.sampling_params import SamplingParams
from fastattn.models.decoder import DecoderModel
from fastattn.models.tokenizer import Tokenizer
from tests.engine.tiny import EOS, assert_idle, drain, full_logits, run
from tests.engine.tiny import make_engine as make_engine_of

pytestmark = pytest.mark.usefixtures("one_thread")

MakeEngine = Callable[..., Engine]
Alone = Callable[[str], list[CompletionOutput]]
PROMPTS = [
    "the quick brown fox",
    "a",
    "0 1 2 3 4 5 6 7 8 9 and so on, and so on, and so on",
    "What is 00?",
    "the the the",
]
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
DRAWN = SamplingParams(temperature=1, seed=7, max_tokens=40, ignore_eos=True)
PARAMS = {"greedy": GREEDY, "drawn": DRAWN}


def only(output: RequestOutput) -> CompletionOutput:
    (completion,) = output.outputs
    return completion


def with_(params: SamplingParams, **changes: Any) -> SamplingParams:
    return dataclasses.replace(params, **changes)


# ---- the same answer, whatever else happens ----


@pytest.fixture(scope="module")
def alone(network: DecoderModel, tokenizer: Tokenizer) -> Alone:
    """What each prompt gives with nobody beside it, computed once."""

    @functools.cache
    def outputs(how: str) -> list[CompletionOutput]:
        return [only(run(make_engine_of(network, tokenizer), [prompt], PARAMS[how])[0]) for prompt in PROMPTS]

    return outputs


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


# ---- where it ends ----


def test_stop_strings(engine: Engine, tokenizer: Tokenizer) -> None:
    """Every short piece of a text as its stop string, most of them across the borders of tokens."""
    text, token_ids = (base := only(run(engine, PROMPTS[:1], DRAWN)[0])).text, base.token_ids
    stops = sorted({text[i : i + length] for length in (1, 2, 3, 5) for i in range(0, len(text) - length, 3)})
    cases = [(stop, include) for stop in stops if "\ufffd" not in stop for include in (False, True)]
    params = [with_(DRAWN, stop=stop, include_stop_str_in_output=include) for stop, include in cases]
    borders = 0
    for (stop, include), output in zip(cases, run(engine, PROMPTS[:1] * len(cases), params), strict=True):
        completion, at = only(output), text.index(stop)
        assert completion.text == text[: at + len(stop) if include else at], (stop, include)
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
        assert completion.token_ids == token_ids[: len(completion.token_ids)]
        # It ends with the token that completed the string, not later.
        assert stop in tokenizer.decode(completion.token_ids)
        assert stop not in tokenizer.decode(completion.token_ids[:-1])
        borders += stop not in tokenizer.token_text(completion.token_ids[-1])
    assert borders > 10


def test_the_earliest_of_several_stop_strings_wins(engine: Engine) -> None:
    text = only(run(engine, PROMPTS[:1], DRAWN)[0]).text
    late, early, never = text[20:22], text[8:12], "never said"
    completion = only(run(engine, PROMPTS[:1], with_(DRAWN, stop=[late, never, early]))[0])
    assert (completion.text, completion.stop_reason) == (text[: text.index(early)], early)


def test_what_may_become_a_stop_string_is_held_back(engine: Engine) -> None:
    """A stream never shows a character that a stop string takes away later, and shows all when it did not come."""
    text = only(run(engine, PROMPTS[:1], DRAWN)[0]).text
    for stop, expected in ((text[10:14], text[: text.index(text[10:14])]), (text[10:14] + "\x00", text)):
        engine.add_request("r", PROMPTS[0], with_(DRAWN, stop=stop, output_kind="delta"))
        shown = ""
        for output in drain(engine):
            shown += only(output).text
            assert expected.startswith(shown)
        assert shown == expected


def test_stop_token_ids(engine: Engine, tokenizer: Tokenizer) -> None:
    base = only(run(engine, PROMPTS[:1], DRAWN)[0]).token_ids
    for token in set(base[3:20]):
        completion = only(run(engine, PROMPTS[:1], with_(DRAWN, stop_token_ids=[token, 98]))[0])
        end = min(base.index(t) for t in (token, 98) if t in base)
        assert completion.token_ids == base[: end + 1]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", base[end])
        assert completion.text == tokenizer.decode(base[:end]).rstrip("\ufffd")


def test_the_end_token(engine: Engine) -> None:
    likely = with_(DRAWN, logit_bias={EOS: 100.0}, max_tokens=12)
    ended, went_on, delayed = (
        only(output)
        for output in run(
            engine,
            PROMPTS[:1] * 3,
            [with_(likely, ignore_eos=False), likely, with_(likely, ignore_eos=False, min_tokens=5)],
        )
    )
    assert (ended.token_ids, ended.text, ended.finish_reason, ended.stop_reason) == ([EOS], "", "stop", EOS)
    assert (went_on.token_ids, went_on.finish_reason, went_on.stop_reason) == ([EOS] * 12, "length", None)
    assert EOS not in delayed.token_ids[:5]
    assert delayed.token_ids[5:] == [EOS]


def test_min_tokens_delays_stop_tokens_and_strings(engine: Engine) -> None:
    base = only(run(engine, PROMPTS[:1], DRAWN)[0])
    banned = only(run(engine, PROMPTS[:1], with_(DRAWN, stop_token_ids=base.token_ids[:8], min_tokens=20))[0])
    assert not set(banned.token_ids[:20]) & set(base.token_ids[:8])
    stop = base.text[4]
    later = only(run(engine, PROMPTS[:1], with_(DRAWN, stop=stop, min_tokens=20))[0])
    assert later.token_ids == base.token_ids[: len(later.token_ids)]
    assert len(later.token_ids) >= 20


def test_length_ends_at_max_tokens_and_at_the_models_length(make_engine: MakeEngine) -> None:
    engine = make_engine(max_model_len=32)
    for max_tokens in (1, 2, 9):
        completion = only(run(engine, ["the"], with_(GREEDY, max_tokens=max_tokens))[0])
        assert (len(completion.token_ids), completion.finish_reason) == (max_tokens, "length")
    for max_tokens in (None, 1000):
        (output,) = run(engine, ["the quick"], with_(GREEDY, max_tokens=max_tokens))
        assert len(output.prompt_token_ids) + len(only(output).token_ids) == 32
    (output,) = run(engine, [{"prompt_token_ids": [5] * 31}], GREEDY)
    assert len(only(output).token_ids) == 1


def test_text_is_what_the_tokenizer_says(engine: Engine, tokenizer: Tokenizer) -> None:
    for output in run(engine, PROMPTS, with_(DRAWN, max_tokens=100)):
        completion = only(output)
        rest = tokenizer.decode(completion.token_ids).removeprefix(completion.text)
        assert rest in ("", "\ufffd")  # the beginning of a character that never came is not shown


def test_special_tokens_in_the_text(engine: Engine) -> None:
    params = with_(GREEDY, logit_bias={EOS: 100.0}, max_tokens=2)
    hidden, shown = run(engine, ["a", "a"], [params, with_(params, skip_special_tokens=False)])
    assert (only(hidden).text, only(shown).text) == ("", "</s></s>")


# ---- what it reports ----


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 5, "num_kv_blocks": 13}], ids=str)
def test_logprobs(make_engine: MakeEngine, network: DecoderModel, options: dict[str, Any]) -> None:
    """Against a log-softmax of the whole text at once; also in pieces, and when computed again after a preemption."""
    engine = make_engine(**options)
    # Temperature, penalties and bias move the draw, but the log-probabilities are the model's own.
    params = with_(
        DRAWN, temperature=1.5, presence_penalty=0.5, logit_bias={9: 2.0}, logprobs=3, prompt_logprobs=2, max_tokens=30
    )
    for output in run(engine, PROMPTS, params):
        completion, num_prompt = only(output), len(output.prompt_token_ids)
        token_ids = output.prompt_token_ids + completion.token_ids
        expected = torch.log_softmax(full_logits(network, token_ids).double(), dim=-1)
        assert completion.logprobs is not None
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == num_prompt
        assert len(completion.logprobs) == len(completion.token_ids)
        rows = [(i, output.prompt_logprobs[i], 2) for i in range(1, num_prompt)]
        rows += [(num_prompt + i, row, 3) for i, row in enumerate(completion.logprobs)]
        for position, row, num_top in rows:
            assert row is not None
            of_row = expected[position - 1]
            best = torch.sort(of_row, descending=True, stable=True).indices.tolist()
            assert set(row) == {token_ids[position], *best[:num_top]}
            for token, entry in row.items():
                assert entry.logprob == pytest.approx(of_row[token].item(), abs=1e-4)
                assert entry.rank == best.index(token) + 1
                assert entry.decoded_token == engine.tokenizer.token_text(token)
        total = sum(row[token].logprob for row, token in zip(completion.logprobs, completion.token_ids, strict=True))
        assert completion.cumulative_logprob == pytest.approx(total, abs=1e-4)
    if options:
        assert engine.stats().num_preemptions > 0


def test_logprobs_of_none_and_of_the_chosen_alone(engine: Engine) -> None:
    without, chosen = run(engine, ["the", "the"], [GREEDY, with_(GREEDY, logprobs=0, prompt_logprobs=0)])
    assert (only(without).logprobs, only(without).cumulative_logprob, without.prompt_logprobs) == (None, None, None)
    completion = only(chosen)
    assert [list(row) for row in completion.logprobs or []] == [[token] for token in completion.token_ids]
    assert all(row[token].rank == 1 for row, token in zip(completion.logprobs or [], completion.token_ids, strict=True))


def test_prompt_logprobs_of_one_token(engine: Engine) -> None:
    (output,) = run(engine, [{"prompt_token_ids": [5]}], with_(GREEDY, prompt_logprobs=3))
    assert output.prompt_logprobs == [None]


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


@pytest.mark.parametrize("n", [1, 3])
def test_deltas_make_the_whole(make_engine: MakeEngine, n: int) -> None:
    """The three kinds of output of the same requests, through preemptions."""
    engine = make_engine(num_kv_blocks=16, max_num_batched_tokens=24)
    base = with_(DRAWN, n=n, logprobs=1, stop=["zz", "="])
    seen: dict[str, list[RequestOutput]] = {}
    for kind in ("delta", "cumulative", "final"):
        for i, prompt in enumerate(PROMPTS):
            engine.add_request(f"{kind} {i}", prompt, with_(base, output_kind=kind, seed=i))
    for output in drain(engine):
        seen.setdefault(output.request_id, []).append(output)
    for i in range(len(PROMPTS)):
        deltas, cumulative, (final,) = (seen[f"{kind} {i}"] for kind in ("delta", "cumulative", "final"))
        for index, whole in enumerate(final.outputs):
            parts = [output.outputs[index] for output in deltas]
            assert "".join(part.text for part in parts) == whole.text
            assert [token for part in parts for token in part.token_ids] == whole.token_ids
            # The values may differ in the last bits, as the batches did; the tokens may not.
            assert [list(row) for part in parts for row in part.logprobs or []] == [*map(list, whole.logprobs or [])]
            growing = [output.outputs[index] for output in cumulative]
            assert (growing[-1].text, growing[-1].token_ids) == (whole.text, whole.token_ids)
            for earlier, later in pairwise(growing):
                assert later.text.startswith(earlier.text)
                assert later.token_ids[: len(earlier.token_ids)] == earlier.token_ids
        for outputs in (deltas, cumulative, [final]):
            assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert engine.stats().num_preemptions > 0


def test_metrics(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1)
    first, second = run(engine, PROMPTS[:2], GREEDY)
    for output in (first, second):
        m = output.metrics
        assert m.first_scheduled_time is not None
        assert m.first_token_time is not None
        assert m.finished_time is not None
        assert m.arrival_time <= m.first_scheduled_time < m.first_token_time < m.finished_time
        assert m.time_to_first_token == m.first_token_time - m.arrival_time
        assert m.num_preemptions == 0
    # One at a time, so the second waited for the first.
    assert (second.metrics.first_scheduled_time or 0) >= (first.metrics.finished_time or 1e99)


def test_stats(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2)
    for i in range(3):
        engine.add_request(str(i), PROMPTS[i], with_(GREEDY, max_tokens=4))
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_steps) == (2, 1, 1)
    assert stats.num_usable_kv_blocks < stats.num_kv_blocks == 128
    num_prompt = sum(len(output.prompt_token_ids) for output in drain(engine) if output.finished)
    stats = engine.stats()
    assert (stats.num_prompt_tokens, stats.num_generated_tokens, stats.num_steps) == (num_prompt, 12, 8)
    assert (stats.num_prefix_queried_tokens, stats.num_prefix_hit_tokens) == (num_prompt, 0)


def test_cached_tokens(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=8)

    def num_cached(count: int, tenant: str = "", params: SamplingParams = GREEDY) -> int:
        engine.add_request("r", {"prompt_token_ids": list(range(2, 2 + count))}, params, tenant=tenant)
        return drain(engine)[-1].num_cached_tokens

    assert num_cached(40) == 0
    # One token at least is computed, since its logits are wanted.
    assert [num_cached(count) for count in (40, 41, 39, 8, 9, 60)] == [39, 40, 38, 7, 8, 40]
    assert [num_cached(40, "other"), num_cached(40, "other"), num_cached(40, "")] == [0, 39, 39]
    assert num_cached(40, "", with_(GREEDY, prompt_logprobs=1)) == 0
    engine.kv.reset()
    assert num_cached(40) == 0
    engine = make_engine(enable_prefix_caching=False)
    assert [num_cached(40), num_cached(40)] == [0, 0]
    assert engine.kv.pool.num_free == 128


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


# ---- ends that nobody planned ----


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


def test_priorities(make_engine: MakeEngine) -> None:
    priorities = [3, 1, 2, 1, 0]

    def order(policy: str) -> list[str]:
        engine = make_engine(policy=policy, max_num_seqs=1)
        for i, priority in enumerate(priorities):
            engine.add_request(str(i), PROMPTS[i], with_(GREEDY, max_tokens=3), priority=priority)
        return [output.request_id for output in drain(engine) if output.finished]

    assert order("priority") == ["4", "1", "3", "2", "0"]
    assert order("fcfs") == ["0", "1", "2", "3", "4"]


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


class Faulty:
    """A model whose forward pass or logits go wrong in one step."""

    def __init__(self, network: DecoderModel, bad_step: int, fault: BaseException | None = None) -> None:
        self.network, self.config, self.bad_step, self.fault = network, network.config, bad_step, fault
        self.num_steps, self.tp = 0, network.tp

    def __call__(self, *args: Any) -> torch.Tensor:
        self.num_steps += 1
        if self.fault is not None and self.num_steps == self.bad_step:
            raise self.fault
        hidden: torch.Tensor = self.network(*args)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.network.logits(hidden)
        if self.fault is None and self.num_steps == self.bad_step:
            logits[1] = float("nan")
        return logits


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
