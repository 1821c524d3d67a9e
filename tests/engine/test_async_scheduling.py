"""With async_scheduling a request is given what it is given without, one call of `step` later, whatever else goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastattn.engine.config import EngineConfig
from fastattn.engine.engine import Engine
from fastattn.engine.outputs import RequestOutput
from fastattn.engine.pooling_params import PoolingParams
from fastattn.engine.sampling_params import SamplingParams
from fastattn.engine.setup import EngineOptions
from fastattn.models.registry import load_model
from fastattn.speculative.config import SpeculativeConfig
from tests.engine import tiny
from tests.engine.requests import Faulty
from tests.engine.tiny import EOS, assert_idle, drain, make_engine

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORK = load_model(tiny.TinySource(), torch.device("cpu"), torch.float32, 256)
TOKENIZER = tiny.make_tokenizer()
PROMPTS = ["the quick brown fox", "a", "0 1 2 3 4 5 6 7 8 9 and so on, and so on, and so on", "the the the"]

_params = st.one_of(
    st.builds(PoolingParams, pooling=st.sampled_from(["last", "mean"])),
    *(
        st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.0, 1.0]),
            seed=st.just(7),
            max_tokens=st.integers(1, 24),
            min_tokens=st.sampled_from([0, 1]),
            ignore_eos=st.booleans(),
            # Common bytes, so that many texts end where only the host can see it.
            stop=st.sampled_from([None, ["e"], [" t", "o"]]),
            stop_token_ids=st.sampled_from([None, [EOS, 65, 70, 86, 101]]),
            repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
            logprobs=st.sampled_from([None, None, 2]),
            prompt_logprobs=st.sampled_from([None, None, 1]),
            n=st.sampled_from([1, 1, 2]),
        )
        for _ in range(4)  # most of them draw tokens
    ),
)
_requests = st.lists(
    st.tuples(
        st.sampled_from(PROMPTS), _params, st.integers(0, 12), st.one_of(st.none(), st.none(), st.integers(0, 12))
    ),
    min_size=3,
    max_size=8,
)
_options = st.fixed_dictionaries(
    {
        "max_num_batched_tokens": st.sampled_from([5, 16, 256]),
        "max_num_seqs": st.integers(2, 8),
        "num_kv_blocks": st.sampled_from([16, 24, 128]),
        "enable_prefix_caching": st.booleans(),
        "padded": st.booleans(),
    }
)


def serve(engine: Engine, requests: list[Any]) -> list[RequestOutput | None]:
    """The last output of each request; of one that is aborted too, which is None if it was aborted before it had begun."""
    last: dict[str, RequestOutput | None] = {}
    for step in range(10_000):
        for index, (prompt, params, arrival, abort_after) in enumerate(requests):
            if arrival == step:
                engine.add_request(str(index), prompt, params)
                last[str(index)] = None
            if abort_after is not None and arrival + abort_after == step:
                last[str(index)] = engine.abort_request(str(index)) or last[str(index)]
        for output in engine.step():
            last[output.request_id] = output
        if len(last) == len(requests) and not engine.has_unfinished_requests():
            break
    assert_idle(engine)
    assert engine._running_step is None
    return [last[str(index)] for index in range(len(requests))]


@given(options=_options, requests=_requests)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_the_outputs_are_the_same(options: dict[str, Any], requests: list[Any]) -> None:
    expected = serve(make_engine(NETWORK, TOKENIZER, **options), requests)
    # Evicted blocks are copied while a step that may read them is still queued.
    host = {"num_host_kv_blocks": 30 if options["enable_prefix_caching"] else 0}
    found = serve(make_engine(NETWORK, TOKENIZER, async_scheduling=True, **options, **host), requests)
    for (_, _, _, abort_after), ours, plain in zip(requests, found, expected, strict=True):
        if ours is None or plain is None:
            assert abort_after is not None
            continue
        for a, b in zip(ours.outputs, plain.outputs, strict=True):
            count = len(a.token_ids)
            if abort_after is None:
                assert (a.text, a.token_ids, a.finish_reason, a.stop_reason) == (
                    b.text,
                    b.token_ids,
                    b.finish_reason,
                    b.stop_reason,
                )
            assert a.token_ids[:count] == b.token_ids[:count]
            assert [set(row) for row in (a.logprobs or [])[:count]] == [set(row) for row in (b.logprobs or [])[:count]]
        if abort_after is None:
            assert (ours.prompt_logprobs is None) == (plain.prompt_logprobs is None)
            assert ours.embedding == (plain.embedding and pytest.approx(plain.embedding, abs=1e-5))


def test_the_next_step_is_queued_before_the_last_one_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.engine.sampler import Draw

    engine = make_engine(NETWORK, TOKENIZER, async_scheduling=True)
    events: list[str] = []
    launch, result = engine.runner.launch, Draw.result

    def launched(*args: Any) -> Draw | None:
        events.append("launch")
        return launch(*args)

    def known(self: Draw) -> Any:
        events.append("result")
        return result(self)

    monkeypatch.setattr(engine.runner, "launch", launched)
    monkeypatch.setattr(Draw, "result", known)
    engine.add_request("0", "the", SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    drain(engine)
    # The third token is known to be the last, so no fourth step is queued.
    assert events == ["launch", "launch", "result", "launch", "result", "result"]
    events.clear()
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, repetition_penalty=1.1)
    engine.add_request("1", "the", params)
    drain(engine)
    assert events == ["launch", "result"] * 3  # its penalties count the token before


@pytest.mark.parametrize("fault", [RuntimeError("out of magic"), None], ids=str)
def test_a_step_that_fails_behind_one_that_runs(fault: Exception | None) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected = serve(make_engine(NETWORK, TOKENIZER), [(prompt, params, 0, None) for prompt in PROMPTS])
    engine = make_engine(NETWORK, TOKENIZER, async_scheduling=True)
    engine.runner.model = Faulty(NETWORK, 4, fault, bad_row=0)  # type: ignore[assignment]
    found = serve(engine, [(prompt, params, 0, None) for prompt in PROMPTS])
    failed = [i for i, output in enumerate(found) if output and output.outputs[0].finish_reason == "error"]
    assert failed == ([0] if fault is None else [0, 1, 2, 3])
    for i, (output, plain) in enumerate(zip(found, expected, strict=True)):
        assert output is not None and plain is not None
        tokens = output.outputs[0].token_ids
        assert tokens == plain.outputs[0].token_ids[: len(tokens)]
        assert len(tokens) == (12 if i not in failed else 3 if fault is None else 2)


def test_what_it_cannot_be_combined_with() -> None:
    ngram = SpeculativeConfig.from_dict({"method": "ngram", "num_speculative_tokens": 2})
    with pytest.raises(ValueError, match="async_scheduling is True, allowed is False with speculative decoding"):
        EngineConfig(max_model_len=64, num_kv_blocks=8, async_scheduling=True, speculative=ngram)
    for other in ({"tensor_parallel_size": 2}, {"speculative": ngram}):
        with pytest.raises(ValueError, match="async_scheduling is True, allowed is False or None"):
            EngineOptions(async_scheduling=True, **other)  # type: ignore[arg-type]
        assert not EngineOptions(**other).overlaps("cuda")  # type: ignore[arg-type]
    assert EngineOptions().overlaps("cuda")
    assert not EngineOptions().overlaps("cpu")
    assert not EngineOptions(async_scheduling=False).overlaps("cuda")
