"""Start-ups of the engine, each in a process of its own: `python -m fastattn.benchmarks.startup` is such a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastattn.benchmarks.offline import PERCENTILES
from fastattn.engine.quick_start import quick_start

PROMPT_LEN = 32


def startup(
    model: str,
    options: Mapping[str, Any],
    *,
    num_iters_cold: int,
    num_iters_warmup: int,
    num_iters_warm: int,
    on_iteration: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Starts an engine again and again, and has it say one token. options: EngineOptions', as JSON has them.

    "cold": the model's files were dropped from the page cache; "warm": they are in it. Keys as in vLLM's --output-json: of each
    avg_cold_startup_time, cold_startup_times and cold_startup_percentiles, from the engine being asked for to its being ready, and the
    same of "compilation", which is 0 as nothing is compiled. On top of those "first_token", from the process's start to the first
    token, and cold_phases, the time line of each start. Raises ValueError, in the engine's words, if it does not start.
    """
    result: dict[str, Any] = {}
    for kind, count, counts in (
        ("cold", num_iters_cold, True),
        ("warm", num_iters_warmup, False),
        ("warm", num_iters_warm, True),
    ):
        runs = []
        for _ in range(count):
            if kind == "cold":
                _drop_from_page_cache(model)
            runs.append(_start(model, options))
            on_iteration()
        if counts and runs:
            result |= _summary(kind, runs)
    return result


def _summary(kind: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, seconds in (
        ("startup", [run["engine"] for run in runs]),
        ("compilation", [0.0] * len(runs)),
        ("first_token", [run["total"] for run in runs]),
    ):
        found[f"avg_{kind}_{key}_time"] = float(np.mean(seconds))
        found[f"{kind}_{key}_times"] = seconds
        found[f"{kind}_{key}_percentiles"] = {str(p): float(np.percentile(seconds, p)) for p in PERCENTILES}
    return found | {f"{kind}_phases": [run["phases"] for run in runs]}


def _start(model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    spec = json.dumps({"model": model, "options": dict(options)})
    command = [sys.executable, "-m", "fastattn.benchmarks.startup"]
    done = subprocess.run(command, input=spec, stdout=subprocess.PIPE, text=True, check=False)
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise RuntimeError(f"the process that was started ended with code {done.returncode}") from None
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer


def _drop_from_page_cache(model: str) -> None:
    """Has the kernel forget what it holds of the model's files. Files in memory, as in /dev/shm, stay there."""
    from fastattn.models.loader import open_model

    path = Path(open_model(model).name)
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _measure(spec: Mapping[str, Any]) -> dict[str, Any]:
    with quick_start(spec["model"], spec["options"].get("device", "auto")):
        from fastattn.engine.llm import LLM
        from fastattn.engine.sampling_params import SamplingParams

        llm = LLM(spec["model"], quiet=True, **spec["options"])
    prompt = {"prompt_token_ids": [i % llm.model_config.vocab_size for i in range(PROMPT_LEN)]}
    llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True), use_tqdm=False)
    startup = llm.engine.startup
    assert startup is not None
    llm.close()
    return {"engine": startup.engine_seconds, "total": startup.total_seconds, "phases": startup.seconds}


def main() -> None:
    try:
        answer = _measure(json.load(sys.stdin))
    except (ValueError, TypeError) as error:  # what cannot work, said in one line
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
