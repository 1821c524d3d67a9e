"""Servers as users start them: a process, a port, and the tiny model of the engine's tests as a folder on disk."""

from __future__ import annotations

import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from safetensors.torch import save_file

from tests.engine import tiny

START_SECONDS = 120  # on a machine that does many other things
# For httpx.get and its like: they read all certificates of the machine anew each time (50 ms), whatever the address.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
MODEL = "tiny"


def save_tiny(folder: Path) -> Path:
    """The tiny model in Hugging Face's layout."""
    source = tiny.TinySource()
    config, tokenizer = source.config, source.tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, info in source.tensors().items():
        tensors[name] = torch.empty(info.shape)
        source.read(name, tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
    }
    parts = tokenizer.parts()
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "tokenizer.json").write_text(parts["pipeline"])
    settings = {"add_bos_token": True, "chat_template": parts["chat_template"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@dataclass
class Running:
    process: subprocess.Popen[str]
    url: str
    log: list[str]
    key: str | None = None

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, headers=self.headers, timeout=60, verify=NO_TLS, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        options.setdefault("headers", self.headers)
        return httpx.post(self.url + path, json=body, timeout=60, verify=NO_TLS, **options)

    def metric(self, name: str) -> float:
        """The sum over the labels of a metric."""
        found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", self.get("/metrics").text, re.M)
        assert found, name
        return sum(map(float, found))

    def engine_pid(self) -> int:
        """Waits for one: between two engines there is none."""
        return wait_for(self._engine_pid, "an engine process")

    def _engine_pid(self) -> int | None:
        try:
            children = psutil.Process(self.process.pid).children()
            return next((c.pid for c in children if "fastattn.serve.engine_process" in c.cmdline()), None)
        except psutil.NoSuchProcess:
            return None

    def end(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        self.process.send_signal(number)
        return self.process.wait(seconds)


def wait_for(condition: Any, what: str, seconds: float = START_SECONDS) -> Any:
    """What the condition gives, as soon as it is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}")


def command(model: str | Path, *flags: str) -> list[str]:
    named = [str(model)] if model else []
    return [sys.executable, "-m", "fastattn", "serve", *named, "--port", "0", *flags]


@contextmanager
def running(model: str | Path, *flags: str, key: str | None = None, **environment: str) -> Iterator[Running]:
    """A server that is ready. After it nothing of it may be left, and no key may be in its log."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "FASTATTN_LOGLEVEL": "INFO", **environment}
    process = subprocess.Popen(command(model, *flags), stderr=subprocess.PIPE, text=True, env=env)
    log: list[str] = []
    reader = threading.Thread(target=_collect, args=(process, log), daemon=True)
    reader.start()
    children: list[psutil.Process] = []
    try:
        pattern = re.compile(r"ready, .* at (\S+) \(")
        found = wait_for(
            lambda: process.poll() is not None or next(filter(None, map(pattern.search, log)), None), "a ready line"
        )
        assert found is not True, "".join(log)
        children = psutil.Process(process.pid).children(recursive=True)
        yield Running(process, found[1], log, key)
    finally:
        if process.poll() is None:
            children += psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        reader.join(10)
        _, alive = psutil.wait_procs(children, 10)
        for child in alive:
            child.kill()
    assert not alive, f"left behind: {alive}"
    assert key is None or not any(key in line for line in log)


def _collect(process: subprocess.Popen[str], log: list[str]) -> None:
    assert process.stderr is not None
    log.extend(iter(process.stderr.readline, ""))  # extend takes them one by one, as they come


def events(response: httpx.Response) -> Iterator[dict[str, Any] | str]:
    """The events of a stream; [DONE] as it is."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}


def flags(*more: str) -> Sequence[str]:
    return ("--served-model-name", MODEL, "--num-kv-blocks", "256", "--block-size", "8", "--render-workers", "1", *more)
