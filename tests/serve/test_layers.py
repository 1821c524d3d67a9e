"""A server with everything: two engines, speculation, ranks, router, cache, guardrails."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import yaml

from tests.serve.harness import Running, chat, flags, running, wait_for
from tests.serve.test_survival import bodies, read


def ask(server: Running, model: str, text: str, **fields: object) -> tuple[int, str, dict[str, str]]:
    body = chat(text, max_tokens=12, temperature=0, **fields) | {"model": model}
    response = server.post("/v1/chat/completions", body)
    answer = response.json()
    found = answer["choices"][0]["message"]["content"] if response.status_code == 200 else answer["error"]["message"]
    return response.status_code, found, dict(response.headers)


def test_everything_in_front_of_two_engines(tiny_folder: Path, tmp_path: Path) -> None:
    small = {"model": str(tiny_folder), "num_kv_blocks": 256, "block_size": 8}
    speculative = {"method": "ngram", "num_speculative_tokens": 3}
    config = {
        **small,
        "served_model_name": ["plain"],
        "render_workers": 1,
        "models": {"quick": {**small, "speculative_config": speculative}},
        "router": {
            "model_list": [{"model_name": "small", "engine": "plain"}, {"model_name": "large", "engine": "quick"}],
            "routes": {
                "auto": {
                    "rules": [{"name": "long", "when": {"min_prompt_chars": 30}, "use": "large"}],
                    "default": "small",
                }
            },
        },
        "cache": {"path": str(tmp_path / "cache.db"), "lookup_timeout": 60.0},
        "guardrails": {"guards": [{"kind": "words", "name": "words", "words": ["forbidden"], "directions": ["input"]}]},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    with running("", "--config", str(file)) as server:
        listed = {model["id"] for model in server.get("/v1/models").json()["data"]}
        assert listed == {"small", "large", "auto"}
        status, text, headers = ask(server, "auto", "short")
        assert status == 200 and headers["x-fastattn-model"] == "small" and headers["x-fastattn-cache"] == "miss"
        assert ask(server, "auto", "short")[2]["x-fastattn-cache"] == "hit"
        # Speculation changes no text, whichever engine answers.
        assert ask(server, "large", "short")[1] == text == ask(server, "small", "short")[1]
        assert ask(server, "auto", "long enough " * 4)[2]["x-fastattn-model"] == "large"
        status, message, _ = ask(server, "auto", "a forbidden word")
        assert status == 400 and "words" in message
        assert ask(server, "plain", "x")[0] == 404
        # It comes with the next sign of life.
        wait_for(lambda: server.metric("fastattn:engine_steps_total") > 0, "steps that are counted", 60)


def test_ranks_that_die_are_replaced_with_their_engine(tiny_folder: Path) -> None:
    requests = bodies(200)[:2]
    with running(tiny_folder, *flags()) as server:
        alone = [read(server, body) for body in requests]
    with running(tiny_folder, *flags("--tensor-parallel-size", "2")) as server:
        assert [read(server, body) for body in requests] == alone
        engine = psutil.Process(server.engine_pid())
        (rank,) = [child for child in engine.children(recursive=True) if child.num_threads() > 1]
        os.kill(rank.pid, signal.SIGKILL)
        wait_for(lambda: not engine.is_running(), "the end of the group", 30)
        assert [read(server, body) for body in requests] == alone
        assert server.metric("fastattn:engine_restarts_total") == 1
        assert not engine.is_running() and not rank.is_running()
