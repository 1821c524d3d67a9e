"""The programs under examples/ run, each in a process of its own, on the tiny model of the engine's tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.serve.harness import save_tiny

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"

# Program → (further arguments, what it prints). {model} and {port} are filled in.
RUNS = {
    "embeddings.py": (("--model", "{model}"), ("A kitten naps.", "Stocks fell")),
    "guardrails.py": (
        ("--model", "{model}", "--port", "{port}"),
        ("200 {", "400 the request was refused by the guardrail 'orders'", 'guard="private"'),
    ),
    "offline.py": (("--model", "{model}"), ("The capital of Japan is|", "tokens were in the cache")),
    "one_operator.py": ((), ("as torch's",)),
    "openai_client.py": (
        ("--model", "{model}", "--port", "{port}"),
        ("0 [(", "1 [(", " tokens", "the model calls weather({"),
    ),
    "quantize.py": (("--model", "{model}"), ("perplexity ", "KL 0.0", "INT8 says:")),
    "router_cache.py": (
        ("--model", "{model}", "--port", "{port}"),
        ("model small, route default, cache miss", "cache hit", "model large, route rule:long, cache miss"),
    ),
    "structured_output.py": (("--model", "{model}"), ("json_schema: {", "regex: ", "choice: ")),
    "speculative.py": (("--model", "{model}"), ("the same 32 tokens in", "guesses were right")),
    "tensor_parallel.py": (("--model", "{model}"), ("two ranks on ", " say:")),
    "train_with_fastattn.py": (("--steps", "12"), ("largest difference of a step's loss: 0.00",)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_every_example_is_run_and_listed() -> None:
    programs = {path.name for path in EXAMPLES.glob("*.py")}
    assert programs == set(RUNS)
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"`{name}`" in listed for name in programs)


def free_port() -> int:
    """Below those that the kernel gives to who asks for any (from 32768 on), one of which another worker's server may get
    before the example's server does."""
    for port in range(20_000 + os.getpid() % 10_000, 32_768):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError("no port is free")


@pytest.mark.parametrize("name", RUNS)
def test_example_runs(name: str, model: Path, tmp_path: Path) -> None:
    if name == "train_with_fastattn.py":
        pytest.importorskip("transformers", reason="transformers comes with fastattn[compress]")
    if name in ("guardrails.py", "openai_client.py", "router_cache.py", "structured_output.py"):
        for module in ("openai", "fastapi", "llguidance"):
            pytest.importorskip(module, reason=f"{module} comes with fastattn[test]")
    arguments, expected = RUNS[name]
    command = [sys.executable, EXAMPLES / name, *(a.format(model=model, port=free_port()) for a in arguments)]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for text in expected:
        assert text in done.stdout, done.stdout
