"""Engines that are killed, stopped or crash, servers that are told to end, clients that leave or do not read."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.serve.harness import MODEL, NO_TLS, Running, chat, command, events, flags, running, wait_for

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


def read(server: Running, body: dict[str, Any], text: threading.Event | None = None) -> dict[str, Any]:
    """A stream to its end: text and number of log-probabilities of each completion, and how it ended. `text` is set
    whenever some came."""
    texts: dict[int, str] = {}
    logprobs: dict[int, int] = {}
    finish: dict[int, str] = {}
    usage, error, done = None, None, False
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=300, verify=NO_TLS) as response:
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
                content = choice["delta"].get("content") or ""
                if content and text is not None:
                    text.set()
                texts[index] = texts.get(index, "") + content
                logprobs[index] = logprobs.get(index, 0) + len((choice["logprobs"] or {}).get("content") or ())
                finish[index] = choice["finish_reason"] or finish.get(index, "")
    usage = usage and usage["completion_tokens"]
    return {"texts": texts, "logprobs": logprobs, "finish": finish, "usage": usage, "error": error, "done": done}


def wait_for_text(server: Running, kills: int, text: threading.Event, futures: list[Any]) -> None:
    """Until the engine that follows the last kill has done something (or there is nothing left to do): of engines that die
    before that, a server bears only some in a row."""
    restarts = "fastattn:engine_restarts_total"
    wait_for(lambda: server.metric(restarts) == kills, "the last death to be noticed")
    wait_for(lambda: server.get("/health").status_code == 200, "a healthy engine")
    text.clear()
    wait_for(lambda: text.is_set() or all(future.done() for future in futures), "text of this engine")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_streams_survive_the_death_of_the_engine(tiny_folder: Path) -> None:
    """20 x kill -9 while 8 streams run: each ends with the text that it would have had."""
    requests = bodies(440)
    with running(tiny_folder, *flags()) as server, concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
        expected = list(pool.map(lambda body: read(server, body), requests))
        assert all(e["done"] and e["error"] is None for e in expected)
        results = []
        kills, tries, text = 0, 0, threading.Event()
        while kills < KILLS:
            tries += 1
            assert tries <= 3 * KILLS, "the streams are over before they can be killed"
            futures = [pool.submit(read, server, body, text) for body in requests]
            for _ in range(4):  # several in the life of the same streams
                wait_for_text(server, kills, text, futures)
                time.sleep(0.05 * (kills % 7))
                if all(future.done() for future in futures) or kills == KILLS:
                    break
                os.kill(server.engine_pid(), signal.SIGKILL)
                kills += 1
            results.append([future.result(300) for future in futures])
        for result in results:
            assert result == expected
        assert server.metric("fastattn:engine_restarts_total") == kills
        wait_for(lambda: server.metric("fastattn:num_requests_running") == 0, "an idle engine", 60)


def test_a_hung_engine_is_replaced(tiny_folder: Path) -> None:
    """Stopped, it gives no sign of life while work is pending; its streams go on elsewhere."""
    requests, text = bodies(440)[:3], threading.Event()
    more = ("--engine-timeout", "4", "--health-timeout", "2")
    with running(tiny_folder, *flags(*more)) as server, concurrent.futures.ThreadPoolExecutor(3) as pool:
        expected = list(pool.map(lambda body: read(server, body), requests))
        old = server.engine_pid()
        futures = [pool.submit(read, server, body, text) for body in requests]
        assert text.wait(60)
        os.kill(old, signal.SIGSTOP)
        wait_for(lambda: server.get("/health").status_code == 503, "a server that says that it is unwell")
        assert [future.result(300) for future in futures] == expected
        assert server.engine_pid() != old and not psutil.pid_exists(old)
        # What is only slow is left alone.
        new = server.engine_pid()
        os.kill(new, signal.SIGSTOP)
        time.sleep(1)
        os.kill(new, signal.SIGCONT)
        assert read(server, requests[0]) == expected[0]
        assert server.engine_pid() == new


def test_an_engine_that_cannot_be_kept_ends_the_server(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    with running(folder, *flags()) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        (folder / "config.json").write_text("{}")
        engine, text = server.engine_pid(), threading.Event()
        stream = pool.submit(read, server, bodies(440)[0], text)
        assert text.wait(60)  # the metric of running streams may come after this one's end
        os.kill(engine, signal.SIGKILL)
        result = stream.result(300)
        assert result["done"] and "times in a row" in result["error"]["message"]
        assert server.process.wait(60) == 1
    assert sum("the engine process ended" in line for line in server.log) == 5


@pytest.mark.long
@pytest.mark.timeout(1800)  # twenty servers are started, on whatever else the machine does
def test_terminated_under_load_no_stream_breaks(tiny_folder: Path) -> None:
    """20 x SIGTERM while 6 streams run: what was taken is finished, what comes later is refused, the exit code is 0."""
    requests = bodies(200)[:6]
    expected: list[Any] = []
    for count in range(DRAINS):
        with running(tiny_folder, *flags()) as server, concurrent.futures.ThreadPoolExecutor(6) as pool:
            expected = expected or [read(server, body) for body in requests]
            results, codes = drain(server, pool, requests, 0.02 * count)
        assert codes == (503, 503, 0) or codes == (None, None, 0), codes
        # A stream that came after the signal was refused as a whole.
        assert all(r == e or r.get("status") == 503 for r, e in zip(results, expected, strict=True))
        assert results[0] == expected[0]


def drain(
    server: Running, pool: concurrent.futures.ThreadPoolExecutor, requests: list[dict[str, Any]], seconds: float
) -> tuple[list[dict[str, Any]], tuple[int | None, int | None, int]]:
    """How the streams ended, and the codes of /ready, of a request that came late (None: all was over), of the server."""
    texts = [threading.Event() for _ in requests]
    futures = [pool.submit(read, server, body, text) for body, text in zip(requests, texts, strict=True)]
    assert texts[0].wait(60)  # this one at least was taken
    time.sleep(seconds)
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: any("shutting down" in line for line in server.log), "the drain")
    ready = late = None
    try:
        late = server.post("/v1/completions", {"model": MODEL, "prompt": "late"}).status_code
        ready = server.get("/ready").status_code
    except httpx.HTTPError:
        ready = late = None
    results = [future.result(120) for future in futures]
    return results, (ready, late, server.process.wait(60))


@pytest.mark.parametrize("how", ["timeout", "second signal"])
def test_the_end_of_a_drain(tiny_folder: Path, how: str) -> None:
    timeout = "0.2" if how == "timeout" else "60"
    # Slow enough that it cannot be over by itself.
    body, text = chat("long", max_tokens=480, ignore_eos=True, n=16, stream=True), threading.Event()
    more = ("--shutdown-timeout", timeout, "--max-num-seqs", "1")
    with running(tiny_folder, *flags(*more)) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        stream = pool.submit(read, server, body, text)
        assert text.wait(60)
        server.process.send_signal(signal.SIGTERM)
        if how == "second signal":
            wait_for(lambda: any("shutting down" in line for line in server.log), "the drain")
            server.process.send_signal(signal.SIGINT)
        result = stream.result(60)
        assert server.process.wait(30) == 0
    assert result["done"] and "shutting down" in result["error"]["message"]


def test_nothing_is_left_of_a_server_that_was_killed(tiny_folder: Path) -> None:
    with running(tiny_folder, *flags()) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert len(children) >= 2  # an engine, a render worker
        server.process.kill()
        _, alive = psutil.wait_procs(children, 30)
        assert not alive


def test_clients_that_leave(server: Running) -> None:
    """At any moment, from streams and from plain requests: their work ends and their blocks are free."""
    usage = "fastattn:kv_cache_usage_perc"
    wait_for(lambda: server.metric("fastattn:num_requests_running") == 0, "an idle engine", 30)
    before = server.metric(usage), server.metric("fastattn:client_disconnects_total")
    for i in range(60):
        body = json.dumps(
            chat(f"leaving {i}", max_tokens=400, ignore_eos=True, n=1 + i % 3, stream=i % 3 != 0)
        ).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.encode() + body)
            time.sleep(0.004 * (i % 15))
    wait_for(lambda: server.metric("fastattn:client_disconnects_total") > before[1] + 30, "counted", 30)
    wait_for(lambda: server.metric("fastattn:num_requests_running") == 0, "all aborted", 30)
    wait_for(lambda: server.metric("fastattn:num_requests_waiting") == 0, "none that waits", 30)
    wait_for(lambda: server.metric(usage) == before[0], "free blocks", 60)


def test_clients_that_do_not_read(tiny_folder: Path) -> None:
    """They are cut off, and others do not wait for them."""
    body = chat("slow", max_tokens=400, ignore_eos=True, n=8, logprobs=True, top_logprobs=20, stream=True)
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    with running(tiny_folder, *flags("--write-timeout", "2")) as server:
        slow = []
        for _ in range(4):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(head.encode() + data)
            slow.append(connection)
        wait_for(lambda: server.metric("fastattn:num_requests_running") >= 8, "slow streams")
        assert read(server, bodies(50)[0])["done"]
        wait_for(lambda: server.metric("fastattn:client_disconnects_total") == 4, "slow clients cut off", 120)
        wait_for(lambda: server.metric("fastattn:num_requests_running") == 0, "an idle engine", 30)
        for connection in slow:
            connection.close()


def test_noise_on_the_internal_socket(server: Running) -> None:
    """ShadowMQ (CVE-2024-50050 and its copies): whatever comes there is dropped, and nothing is unpickled."""
    import zmq

    path = next(
        c.laddr for c in psutil.Process(server.process.pid).net_connections("unix") if str(c.laddr).endswith(".sock")
    )
    assert (os.stat(Path(path).parent).st_mode & 0o777) == 0o700
    before = server.metric("fastattn:invalid_messages_total")
    with socket.socket(socket.AF_UNIX) as plain:
        plain.connect(path)
        plain.sendall(os.urandom(4096))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    noise = context.socket(zmq.DEALER)
    noise.connect(f"ipc://{path}")
    for size in (0, 1, 10, 1000):
        noise.send(os.urandom(size))
        noise.send_multipart([b"", os.urandom(size)])
    wait_for(lambda: server.metric("fastattn:invalid_messages_total") >= before + 8, "counted noise", 60)
    noise.close(0)
    context.term()
    assert read(server, bodies(20)[0])["done"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "http"], "port: "),
        (["--port", "1", "--max-num-seqs", "0", "--dtype", "int4"], "max_num_seqs: "),
        (["--config", "/nonexistent.yaml"], "config: /nonexistent.yaml: No such file or directory"),
        (["--api-key", "short"], "api_key: a key has fewer than 8 characters"),
        (["--ssl-keyfile", "/x"], "ssl_keyfile"),
        (["--wrong"], "No such option"),
    ],
)
def test_wrong_flags(tiny_folder: Path, arguments: list[str], message: str) -> None:
    done = subprocess.run(command(tiny_folder, *arguments), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line and "short" not in line.partition(":")[2].replace("fewer", "")


def test_a_port_in_use(server: Running, tiny_folder: Path) -> None:
    arguments = command(tiny_folder, "--port", str(server.port))
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == f"fastattn: port: 127.0.0.1:{server.port}: Address already in use\n"


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path / "no"), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "no such file or folder" in line
