"""What a request is told: log-probabilities, deltas, metrics, cached tokens."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from fastattn.engine.engine import Engine
from fastattn.engine.outputs import RequestOutput
from fastattn.engine.sampling_params import SamplingParams
from fastattn.models.decoder import DecoderModel
from tests.engine.requests import DRAWN, GREEDY, PROMPTS, MakeEngine, only, with_
from tests.engine.tiny import drain, full_logits, run

pytestmark = pytest.mark.usefixtures("one_thread")


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
