"""A request that another engine began: wherever it is cut, the rest is what it would have been."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fastattn import AsyncEngine, RequestOutput, SamplingParams
from fastattn.engine.engine import Engine
from tests.engine.tiny import EOS, assert_idle, drain

pytestmark = pytest.mark.usefixtures("one_thread")

MakeEngine = Callable[..., Engine]
PROMPT = "the quick brown fox"
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, output_kind="delta")
DRAWN = replace(GREEDY, temperature=1, seed=7)


def outputs_of(engine: Engine, params: SamplingParams, prompt: Any = PROMPT, **options: Any) -> list[RequestOutput]:
    engine.add_request("a", prompt, params, **options)
    return drain(engine)


def fold(outputs: list[RequestOutput], n: int) -> list[tuple[str, list[int], Any]]:
    """Each completion's whole text, tokens and ending, from "delta" outputs."""
    folded = []
    for index in range(n):
        parts = [output.outputs[index] for output in outputs]
        tokens = [token for part in parts for token in part.token_ids]
        ending = (parts[-1].finish_reason, parts[-1].stop_reason)
        folded.append(("".join(part.text for part in parts), tokens, ending))
    return folded


CASES = {
    "greedy": GREEDY,
    "drawn": DRAWN,
    "penalties": replace(DRAWN, presence_penalty=1.5, frequency_penalty=0.7, repetition_penalty=1.3),
    "bias": replace(DRAWN, logit_bias={40: 3.0, 41: -5.0}, top_k=20, min_p=0.01),
    "end token": replace(DRAWN, ignore_eos=False, logit_bias={EOS: 4.0}, min_tokens=6),
    "stop id": replace(DRAWN, stop_token_ids=[40, 41, 42, 43, 44, 45], min_tokens=9),
    "length": replace(DRAWN, max_tokens=5),
}


@pytest.mark.parametrize("params", CASES.values(), ids=CASES.keys())
def test_cut_everywhere(make_engine: MakeEngine, params: SamplingParams) -> None:
    engine = make_engine()
    whole = outputs_of(engine, params)
    ((text, tokens, ending),) = fold(whole, 1)
    assert ending[0] is not None
    for cut in range(len(tokens) + 1):
        sent = "".join(output.outputs[0].text for output in whole[:cut])
        rest = outputs_of(engine, params, resume_token_ids=[tokens[:cut]])
        assert fold(rest, 1) == [(text[len(sent) :], tokens[cut:], ending)], cut
    assert engine.stats().num_generated_tokens == sum(range(len(tokens) + 1)) + len(tokens)


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_across_the_cut(make_engine: MakeEngine, include: bool) -> None:
    """Every piece of a text as its stop string, cut at every token: what was held back comes, what was sent does not."""
    engine = make_engine()
    ((text, _, _),) = fold(outputs_of(engine, DRAWN), 1)
    held_back = 0
    for start in range(3, len(text) - 4, 4):
        # A second string, never completed, begins like the text: characters are held back and released again.
        stops = (text[start : start + 4], text[start - 3 : start] + "\x00")
        params = replace(DRAWN, stop=stops, include_stop_str_in_output=include)
        whole = outputs_of(engine, params)
        ((stopped, tokens, ending),) = fold(whole, 1)
        assert ending == ("stop", stops[0])
        for cut in range(len(tokens) + 1):
            sent = "".join(output.outputs[0].text for output in whole[:cut])
            held_back += len(sent) < len(engine.tokenizer.decode(tokens[:cut]))
            rest = outputs_of(engine, params, resume_token_ids=[tokens[:cut]])
            assert fold(rest, 1) == [(stopped[len(sent) :], tokens[cut:], ending)], (stops, cut)
    assert held_back > 10


def test_cumulative_outputs_begin_with_what_was_there(make_engine: MakeEngine) -> None:
    engine, params = make_engine(), replace(DRAWN, output_kind="cumulative", logprobs=2)
    whole = outputs_of(engine, params)
    tokens = whole[-1].outputs[0].token_ids
    rest = outputs_of(engine, params, resume_token_ids=[tokens[:10]])
    assert [o.outputs[0].text for o in rest] == [o.outputs[0].text for o in whole[10:]]
    assert rest[-1].outputs[0].token_ids == tokens
    # Log-probabilities of the first ten went with the engine that drew them.
    known, all_of_them = rest[-1].outputs[0].logprobs, whole[-1].outputs[0].logprobs
    assert known is not None
    assert all_of_them is not None
    assert [list(row) for row in known] == [list(row) for row in all_of_them[10:]]


