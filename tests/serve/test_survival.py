"""Engines that are killed, stopped or crash, servers that are told to end, clients that leave or do not read."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx

from tests.serve.harness import Running, chat, events, flags, running, wait_for

KILLS = 20
STREAMS = 8
DRAINS = 20


def bodies(max_tokens: int) -> list[dict[str, Any]]:
    """Streams of every kind that must survive: greedy, sampled with and without a seed, several completions, stop strings,
    log-probabilities, penalties."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 7},
        {"temperature": 0.8, "seed": 8, "n": 2},
        {"temperature": 0, "frequency_penalty": 0.5, "presence_penalty": 0.2},
        {"temperature": 1.0, "seed": 9, "stop": ["never to be seen", "ab0"]},
        {"temperature": 0, "logprobs": True, "top_logprobs": 2},
        {"temperature": 1.0, "seed": 11, "top_k": 20, "min_p": 0.01},
        {"temperature": 0.7, "seed": 12, "repetition_penalty": 1.2},
    ]
    shared = {"max_tokens": max_tokens, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    return [chat(f"story {i} " + "the " * i, **kind, **shared) for i, kind in enumerate(kinds)]


def read(server: Running, body: dict[str, Any]) -> dict[str, Any]:
    """A stream to its end: text and number of log-probabilities of each completion, and how it ended."""
    texts: dict[int, str] = {}
    logprobs: dict[int, int] = {}
    finish: dict[int, str] = {}
    usage, error, done = None, None, False
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=300) as response:
        if response.status_code != 200:
            return {"status": response.status_code, "error": response.read().decode()}
        for event in events(response):
            if event == "[DONE]":
                done = True
                continue
            assert isinstance(event, dict)
            error = event.get("error") or error
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                index = choice["index"]
                texts[index] = texts.get(index, "") + (choice["delta"].get("content") or "")
                logprobs[index] = logprobs.get(index, 0) + len((choice["logprobs"] or {}).get("content") or ())
                finish[index] = choice["finish_reason"] or finish.get(index, "")
    usage = usage and usage["completion_tokens"]
    return {"texts": texts, "logprobs": logprobs, "finish": finish, "usage": usage, "error": error, "done": done}


def test_streams_survive_the_death_of_the_engine(tiny_folder: Path) -> None:
    """20 x kill -9 while 8 streams run: each ends with the text that it would have had."""
    requests = bodies(440)
    with running(tiny_folder, *flags()) as server, concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
        expected = list(pool.map(lambda body: read(server, body), requests))
        assert all(e["done"] and e["error"] is None for e in expected)
        results = []
        kills, tries = 0, 0
        while kills < KILLS:
            tries += 1
            assert tries <= 3 * KILLS, "the streams are over before they can be killed"
            futures = [pool.submit(read, server, body) for body in requests]
            for _ in range(4):  # several in the life of the same streams
                wait_for(lambda: server.get("/health").status_code == 200, "a healthy engine")
                time.sleep(0.1 + 0.05 * (kills % 7))
                if all(future.done() for future in futures) or kills == KILLS:
                    break
                os.kill(server.engine_pid(), signal.SIGKILL)
                kills += 1
            results.append([future.result(300) for future in futures])
        for result in results:
            assert result == expected
        assert server.metric("fastattn:engine_restarts_total") == kills
        wait_for(lambda: server.metric("fastattn:num_requests_running") == 0, "an idle engine", 10)
