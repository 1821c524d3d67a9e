"""The load generator against a server whose behaviour is known: what it sends, when, and what it makes of the answers."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import numpy as np
import pytest

from fastattn.benchmarks.datasets import DatasetOptions, Sample, load_samples
from fastattn.benchmarks.load import Outcome, Target, arrival_times, run_load
from fastattn.benchmarks.summary import most_at_once, summarize
from fastattn.openai_http import Server
from tests.engine.tiny import make_tokenizer
from tests.fake_server import FakeServer

SAMPLES = [Sample(f"question {i}", 2, 4) for i in range(6)]


def drive(fake: FakeServer, samples: list[Sample] = SAMPLES, **options: object) -> tuple[list[Outcome], float]:
    target = Target(Server(fake.url), "fake-small", str(options.pop("endpoint", "/v1/completions")))
    times = options.pop("arrivals", [0.0] * len(samples))
    return asyncio.run(run_load(target, samples, times, **options))  # type: ignore[arg-type]


# ---- arrivals ----


def test_poisson_gaps_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    times = arrival_times(4000, rate=50.0, burstiness=1.0, seed=3)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(4000 / 50)
    gaps = np.diff([0.0, *times])
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(1.0, abs=0.1)
    # Exponential: a share of 1/e of the gaps is longer than the mean.
    assert np.mean(gaps > np.mean(gaps)) == pytest.approx(math.exp(-1), abs=0.03)


@pytest.mark.parametrize("burstiness", [0.25, 4.0])
def test_burstiness_is_the_inverse_of_the_squared_variation(burstiness: float) -> None:
    gaps = np.diff([0.0, *arrival_times(8000, rate=10.0, burstiness=burstiness, seed=5)])
    assert (np.mean(gaps) / np.std(gaps)) ** 2 == pytest.approx(burstiness, rel=0.15)


def test_same_seed_same_arrivals_and_no_rate_is_all_at_once() -> None:
    assert arrival_times(20, 3.0, 1.0, 7) == arrival_times(20, 3.0, 1.0, 7) != arrival_times(20, 3.0, 1.0, 8)
    assert arrival_times(3, math.inf, 1.0, 0) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("rate", "burstiness", "name"), [(0.0, 1.0, "request-rate"), (math.nan, 1.0, "request-rate"), (1.0, 0.0, "burstiness"), (1.0, math.inf, "burstiness")])  # fmt: skip
def test_rates_out_of_range_are_named(rate: float, burstiness: float, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        arrival_times(3, rate, burstiness, 0)


# ---- what is sent and measured ----


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_answers_are_counted_as_the_server_counts(fake: FakeServer, endpoint: str) -> None:
    fake.headers = {"x-fastattn-cache": "hit"}
    outcomes, seconds = drive(fake, endpoint=endpoint)
    assert [o.text for o in outcomes] == ["Hello world."] * 6
    assert [(o.prompt_len, o.num_output_tokens, o.error, o.cache) for o in outcomes] == [(7, 4, None, "hit")] * 6
    assert all(0 < o.ttft <= o.latency < seconds and len(o.itls) == 3 for o in outcomes)
    asked = sorted(body["messages"][0]["content"] if "chat" in endpoint else body["prompt"] for body in fake.bodies)
    assert asked == [s.prompt for s in SAMPLES]
    limit = "max_completion_tokens" if "chat" in endpoint else "max_tokens"
    assert all(body["model"] == "fake-small" and body["stream"] and body[limit] == 4 for body in fake.bodies)


def test_a_server_that_does_not_count_is_counted_by_its_pieces(fake: FakeServer) -> None:
    fake.count_tokens = False
    outcomes, _ = drive(fake)
    assert [(o.prompt_len, o.num_output_tokens) for o in outcomes] == [(2, 4)] * 6


def test_times_are_those_of_the_stream(fake: FakeServer) -> None:
    fake.pieces, fake.gap = ("Hel", "lo", "."), 0.5
    (outcome,), _ = drive(fake, SAMPLES[:1])
    assert outcome.ttft >= 0.5 and outcome.latency >= 1.5
    assert len(outcome.itls) == 2 and all(gap > 0.2 for gap in outcome.itls)
    assert sum(outcome.itls) + outcome.ttft <= outcome.latency + 1e-6


def test_the_load_is_open_loop(fake: FakeServer) -> None:
    """A slow server gets the next request at its time all the same."""
    fake.gap = 0.15
    expected = pytest.approx(0.5, abs=0.25)
    for _ in range(3):  # rounds: other work on this machine holds some of them up
        fake.arrivals.clear()
        outcomes, _ = drive(fake, arrivals=[0.1 * i for i in range(6)])
        assert most_at_once(outcomes) > 1
        if (seconds := fake.arrivals[-1] - fake.arrivals[0]) == expected:
            break
    assert seconds == expected


def test_max_concurrency_is_kept(fake: FakeServer) -> None:
    fake.gap = 0.02
    outcomes, _ = drive(fake, max_concurrency=2)
    assert most_at_once(outcomes) <= 2
    assert len(outcomes) == 6


@pytest.mark.parametrize(("status", "says"), [(500, "500: the model is away"), (429, "429")])
def test_refusals_are_outcomes(fake: FakeServer, status: int, says: str) -> None:
    fake.status = status
    outcomes, _ = drive(fake)
    assert all(o.error is not None and says in o.error for o in outcomes)
    assert summarize(outcomes, 1.0)["failed"] == 6


def test_a_stream_that_breaks_off_is_no_success(fake: FakeServer) -> None:
    fake.cut_after = 2
    outcomes, _ = drive(fake)
    assert {o.error for o in outcomes} == {"the stream broke off before its end"}


def test_a_server_that_is_not_there_is_an_outcome(fake: FakeServer) -> None:
    fake.url = "http://127.0.0.1:9"  # discard: nobody listens
    (outcome,), _ = drive(fake, SAMPLES[:1])
    assert outcome.error is not None and "cannot be reached" in outcome.error


# ---- figures ----


def test_figures_of_known_outcomes() -> None:
    outcomes = [
        Outcome(10, start=i, ttft=0.1 * (i + 1), latency=1.0, itls=[0.3] * 3, num_output_tokens=4) for i in range(3)
    ]
    outcomes.append(Outcome(10, start=3, error="no"))
    result = summarize(outcomes, 2.0, percentiles=(50, 99.9), goodput={"ttft": 250, "e2el": 2000})
    assert result["completed"] == 3 and result["failed"] == 1
    assert result["request_throughput"] == 1.5 and result["output_throughput"] == 6
    assert result["total_input_tokens"] == 30 and result["total_token_throughput"] == 21
    assert result["mean_ttft_ms"] == pytest.approx(200) and result["median_ttft_ms"] == pytest.approx(200)
    assert result["mean_tpot_ms"] == pytest.approx((0.9 + 0.8 + 0.7) / 3 / 3 * 1e3)
    assert result["mean_itl_ms"] == pytest.approx(300) and result["p50_e2el_ms"] == pytest.approx(1000)
    assert result["p99.9_ttft_ms"] == pytest.approx(300, rel=1e-2)
    assert result["request_goodput"] == 1.0  # two of three, in two seconds
    assert result["max_concurrent_requests"] == 1


def test_a_load_without_a_success_has_figures_too() -> None:
    result = summarize([Outcome(1, error="no")], 1.0)
    assert result["completed"] == 0 and result["mean_ttft_ms"] == 0.0


# ---- data sets ----


def test_random_prompts_are_repeatable_and_have_their_lengths() -> None:
    options = DatasetOptions(num_prompts=20, input_len=12, output_len=5, range_ratio=0.5, prefix_len=3, seed=4)
    tokenizer = make_tokenizer()
    samples = load_samples(options, tokenizer)
    assert samples == load_samples(options, tokenizer)
    assert len({s.prompt for s in samples}) == 20
    for sample in samples:
        # The prefix ends inside a word, so that the cut may merge a token or two.
        assert abs(len(tokenizer.encode(sample.prompt, add_special_tokens=False)) - sample.prompt_len) <= 2
        assert 6 <= sample.prompt_len - 3 <= 18 and 2 <= sample.output_len <= 7
    prefix = samples[0].prompt[:3]
    assert all(sample.prompt.startswith(prefix) for sample in samples)
    assert [len(s.prompt.split()) for s in load_samples(DatasetOptions(num_prompts=2, input_len=9))] == [9, 9]


def test_sharegpt_takes_first_turns_of_usable_length(tmp_path: Path) -> None:
    turns = [["one two three four", "a b c d e"], ["too short", "x"], ["w " * 1100, "a b c d"], ["no answer to this"]]
    rows = [{"conversations": [{"from": "human", "value": t} for t in texts]} for texts in turns]
    path = tmp_path / "share.json"
    path.write_text(json.dumps([*rows, {"no": "conversations"}]))
    samples = load_samples(DatasetOptions("sharegpt", path, num_prompts=3))
    assert samples == [Sample("one two three four", 4, 5)] * 3


def test_custom_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a b"}\n\n{"prompt": "c", "output_tokens": 3}\n')
    assert load_samples(DatasetOptions("custom", path, 2)) == [Sample("a b", 2, 256), Sample("c", 1, 3)]
    assert load_samples(DatasetOptions("custom", path, 3, output_len=9))[2] == Sample("a b", 2, 9)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "line 1: expected JSON"),
        ('{"prompt": "a"}\n[1]', "line 2: expected JSON"),
        ('{"prompt": 3}', "must be a text"),
        ("\n", "no usable prompt"),
    ],
)
def test_bad_custom_lines_are_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        load_samples(DatasetOptions("custom", path, 2))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "imagenet"}, "dataset-name"),
        ({"name": "sharegpt"}, "needs --dataset-path"),
        ({"range_ratio": 1.0}, "random-range-ratio"),
        ({"num_prompts": 0}, "num-prompts"),
        ({"prefix_len": -1}, "random-prefix-len"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DatasetOptions(**options)  # type: ignore[arg-type]