def test_delta_logprobs_belong_to_their_tokens(make_engine: MakeEngine) -> None:
    engine, params = make_engine(), replace(DRAWN, logprobs=1)
    ((_, tokens, _),) = fold(outputs_of(engine, params), 1)
    for output in outputs_of(engine, params, resume_token_ids=[tokens[:7]]):
        (completion,) = output.outputs
        assert completion.logprobs is not None
        assert len(completion.logprobs) == len(completion.token_ids) == 1
        assert completion.token_ids[0] in completion.logprobs[0]


def test_some_of_n_had_ended(make_engine: MakeEngine) -> None:
    engine = make_engine()
    params = replace(DRAWN, n=4, ignore_eos=False, logit_bias={EOS: 3.5})
    whole = fold(outputs_of(engine, params), 4)
    lengths = [len(tokens) for _, tokens, _ in whole]
    assert len(set(lengths)) > 1
    for cut in range(max(lengths) + 1):
        rest = outputs_of(engine, params, resume_token_ids=[tokens[:cut] for _, tokens, _ in whole])
        assert [(tokens, ending) for _, tokens, ending in fold(rest, 4)] == [
            (tokens[cut:], ending) for _, tokens, ending in whole
        ]
        for index, length in enumerate(lengths):
            if length <= cut:  # known by the first output already, and never with text again
                assert rest[0].outputs[index].finish_reason == whole[index][2][0]
                assert all(output.outputs[index].text == "" for output in rest)
    assert rest[-1].finished
    assert len(rest) == 1


def test_in_a_full_engine(make_engine: MakeEngine) -> None:
    """Resumed requests are chunked, preempted and found in the prefix cache like all others."""
    prompts = [PROMPT, "0 1 2 3 4 5 6 7 8 9 and so on", "What is 00?", "the the the"]
    whole = [fold(outputs_of(make_engine(), DRAWN, prompt), 1)[0] for prompt in prompts]
    engine = make_engine(num_kv_blocks=10, max_num_batched_tokens=6)
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, DRAWN, resume_token_ids=[whole[index][1][: 5 * index]])
    rest = drain(engine)
    for index, (_, tokens, ending) in enumerate(whole):
        mine = [output for output in rest if output.request_id == str(index)]
        assert fold(mine, 1)[0][1:] == (tokens[5 * index :], ending)
    assert engine.stats().num_preemptions > 0


@pytest.mark.parametrize(
    ("resumed", "error", "says"),
    [
        ([[5], [6]], ValueError, "resume_token_ids has 2 lists, expected n = 1"),
        ([], ValueError, "resume_token_ids has 0 lists, expected n = 1"),
        ([[5, 10**6]], ValueError, "resume_token_ids[0] has 1000000, allowed are integers from 0 to 106"),
        ([[-1]], ValueError, "resume_token_ids[0] has -1"),
        ([5], TypeError, "resume_token_ids[0] is a int, expected a list"),
        ("ab", TypeError, "resume_token_ids is a str, expected a list of 1 lists"),
        ([[5] * 25], ValueError, "has 25 tokens, but this completion ended after 24 (length)"),
    ],
)
def test_what_cannot_be_resumed(make_engine: MakeEngine, resumed: Any, error: type[Exception], says: str) -> None:
    engine = make_engine()
    with pytest.raises(error) as raised:
        engine.add_request("a", PROMPT, GREEDY, resume_token_ids=resumed)
    assert says in str(raised.value)
    assert engine.step() == []
    assert_idle(engine)


def test_aborted_before_it_was_reported(make_engine: MakeEngine) -> None:
    engine = make_engine()
    ((_, tokens, _),) = fold(outputs_of(engine, GREEDY), 1)
    engine.add_request("a", PROMPT, GREEDY, resume_token_ids=[tokens])
    engine.abort_request("a")
    assert engine.step() == []
    assert_idle(engine)


def test_through_the_front_for_servers(make_engine: MakeEngine) -> None:
    engine = make_engine()
    whole = outputs_of(engine, DRAWN)
    ((text, tokens, ending),) = fold(whole, 1)
    front = AsyncEngine(engine)

    async def rest(cut: int) -> list[RequestOutput]:
        stream = front.generate(PROMPT, DRAWN, "a", resume_token_ids=[tokens[:cut]])
        return [output async for output in stream]

    for cut in (0, 11, len(tokens)):
        sent = "".join(output.outputs[0].text for output in whole[:cut])
        assert fold(asyncio.run(asyncio.wait_for(rest(cut), 60)), 1) == [(text[len(sent) :], tokens[cut:], ending)]
    front.close()
