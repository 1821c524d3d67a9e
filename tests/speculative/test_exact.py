"""With speculation each request gets the tokens, texts, endings and log-probabilities that it gets without, whoever guesses,
however the engine batches, caches and preempts, and whatever the request asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastattn._runtime import TokenSequence
from fastattn.engine.config import EngineConfig
from fastattn.engine.engine import Engine, EngineStats
from fastattn.engine.outputs import CompletionOutput, RequestOutput
from fastattn.engine.sampling_params import SamplingParams
from fastattn.engine.structured_output import StructuredOutput
from fastattn.models.decoder import DecoderModel
from fastattn.models.tokenizer import Tokenizer
from fastattn.speculative.config import SpeculativeConfig
from tests.engine.thread_ranks import ThreadRanks
from tests.engine.tiny import TinySource, assert_idle, drain, make_engine, run

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [
    "the quick brown fox",
    "a",
    "0 1 2 3 4 5 6 7 8 9 and so on, and so on, and so on",
    "the the the the the the the the",
    "the quick brown fox jumps over the lazy dog; the quick brown fox",
]
# A low temperature makes a random model repeat itself now and then, so that lookups are right now and then.
COOL = {"temperature": 0.3, "seed": 5}
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "logprobs": 3, "n": 2},
    {"temperature": 0, "repetition_penalty": 1.3, "min_tokens": 6, "ignore_eos": False, "stop_token_ids": [40, 41, 42]},
    {"temperature": 0, "stop": ["e", "th", "0"], "include_stop_str_in_output": True},
    {"temperature": 1, "seed": 3, "n": 3},
    {"temperature": 0.8, "seed": -1, "top_p": 0.8, "top_k": 20, "min_p": 0.05},
    {**COOL, "logprobs": 0, "prompt_logprobs": 1},
    {**COOL, "presence_penalty": 0.6, "frequency_penalty": 0.3, "logprobs": 2, "n": 2},
    {**COOL, "logit_bias": {50: 3.0, 51: -100.0}, "stop": [" a"], "min_tokens": 4},
    {**COOL, "output_kind": "delta"},
]
PROPOSERS = ["ngram", "perfect", "stranger"]


@dataclass(frozen=True)
class Arrival:
    prompt: int
    params: SamplingParams
    step: int = 0
    abort_after: int | None = None


class Setting:
    """Engines with and without speculation on the same model."""

    def __init__(self, network: DecoderModel, stranger: DecoderModel, tokenizer: Tokenizer) -> None:
        self.network, self.tokenizer = network, tokenizer
        self.drafts = {"ngram": None, "perfect": network, "stranger": stranger}
        self._plain: dict[Any, list[CompletionOutput]] = {}

    def plain(self, arrival: Arrival) -> list[CompletionOutput]:
        """What the request gets alone and without speculation, asked once."""
        key = (arrival.prompt, repr(arrival.params))
        if key not in self._plain:
            engine = make_engine(self.network, self.tokenizer)
            (output,) = collect(engine, [Arrival(arrival.prompt, arrival.params)]).values()
            self._plain[key] = output
        return self._plain[key]

    def speculating(self, proposer: str, config: dict[str, Any] | None = None, **options: Any) -> Engine:
        model = {} if proposer == "ngram" else {"model": proposer}
        lookup = {"prompt_lookup_min": 1, "prompt_lookup_max": 3} if proposer == "ngram" else {}
        # What pays on this machine today is not what is tested.
        spec = SpeculativeConfig(**{**model, **lookup, "adaptive_draft_length": False, **(config or {})})
        return make_engine(self.network, self.tokenizer, draft=self.drafts[proposer], speculative=spec, **options)

    def compare(self, engine: Engine, arrivals: list[Arrival]) -> EngineStats:
        for index, completions in collect(engine, arrivals).items():
            arrival = arrivals[index]
            for got, expected in zip(completions, self.plain(arrival), strict=True):
                where = f"request {index}, completion {got.index}: {arrival}"
                if arrival.abort_after is not None and got.finish_reason == "abort":
                    assert got.token_ids == expected.token_ids[: len(got.token_ids)], where
                    continue
                assert got.token_ids == expected.token_ids, where
                assert got.text == expected.text, where
                assert (got.finish_reason, got.stop_reason) == (expected.finish_reason, expected.stop_reason), where
                compare_logprobs(got, expected)
        stats = engine.stats()
        assert stats.num_accepted_tokens == sum(stats.num_accepted_tokens_per_pos) <= stats.num_draft_tokens
        return stats


def compare_logprobs(got: CompletionOutput, expected: CompletionOutput) -> None:
    assert (got.logprobs is None) == (expected.logprobs is None)
    for ours, theirs in zip(got.logprobs or [], expected.logprobs or [], strict=True):
        assert ours.keys() == theirs.keys()
        for token, row in ours.items():
            assert row.logprob == pytest.approx(theirs[token].logprob, abs=1e-4)
            assert (row.rank, row.decoded_token) == (theirs[token].rank, theirs[token].decoded_token)
    assert got.cumulative_logprob == pytest.approx(expected.cumulative_logprob, abs=1e-3)


def collect(engine: Engine, arrivals: list[Arrival]) -> dict[int, list[CompletionOutput]]:
    """Runs all to their ends; the whole completions of each, put together where the outputs were deltas."""
    whole: dict[int, list[CompletionOutput]] = {}
    pending = len(arrivals)
    for step in range(10_000):
        for index, arrival in enumerate(arrivals):
            if arrival.step == step:
                engine.add_request(str(index), PROMPTS[arrival.prompt], arrival.params)
                pending -= 1
            if arrival.abort_after is not None and arrival.step + arrival.abort_after == step:
                last = engine.abort_request(str(index))
                if last is not None:
                    keep(whole, last, arrival.params)
        for output in engine.step():
            keep(whole, output, arrivals[int(output.request_id)].params)
        if pending == 0 and not engine.has_unfinished_requests():
            break
    assert_idle(engine)
    return whole


def keep(whole: dict[int, list[CompletionOutput]], output: RequestOutput, params: SamplingParams) -> None:
    before = whole.get(int(output.request_id))
    if params.output_kind == "delta" and before is not None:
        for new, old in zip(output.outputs, before, strict=True):
            new.text, new.token_ids = old.text + new.text, old.token_ids + new.token_ids
    whole[int(output.request_id)] = output.outputs


@pytest.fixture(scope="module")
def setting(network: DecoderModel, stranger: DecoderModel, tokenizer: Tokenizer) -> Setting:
    return Setting(network, stranger, tokenizer)


def params_of(index: int, max_tokens: int) -> SamplingParams:
    values = {"ignore_eos": True, **PARAMS[index], "max_tokens": max_tokens}
    return SamplingParams(**{**values, "min_tokens": min(values.get("min_tokens", 0), max_tokens)})


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_every_kind_of_request(setting: Setting, proposer: str) -> None:
    arrivals = [Arrival(i % len(PROMPTS), params_of(i, 40), step=(3 * i) % 7) for i in range(len(PARAMS))]
    stats = setting.compare(setting.speculating(proposer), arrivals)
    assert stats.num_draft_tokens > 50
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    if proposer == "perfect":
        assert stats.num_accepted_tokens > 0.3 * stats.num_draft_tokens  # those drawn at random are another matter


def test_a_perfect_draft_is_always_right_when_greedy(setting: Setting) -> None:
    arrivals = [Arrival(i, params_of(0, 41)) for i in range(len(PROMPTS))]
    stats = setting.compare(setting.speculating("perfect", {"num_speculative_tokens": 3}), arrivals)
    assert stats.num_accepted_tokens == stats.num_draft_tokens
    # The first token comes with the prompt, each further step brings 1 + 3.
    assert stats.num_steps == 11
    assert stats.num_accepted_tokens_per_pos == (50, 50, 50)


@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_blocks": 16, "max_num_batched_tokens": 64},
        {"num_kv_blocks": 16, "max_num_batched_tokens": 7, "enable_prefix_caching": False},
        {"max_num_batched_tokens": 5, "max_num_seqs": 3},
        {"block_size": 16, "max_num_seqs": 2},
    ],
    ids=str,
)
def test_little_room(setting: Setting, proposer: str, options: dict[str, Any]) -> None:
    arrivals = [Arrival(i % len(PROMPTS), params_of((0, 6, 7)[i % 3], 40)) for i in range(6)]
    engine = setting.speculating(proposer, **options)
    stats = setting.compare(engine, arrivals)
    assert stats.num_draft_tokens > 0
    if options.get("num_kv_blocks") == 16:
        assert stats.num_preemptions > 0
    # The same again finds its texts in the cache, none of it of a rejected draft.
    hits = stats.num_prefix_hit_tokens
    setting.compare(engine, arrivals)
    if options.get("enable_prefix_caching", True) and "num_kv_blocks" not in options:
        assert engine.stats().num_prefix_hit_tokens > hits


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, dict[str, Any], dict[str, Any], list[Arrival]]:
    proposer = draw(st.sampled_from(PROPOSERS))
    config = {
        "num_speculative_tokens": draw(st.sampled_from([1, 2, 4, 9])),
        "adaptive_draft_length": draw(st.booleans()),
    }
    options = {
        "max_num_batched_tokens": draw(st.sampled_from([3, 7, 16, 61, 256])),
        "max_num_seqs": draw(st.integers(1, 8)),
        "num_kv_blocks": draw(st.sampled_from([14, 16, 20, 60])),
        "enable_prefix_caching": draw(st.booleans()),
        "policy": draw(st.sampled_from(["fcfs", "priority"])),
        "padded": draw(st.booleans()),
    }
    arrivals = [
        Arrival(
            draw(st.integers(0, len(PROMPTS) - 1)),
            params_of(draw(st.integers(0, len(PARAMS) - 1)), draw(st.sampled_from([1, 2, 17, 40]))),
            step=draw(st.integers(0, 12)),
            abort_after=draw(st.one_of(st.none(), st.none(), st.integers(0, 12))),
        )
        for _ in range(draw(st.integers(1, 6)))
    ]
    return proposer, config, options, arrivals


@given(case=cases())
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=True)
def test_mixed_schedules(setting: Setting, case: Any) -> None:
    proposer, config, options, arrivals = case
    setting.compare(setting.speculating(proposer, config, **options), arrivals)


@pytest.mark.slow
@given(case=cases())
@settings(max_examples=1000, deadline=None, derandomize=False, suppress_health_check=list(HealthCheck), print_blob=True)
def test_many_mixed_schedules(setting: Setting, case: Any) -> None:
    proposer, config, options, arrivals = case
    setting.compare(setting.speculating(proposer, config, **options), arrivals)


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_structured_output(setting: Setting, proposer: str) -> None:
    """Guesses that a grammar forbids are not verified, and those that it allows end where it does."""
    wishes = [StructuredOutput("regex", "(abc |the ){3,9}!"), StructuredOutput("choice", ("the end", "the start"))]
    arrivals = [
        Arrival(i, SamplingParams(**values, max_tokens=40, structured_output=wish))
        for i, wish in enumerate(wishes)
        for values in ({"temperature": 0}, {"temperature": 1, "seed": 3, "n": 2})
    ]
    stats = setting.compare(setting.speculating(proposer), arrivals)
    # A draft model does not know the grammar: what it says is seldom allowed, but then it may be right.
    assert stats.num_accepted_tokens > {"ngram": 10, "perfect": 2, "stranger": -1}[proposer]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("proposer", PROPOSERS)
def test_two_ranks(setting: Setting, proposer: str, padded: bool) -> None:
    """Rank 0 guesses, both verify."""
    spec = setting.speculating(proposer).config.speculative
    ranks = ThreadRanks(TinySource(), 2, padded)
    config = EngineConfig(
        max_model_len=256, num_kv_blocks=20, block_size=8, max_num_seqs=4, debug_checks=True, speculative=spec
    )
    engine = ranks.start(config, setting.drafts[proposer])
    try:
        stats = setting.compare(engine, [Arrival(i % len(PROMPTS), params_of(i, 30)) for i in (0, 1, 2, 7)])
        assert stats.num_draft_tokens > 20
    finally:
        ranks.close()


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_resumed_requests_go_on_with_the_same_text(setting: Setting, proposer: str) -> None:
    """What a crash interrupts goes on as if nothing had been, although drafts end elsewhere then."""
    for index in (0, 4, 7):
        params = params_of(index, 40)
        expected = setting.plain(Arrival(2, params))
        for count in (1, 13, 38):
            engine = setting.speculating(proposer)
            engine.add_request("r", PROMPTS[2], params, resume_token_ids=[c.token_ids[:count] for c in expected])
            last = drain(engine)[-1]
            assert [c.token_ids for c in last.outputs] == [c.token_ids for c in expected]
            assert [c.text for c in last.outputs] == [c.text for c in expected]


def test_the_prefix_tree_never_holds_a_rejected_token(setting: Setting) -> None:
    """Drafts of two blocks at a time: what was wrong of them is looked for, continued as it was drafted."""
    engine = setting.speculating("stranger", {"num_speculative_tokens": 20, "adaptive_draft_length": False})
    assert engine.speculator is not None
    block, drafted = engine.config.block_size, []
    propose = engine.speculator.propose

    def spy(running: Any) -> Any:
        drafts = propose(running)
        drafted.extend((r.seq.tokens(), r.seq.drafts) for r in running if r.seq.num_drafts > 0)
        return drafts

    engine.speculator.propose = spy  # type: ignore[method-assign]
    outputs = run(engine, PROMPTS, params_of(0, 60))
    assert engine.kv.tree.num_cached > 20
    texts = [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs]
    num_whole_blocks = 0
    for tokens, drafts in drafted:
        (text,) = [text for text in texts if text[: len(tokens)] == tokens]
        guess = tokens + drafts
        right = next((i for i, (a, b) in enumerate(zip(guess, text, strict=False)) if a != b), len(text))
        blocks = engine.kv.tree.match(b"", TokenSequence(guess))
        engine.kv.pool.release(blocks)
        assert len(blocks) <= right // block
        num_whole_blocks += len(guess) // block - right // block
    assert num_whole_blocks > 50
