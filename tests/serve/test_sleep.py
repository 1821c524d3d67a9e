"""Sleep and wake-up over HTTP: what becomes of requests, what everybody is told, and what a death makes of it."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from fastattn.serve.config import load
from tests.serve.harness import NO_TLS, Running, chat, events, flags, running, save_tiny, wait_for

KEYS = {"admin": "the-admin-key", "inference": "the-users-key"}
ANSWER = chat("the a", temperature=0, max_tokens=20, ignore_eos=True)
LONG = chat("a story", temperature=0, max_tokens=480, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("sleeper"))


@pytest.fixture(scope="module")
def sleeper(folder: Path) -> Iterator[Running]:
    file = folder.parent / "keys.yaml"
    file.write_text(
        "keys:\n"
        + "".join(
            f"  - {{name: {name}, sha256: {hashlib.sha256(key.encode()).hexdigest()}, scopes: {scopes}}}\n"
            for (name, key), scopes in zip(KEYS.items(), ("[inference, metrics, admin]", "[inference]"), strict=True)
        )
    )
    with running(folder, *flags("--enable-sleep-mode", "--api-keys-file", str(file)), key=KEYS["admin"]) as server:
        yield server


def text(server: Running, body: dict[str, Any] = ANSWER) -> str:
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    content: str = answer.json()["choices"][0]["message"]["content"]
    return content


def error(answer: httpx.Response) -> tuple[int, Any, str]:
    found = answer.json()["error"]
    return answer.status_code, found["code"], found["message"]


def is_sleeping(server: Running) -> bool:
    answer: bool = server.get("/is_sleeping").json()["is_sleeping"]
    return answer


def sleep_state(server: Running) -> list[str]:
    lines = [
        line for line in server.get("/metrics").text.splitlines() if line.startswith("fastattn:engine_sleep_state")
    ]
    assert len(lines) == 3
    return [line.split('sleep_state="')[1].split('"')[0] for line in lines if line.endswith(" 1.0")]


def test_who_sleeps_says_so_and_answers_the_same_afterwards(sleeper: Running) -> None:
    before = text(sleeper)
    for level, state in ((1, "weights_offloaded"), (2, "discard_all")):
        for _ in range(2):  # once more changes nothing
            assert sleeper.post(f"/sleep?level={level}", None).json() == {"is_sleeping": True}
        assert is_sleeping(sleeper) and sleep_state(sleeper) == [state]
        refused = sleeper.post("/v1/chat/completions", ANSWER)
        assert error(refused) == (503, "engine_asleep", "the model is asleep: POST /wake_up wakes it")
        assert refused.headers["retry-after"] == "60"
        assert sleeper.metric("fastattn:admission_rejections_total") >= level
        assert sleeper.get("/health").status_code == 200
        assert error(sleeper.get("/ready"))[::2] == (503, "engine 'tiny' is asleep")
        assert sleeper.post("/tokenize", {"prompt": "the a"}).status_code == 200
        assert error(sleeper.post(f"/sleep?level={3 - level}", None))[0] == 409
        assert sleeper.post("/wake_up?tags=weights", None).json() == {"is_sleeping": True}
        assert sleeper.post("/v1/chat/completions", ANSWER).status_code == 503
        for _ in range(2):
            assert sleeper.post("/wake_up", None).json() == {"is_sleeping": False}
        assert sleep_state(sleeper) == ["awake"] and sleeper.get("/ready").status_code == 200
        assert text(sleeper) == before


def test_who_may_and_what_is_refused(sleeper: Running, server: Running, folder: Path) -> None:
    user = Running(sleeper.process, sleeper.url, sleeper.log, KEYS["inference"])
    for path in ("/sleep", "/wake_up"):
        assert error(user.post(path, None))[::2] == (403, "this API key has no scope 'admin'")
        assert error(server.post(path, None))[:2] == (404, "sleep_mode_off")
    assert not is_sleeping(user)
    for query, message in (
        ("/sleep?level=0", "level is '0', allowed is 1 or 2"),
        ("/sleep?mode=now", "mode is 'now', allowed are abort, wait, keep"),
        ("/sleep?tags=weights", "'tags' is not a parameter, allowed are level, mode, model"),
        ("/wake_up?tags=kv", "tags has 'kv', allowed are weights and kv_cache"),
    ):
        assert error(sleeper.post(query, None))[::2] == (400, message)
    assert error(sleeper.post("/sleep?model=other", None))[0] == 404
    for more, message in (
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2, allowed is 1"),
        ({"speculative_config": {"model": str(folder)}}, "a draft model does not sleep"),
    ):
        with pytest.raises(ValueError, match=message):
            load({"model": str(folder), "enable_sleep_mode": True, **more}, {}, None)


def test_what_becomes_of_running_requests(sleeper: Running) -> None:
    expected = text(sleeper, LONG)

    def interrupted(mode: str) -> tuple[str, Any]:
        """A stream, the engine being put to sleep after its first words and woken when it sleeps: its text, and its error."""
        got, failure = "", None
        with (
            concurrent.futures.ThreadPoolExecutor(1) as pool,
            httpx.stream("POST", f"{sleeper.url}/v1/chat/completions", json=LONG | {"stream": True},
                         headers=sleeper.headers, timeout=60, verify=NO_TLS) as stream,
        ):  # fmt: skip
            switch = None
            for event in events(stream):
                if event == "[DONE]":
                    continue
                assert isinstance(event, dict)
                failure = event.get("error") or failure
                got += "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
                if got and switch is None:
                    switch = pool.submit(lambda: (sleeper.post(f"/sleep?mode={mode}", None), is_sleeping(sleeper),
                                                  sleeper.post("/wake_up", None)))  # fmt: skip
            assert switch is not None
            slept, was_asleep, woken = switch.result(60)
            assert (slept.status_code, was_asleep, woken.status_code) == (200, True, 200)
        return got, failure

    got, failure = interrupted("abort")
    assert expected.startswith(got) and got != expected and failure["code"] == "engine_asleep"
    for mode in ("wait", "keep"):
        assert interrupted(mode) == (expected, None), mode
    assert text(sleeper, LONG) == expected


def test_who_leaves_while_requests_finish_has_not_asked_for_sleep(sleeper: Running) -> None:
    slow = LONG | {"stream": True, "n": 16}
    with httpx.stream(
        "POST", f"{sleeper.url}/v1/chat/completions", json=slow, headers=sleeper.headers, timeout=60, verify=NO_TLS
    ) as s:
        stream = events(s)
        next(stream)
        soon = httpx.Timeout(60, read=0.1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{sleeper.url}/sleep?mode=wait", headers=sleeper.headers, timeout=soon, verify=NO_TLS)
        wait_for(lambda: not is_sleeping(sleeper), "to be awake again", 60)
        assert list(stream)[-1] == "[DONE]"
    assert not is_sleeping(sleeper)


def test_an_engine_that_dies_asleep_is_started_when_it_is_to_wake_up(sleeper: Running) -> None:
    before = text(sleeper)
    assert sleeper.post("/sleep", None).status_code == 200
    pid = sleeper.engine_pid()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(pid), "its end", 20)
    wait_for(lambda: any("the engine process ended" in line for line in sleeper.log), "its death to be seen", 20)
    assert sleeper._engine_pid() is None and is_sleeping(sleeper) and sleeper.get("/health").status_code == 200
    assert sleeper.post("/wake_up", None).json() == {"is_sleeping": False}
    assert sleeper.engine_pid() != pid and text(sleeper) == before
