"""`fastattn bench` and `fastattn chat --url` as typed, against a real socket and against the tiny engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Invoke
from tests.cli.test_commands import one_line_error
from tests.engine.tiny import TinySource, write_folder
from tests.fake_server import FakeServer, run_fake

SIZES = ("--device", "cpu", "--input-len", "8", "--output-len", "3")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with run_fake() as server:
        yield server


# ---- chat --url ----


def test_quick_answers_once(invoke: Invoke, fake: FakeServer) -> None:
    result = invoke("chat", "--url", f"{fake.url}/v1", "--quick", "hi", "--system", "Be brief.", "--seed", "3")
    assert (result.exit_code, result.stdout) == (0, "Hello world.\n")
    (body,) = fake.bodies
    assert body["model"] == "fake-small"  # the first that the server lists
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert body["seed"] == 3 and body["stream"] is True
    assert not {"top_k", "min_p", "stop"} & set(body)  # what was not asked for is not sent


def test_a_conversation_with_a_server_keeps_its_turns(invoke: Invoke, fake: FakeServer) -> None:
    result = invoke("chat", "--url", fake.url, "--model", "fake-large", stdin="one\ntwo\n/exit\n")
    assert result.exit_code == 0 and result.stdout == "Hello world.\nHello world.\n"
    assert [m["content"] for m in fake.bodies[1]["messages"]] == ["one", "Hello world.", "two"]
    assert fake.bodies[1]["model"] == "fake-large"


def test_address_and_key_come_from_the_environment(
    invoke: Invoke, fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.api_key = "secret"
    monkeypatch.setenv("OPENAI_BASE_URL", f"{fake.url}/v1")
    assert "401" in one_line_error(invoke("chat", "--quick", "hi"))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert invoke("chat", "--quick", "hi").stdout == "Hello world.\n"
    monkeypatch.setenv("OPENAI_API_KEY", "two\nlines")
    line = one_line_error(invoke("chat", "--quick", "hi"))
    assert "OPENAI_API_KEY" in line and "two" not in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--url", "localhost:8000"), "expected one such as http://"),
        (("--url", "http://127.0.0.1:9"), "cannot be reached"),
        ((), "--url"),
        (("tiny", "--url", "http://127.0.0.1:9"), "MODEL is 'tiny'"),
    ],
)
def test_what_cannot_be_talked_to_is_one_line(
    invoke: Invoke, fake: FakeServer, arguments: tuple[str, ...], says: str
) -> None:
    assert says in one_line_error(invoke("chat", "--quick", "hi", *arguments))


def test_a_server_that_fails_is_one_line_and_the_chat_goes_on(invoke: Invoke, fake: FakeServer) -> None:
    fake.status = 503
    assert "503: the model is away" in one_line_error(invoke("chat", "--url", fake.url, "--quick", "hi"))
    result = invoke("chat", "--url", fake.url, stdin="one\ntwo\n")
    assert result.exit_code == 0 and result.stderr.count("503") == 2
    assert [len(body["messages"]) for body in fake.bodies] == [1, 1, 1]  # what was not answered is forgotten
    fake.status, fake.cut_after = 200, 2
    assert "broke off" in invoke("chat", "--url", fake.url, "--quick", "hi").stderr


def test_quick_works_without_a_server(invoke: Invoke) -> None:
    result = invoke("chat", "tiny", "--device", "cpu", "--quick", "hi", "--max-tokens", "5", "--temperature", "0", "-q")
    assert result.exit_code == 0 and result.stdout.strip()


# ---- bench serve ----


def test_bench_serve_saves_what_vllm_saves(invoke: Invoke, fake: FakeServer, tmp_path: Path) -> None:
    result = invoke(
        "bench", "serve", "--base-url", fake.url, "--num-prompts", "5", "--input-len", "6", "--output-len", "4",
        "--request-rate", "200", "--metric-percentiles", "50,99", "--save-result", "--result-dir", str(tmp_path),
        "--result-filename", "out.json", "--goodput", "e2el:60000", "--ignore-eos", "--extra-body", '{"user": "bench"}',
        "--num-warmups", "3", "--backend", "openai-chat",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    saved = json.loads((tmp_path / "out.json").read_text())
    expected = {
        "date",
        "backend",
        "model_id",
        "tokenizer_id",
        "num_prompts",
        "request_rate",
        "burstiness",
        "max_concurrency",
    }
    expected |= {"duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput"}
    expected |= {"request_goodput", "output_throughput", "total_token_throughput", "max_concurrent_requests"}
    expected |= {f"{kind}_{name}_ms" for kind in ("mean", "median", "std", "p50", "p99") for name in ("ttft", "tpot", "itl", "e2el")}  # fmt: skip
    assert set(saved) == expected | {"num_cache_hits"}
    assert (saved["completed"], saved["failed"], saved["total_output_tokens"], saved["request_rate"]) == (5, 0, 20, 200)
    assert saved["request_goodput"] == saved["request_throughput"] > 0
    assert "Successful requests:                     5" in result.stdout and "P50 TTFT (ms):" in result.stdout
    assert saved["backend"] == "openai-chat" and all("messages" in body for body in fake.bodies)
    assert len(fake.bodies) == 9  # one to try, three to warm up
    wrong = invoke("bench", "serve", "--backend", "openai-chat", "--endpoint", "/v1/completions")
    assert "expected /v1/chat/completions with --backend openai-chat" in one_line_error(wrong)
    assert all(body["ignore_eos"] and body["user"] == "bench" and body["temperature"] == 0 for body in fake.bodies)


def test_bench_serve_beside_another_server(invoke: Invoke, fake: FakeServer, tmp_path: Path) -> None:
    with run_fake() as other:
        sizes = (
            "--num-prompts",
            "3",
            "--input-len",
            "6",
            "--output-len",
            "4",
            "--save-result",
            "--result-dir",
            str(tmp_path),
        )
        arguments = ("bench", "serve", "--base-url", fake.url, *sizes, "--result-filename", "o.json")
        result = invoke(*arguments, "--against", f"vllm={other.url}")
        assert result.exit_code == 0, result.output
        saved = json.loads((tmp_path / "o.json").read_text())
        theirs = saved["against"]["vllm"]
        assert (theirs["completed"], theirs["model_id"]) == (3, saved["model_id"])
        assert theirs["ratio"] == pytest.approx(theirs["mean_e2el_ms"] / saved["mean_e2el_ms"])
        assert sorted(str(body) for body in other.bodies) == sorted(str(body) for body in fake.bodies)
        other.cut_after = 1  # from now on its streams break off
        assert "broke off" in invoke(*arguments, "--against", f"vllm={other.url}").stderr
    assert "expected NAME=URL" in one_line_error(invoke(*arguments, "--against", "vllm"))


def test_bench_serve_sweeps_and_draws(invoke: Invoke, fake: FakeServer, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib comes with fastattn[bench]")
    picture = tmp_path / "load.png"
    result = invoke(
        "bench", "serve", "--base-url", fake.url, "--endpoint", "/v1/chat/completions", "--num-prompts", "4",
        "--request-rate", "100", "--request-rate", "inf", "--save-detailed", "--result-dir", str(tmp_path),
        "--result-filename", "r.json", "--plot", str(picture), "--input-len", "3",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    details = json.loads((tmp_path / "r-infqps.json").read_text())
    assert details["backend"] == "openai-chat" and details["generated_texts"] == ["Hello world."] * 4
    assert len(details["ttfts"]) == 4 and (tmp_path / "r-100.0qps.json").exists()
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    page = picture.with_suffix(".html")
    result = invoke(
        "bench", "serve", "--base-url", fake.url, "--num-prompts", "2", "--input-len", "3", "--plot", str(page)
    )
    assert result.exit_code == 0, result.output
    assert "<tr><td>completed</td><td>2</td></tr>" in page.read_text()


def test_bench_serve_ends_with_1_when_a_request_failed(invoke: Invoke, fake: FakeServer) -> None:
    base = ("bench", "serve", "--base-url", fake.url, "--num-prompts", "3", "--input-len", "3")
    fake.status = 500
    assert "500: the model is away" in one_line_error(invoke(*base))
    assert len(fake.bodies) == 1  # a thousand failures would say no more
    fake.status, fake.pieces = 200, ()
    assert "no text" in one_line_error(invoke(*base))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--request-rate", "0"), "request-rate is 0"),
        (("--request-rate", "fast"), "'fast'"),
        (("--percentile-metrics", "ttft,speed"), "'speed'"),
        (("--metric-percentiles", "101"), "'101'"),
        (("--goodput", "ttft"), "goodput"),
        (("--extra-body", "[1]"), "--extra-body"),
        (("--dataset-name", "custom"), "--dataset-path"),
        (("--num-prompts", "0"), "num-prompts"),
    ],
)
def test_bench_serve_names_what_is_wrong(
    invoke: Invoke, fake: FakeServer, arguments: tuple[str, ...], says: str
) -> None:
    assert says in one_line_error(invoke("bench", "serve", "--base-url", fake.url, *arguments))
    assert not fake.bodies


# ---- bench latency, throughput, startup, kernels ----


def test_bench_latency(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    trace = tmp_path / "trace.json"
    counts = ("--batch-size", "2", "--num-iters-warmup", "1", "--num-iters", "3", "--output-json", str(path))
    result = invoke("bench", "latency", "--model", "tiny", *SIZES, *counts, "--trace", str(trace))
    assert result.exit_code == 0, result.output
    assert sum(event["name"] == "request" and event["ph"] == "e" for event in json.loads(trace.read_text())) == 4 * 2
    saved = json.loads(path.read_text())
    assert len(saved["latencies"]) == 3 and set(saved["percentiles"]) == {"10", "25", "50", "75", "90", "99"}
    assert min(saved["latencies"]) <= saved["percentiles"]["50"] <= max(saved["latencies"])
    assert "Avg latency" in result.stdout
    assert "--num-iters is 0" in one_line_error(invoke("bench", "latency", "-m", "tiny", "--num-iters", "0"))


def test_bench_startup(invoke: Invoke, tmp_path: Path) -> None:
    """Processes of their own, so a model of its own too."""
    path, model = tmp_path / "startup.json", tmp_path / "model"
    model.mkdir()
    sizes = ("--device", "cpu", "--max-model-len", "64", "--num-kv-blocks", "8")
    counts = ("--num-iters-cold", "1", "--num-iters-warmup", "0", "--num-iters-warm", "0")
    result = invoke(
        *("bench", "startup", "--model", str(write_folder(TinySource(), model))),
        *(*sizes, *counts, "--output-json", str(path)),
    )
    assert result.exit_code == 0, result.output
    saved = json.loads(path.read_text())
    names = {"startup", "compilation", "first_token"}
    assert saved.keys() == {
        "cold_phases",
        *(key for n in names for key in (f"avg_cold_{n}_time", f"cold_{n}_times", f"cold_{n}_percentiles")),
    }
    (phases,) = saved["cold_phases"]
    assert saved["cold_first_token_times"] == [pytest.approx(sum(phases.values()))]
    left = phases["process"] + phases["first_token"]
    assert saved["avg_cold_startup_time"] == pytest.approx(saved["avg_cold_first_token_time"] - left)
    assert "Avg cold startup time: " in result.stdout and ", weights " in result.stdout
    assert "no such file" in one_line_error(invoke("bench", "startup", "-m", str(tmp_path / "none"), *counts))
    assert "--num-iters-warm is -1" in one_line_error(invoke("bench", "startup", "-m", "x", "--num-iters-warm", "-1"))


def test_bench_throughput(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "throughput.json"
    more = ("--num-warmups", "2", "--enforce-eager", "--async-scheduling", "--prefix-len", "0")
    result = invoke(
        "bench", "throughput", "--model", "tiny", *SIZES, "--num-prompts", "5", "--output-json", str(path), *more
    )
    assert result.exit_code == 0, result.output
    saved = json.loads(path.read_text())
    assert (saved["num_requests"], saved["total_num_tokens"], saved["total_output_tokens"]) == (5, 5 * 11, 15)
    assert saved["tokens_per_second"] == pytest.approx(55 / saved["elapsed_time"])
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "abc", "output_tokens": 2}\n')
    custom = ("--dataset-name", "custom", "--dataset-path", str(prompts), "--num-prompts", "2", "--device", "cpu")
    assert "2 requests" not in one_line_error(invoke("bench", "throughput", "-m", "tiny", "--dataset-name", "custom"))
    assert "Throughput:" in invoke("bench", "throughput", "-m", "tiny", *custom).stdout


def test_bench_kernels(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    result = invoke(
        "bench", "kernels", "rms_norm", "linear", "rms_norm_quantize_int8", "--num-tokens", "2", "--hidden-size", "64", "--intermediate-size", "64",
        "--device", "cpu", "--min-seconds", "0", "--output-json", str(path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    saved = json.loads(path.read_text())
    assert [row["operator"] for row in saved["rows"]] == ["rms_norm"] + ["linear"] * 4 + ["rms_norm_quantize_int8"]
    assert [text.split()[0] for text in result.stdout.splitlines()[2:]] == [row["operator"] for row in saved["rows"]]
    assert set(saved["ceilings"]) == {"memory", "matrix"}
    assert "softmax" in one_line_error(invoke("bench", "kernels", "softmax", "--device", "cpu"))
