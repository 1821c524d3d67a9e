"""Options, draft lengths, prompt lookup, the draft model's bookkeeping, and what the scheduler gives to guesses."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from fastattn.engine.batch import step_builder
from fastattn.engine.config import EngineConfig
from fastattn.engine.memory_plan import PlanOptions, buffer_bytes, memory_plan
from fastattn.engine.sampling_params import SamplingParams
from fastattn.models.decoder import DecoderModel
from fastattn.models.tokenizer import Tokenizer
from fastattn.speculative.config import SpeculativeConfig
from fastattn.speculative.draft_model import DraftModelProposer, check_same_vocabulary
from fastattn.speculative.speculator import DraftLength
from tests.engine.test_scheduler import Simulation
from tests.engine.tiny import TinySource, make_engine, make_tokenizer, run

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "magic"}, "method is 'magic', allowed are 'ngram' and 'draft_model'"),
        ({"method": "draft_model"}, "model is None, allowed are a model's name or path"),
        ({"method": "ngram", "model": "x"}, "model is 'x', allowed are None with method 'ngram'"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens is 0, allowed are integers from 1 to 32"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens is True, allowed are integers"),
        ({"prompt_lookup_max": 2, "prompt_lookup_min": 3}, "prompt_lookup_min is 3, allowed are integers from 1 to 2"),
        ({"prompt_lookup_max": 65}, "prompt_lookup_max is 65, allowed are integers from 1 to 64"),
        ({"model": "x", "prompt_lookup_max": 2}, "prompt_lookup_max is 2, allowed are None"),
        ({"draft_sample_method": "probabilistic"}, "draft_sample_method is 'probabilistic', allowed are 'greedy'"),
        ({"adaptive_draft_length": 1}, "adaptive_draft_length is 1, allowed are True and False"),
        ({"num_tokens": 3}, "unknown key 'num_tokens', allowed are method, num_speculative_tokens"),
    ],
)
def test_bad_options(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        SpeculativeConfig.from_dict(values)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"a": ' * 20_000])
def test_what_is_no_json_object(text: str) -> None:
    with pytest.raises(ValueError, match="speculative config is") as caught:
        SpeculativeConfig.from_json(text)
    assert len(str(caught.value)) < 300


def test_defaults_follow_from_what_is_given() -> None:
    assert SpeculativeConfig.from_json("{}").method == "ngram"
    assert SpeculativeConfig.from_json('{"model": "x"}').method == "draft_model"
    for given, (shortest, longest) in (
        ({}, (2, 5)),
        ({"prompt_lookup_max": 3}, (3, 3)),
        ({"prompt_lookup_min": 4}, (4, 4)),
    ):
        spec = SpeculativeConfig(**given)  # type: ignore[arg-type]
        assert (spec.prompt_lookup_min, spec.prompt_lookup_max) == (shortest, longest)


def test_the_length_follows_what_was_right() -> None:
    length = DraftLength(most=8)
    assert length.next() == 8
    for drafted, accepted, expected in ((8, 2, 5), (5, 0, 3), (3, 3, 6), (6, 6, 8), (8, 8, 8), (8, 7, 8)):
        length.record(drafted, accepted)
        assert length.next() == expected


def test_a_request_that_is_never_right_is_left_alone_and_probed() -> None:
    length, probes = DraftLength(most=4), []
    for step in range(600):
        if (count := length.next()) > 0:
            probes.append((step, count))
            length.record(count, 0)
    assert probes[:4] == [(0, 4), (1, 2), (2, 1), (3, 1)]
    assert [b - a - 1 for (a, _), (b, _) in pairwise(probes[3:])][:6] == [8, 16, 32, 64, 128, 128]
    assert all(count == 1 for _, count in probes[4:])
    while length.next() == 0:
        pass
    length.record(1, 1)
    assert length.next() == 2


def test_guesses_get_what_others_leave() -> None:
    sim = Simulation(max_num_batched_tokens=8)
    requests = [sim.add(2, outputs=50) for _ in range(4)]
    sim.step()
    requests[0].seq.drafts = [1, 2, 3]
    requests[2].seq.drafts = [1, 2, 3]
    # Each has one token for sure; of the four that are left the first takes three and the third one.
    assert sim.scheduler.schedule() == dict(zip(requests, [4, 1, 2, 1], strict=True))


def test_nobody_is_preempted_for_a_guess() -> None:
    sim = Simulation(num_kv_blocks=2, enable_prefix_caching=False)
    first, second = sim.add(8, outputs=3), sim.add(3, outputs=3)
    # The first fills a block with its prompt and takes another for what comes next: none is left to guess in.
    sim.scheduler.finish(second, "abort")
    sim.step()
    third = sim.add(3, outputs=3)
    sim.step()
    assert third.seq.num_blocks <= 1
    first.seq.drafts = [1] * 9
    assert sim.scheduler.schedule()[first] == 1
    assert sim.scheduler.num_preemptions == 0


def test_the_costs_are_those_of_the_steps(network: DecoderModel, tokenizer: Tokenizer) -> None:
    """What a step is said to have held is what it held."""
    spec = SpeculativeConfig(model="x", num_speculative_tokens=3)
    engine = make_engine(network, tokenizer, draft=network, speculative=spec)
    speculator = engine.speculator
    assert speculator is not None and speculator._budget is not None
    steps: list[tuple[int, int]] = []
    speculator._budget.choose = lambda lengths: 3  # type: ignore[method-assign]
    speculator._budget.record_step = lambda n, drafts, seconds: steps.append((n, drafts))  # type: ignore[method-assign]
    run(engine, [{"prompt_token_ids": [5, 6]}, {"prompt_token_ids": [7, 8]}], GREEDY)
    assert steps[0] == (2, 6) and sum(drafts for _, drafts in steps) == engine.stats().num_draft_tokens > 20


def test_another_vocabulary_is_refused() -> None:
    class Other(Tokenizer):
        def vocabulary(self) -> dict[str, int]:
            return {text: 5 if token == 4 else token for text, token in super().vocabulary().items()}

    class Shorter(Tokenizer):
        def vocabulary(self) -> dict[str, int]:
            return {text: token for text, token in super().vocabulary().items() if token != 50}

    ours = make_tokenizer()
    check_same_vocabulary(ours, make_tokenizer(), "same")
    for kind, message in ((Other, "is token 5 there and 4 here"), (Shorter, "is only in the target's")):
        theirs = make_tokenizer()
        theirs.__class__ = kind
        with pytest.raises(ValueError, match=message):
            check_same_vocabulary(ours, theirs, "draft")


def test_a_draft_model_without_numbers_guesses_nothing(
    network: DecoderModel, stranger: DecoderModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stranger, "logits", lambda hidden: torch.full((hidden.shape[0], 103), torch.nan))
    spec = SpeculativeConfig(model="x")
    engine = make_engine(network, tokenizer, draft=stranger, speculative=spec)
    (output,), (plain,) = (run(e, ["the fox"], GREEDY) for e in (engine, make_engine(network, tokenizer)))
    assert output.outputs[0].token_ids == plain.outputs[0].token_ids
    assert engine.stats().num_draft_tokens == 0


def test_a_draft_model_that_fails_ends_the_requests_that_it_was_asked_for(
    network: DecoderModel, stranger: DecoderModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(network, tokenizer, draft=stranger, speculative=SpeculativeConfig(model="x"))

    def broken(hidden: torch.Tensor) -> torch.Tensor:
        raise MemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(stranger, "logits", broken)
        (output,) = run(engine, ["the fox"], GREEDY)
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("error", "MemoryError: no more")
    (output,) = run(engine, ["the fox"], GREEDY)
    assert output.outputs[0].finish_reason == "length"


def test_a_shorter_draft_model_stops_guessing_at_its_end(network: DecoderModel, tokenizer: Tokenizer) -> None:
    spec = SpeculativeConfig(model="x", adaptive_draft_length=False)
    engine = make_engine(network, tokenizer, draft=network, speculative=spec)
    assert engine.speculator is not None and isinstance(engine.speculator.proposer, DraftModelProposer)
    object.__setattr__(engine.speculator.proposer.runner.config, "max_model_len", 16)
    (output,) = run(engine, [{"prompt_token_ids": [5] * 10}], GREEDY)
    assert len(output.outputs[0].token_ids) == 20
    assert 0 < engine.stats().num_draft_tokens <= 6


def test_the_memory_plan_counts_both_models_and_the_buffers() -> None:
    source, spec = TinySource(), SpeculativeConfig(model="x", num_speculative_tokens=3)
    sizes = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    options = PlanOptions("cpu", torch.float32, **sizes, num_kv_blocks=20, speculative=spec)
    builder = step_builder(EngineConfig(**sizes, num_kv_blocks=20, speculative=spec))
    assert buffer_bytes(options) == builder.nbytes
    model = (source.config, source.tensors())
    alone = memory_plan(*model, options, 1 << 30, 1 << 30)
    both = memory_plan(*model, options, 1 << 30, 1 << 30, model)
    assert both.weights_total == 2 * alone.weights_total
    assert both.kv_bytes == 2 * alone.kv_bytes
    assert both.buffer_bytes > alone.buffer_bytes
