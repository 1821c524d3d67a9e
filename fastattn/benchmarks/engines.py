"""Whole engines beside each other: each in a process of its own, one after the other, with the same requests.

A process can be given back what it took: the GPU's memory is the next engine's, and what one of them sets in its process
(environment, allocator, threads) is not another's. Used by `fastattn bench … --against` and by the repository's benchmarks.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Request = tuple[list[int], int]  # prompt token ids, tokens to generate

# What a user is told who asks for a peer that is not there.
INSTALL = {"vllm": "pip install vllm", "transformers": "pip install transformers"}

_VLLM_ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True)
class Load:
    """A piece of work: all of its requests are given at once. It is done `warm_ups` times before the `repeats` that count."""

    name: str
    requests: Sequence[Request]
    repeats: int = 1
    warm_ups: int = 0


@dataclass(frozen=True)
class Running:
    """An engine that can generate. generate(requests) → seconds from the requests going in until each has exactly as many
    tokens as it asked for, and what there is to say of this figure ("" where it was simply measured)."""

    version: str
    generate: Callable[[Sequence[Request]], tuple[float, str]]


@dataclass
class Measured:
    """What a process found. startup_seconds: from its start until a request of 32 tokens has one more. seconds: of each
    repeat of each load, as far as it came. notes: load → what there is to say of its seconds. error: why it ended early."""

    version: str = ""
    startup_seconds: float = 0.0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    error: str = ""


def missing(module: str) -> str:
    """Why a peer cannot be measured here, and what would help; "" if its package is there."""
    if importlib.util.find_spec(module) is not None:
        return ""
    return f"{module} is not installed: {INSTALL[module]}"


def measure(
    start: str, model: str, options: Mapping[str, Any], loads: Sequence[Load], *, timeout_seconds: float = 3600.0
) -> Measured:
    """Runs ``loads`` in a new process with the engine that ``start``, a "module:function" (model, options) → `Running`,
    gives. Raises nothing: what was found before an error, or before the time was over, counts."""
    with tempfile.TemporaryDirectory() as scratch:
        job, out, log = (Path(scratch, name) for name in ("job.json", "out.json", "log"))
        work = {"start": start, "model": model, "options": dict(options), "loads": [asdict(load) for load in loads]}
        job.write_text(json.dumps(work))
        command = [sys.executable, "-m", __name__, str(job), str(out), repr(time.time())]
        error = ""
        with log.open("wb") as file:
            try:
                code = subprocess.run(
                    command, stdout=file, stderr=file, timeout=timeout_seconds, check=False, stdin=subprocess.DEVNULL
                ).returncode
                error = f"ended with {code}" if code else ""
            except subprocess.TimeoutExpired:
                error = f"was ended after {timeout_seconds:g} s"
        found = Measured(**json.loads(out.read_text())) if out.is_file() else Measured()
        if error and not found.error:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            found.error = f"its process {error}" + (f": {lines[-1][:300]}" if lines else "")
        return found


# ---- engines ----


def vllm(model: str, options: Mapping[str, Any]) -> Running:
    """vLLM in this process; options: its own, and `temperature`."""
    os.environ.update(_VLLM_ENV)
    import vllm

    settings = dict(options)
    temperature = settings.pop("temperature", 0.0)
    llm = vllm.LLM(model, skip_tokenizer_init=True, enable_prefix_caching=False, disable_log_stats=True, **settings)

    def generate(requests: Sequence[Request]) -> tuple[float, str]:
        prompts = [vllm.TokensPrompt(prompt_token_ids=ids) for ids, _ in requests]
        params = [
            vllm.SamplingParams(temperature=temperature, max_tokens=new, ignore_eos=True, detokenize=False)
            for _, new in requests
        ]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        check_lengths([len(output.outputs[0].token_ids) for output in outputs], requests)
        return seconds, ""

    return Running(vllm.__version__, generate)


def hf(model: str, options: Mapping[str, Any]) -> Running:
    """transformers' `generate`: left-padded batches in the order of the requests, each until its longest is done.

    options: device, dtype, temperature; load_format "dummy": random weights; batch_size: halved as long as the memory does not
    hold it; budget_seconds: after so many no further batch is begun, and the rest is counted by its steps.
    """
    import torch

    transformers: Any = importlib.import_module("transformers")
    device, dtype = torch.device(options["device"]), getattr(torch, options["dtype"])
    if options.get("load_format") == "dummy":
        config = transformers.AutoConfig.from_pretrained(model)
        with device:
            network = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    else:
        network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa")
    network = network.to(device).eval()
    temperature = options.get("temperature", 0.0)
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    # No end token: it shall give exactly as many tokens as it is asked for.
    network.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0, **drawn)
    budget = options.get("budget_seconds", float("inf"))

    @torch.inference_mode()
    def run(batch: Sequence[Request]) -> list[int]:
        width = max(len(ids) for ids, _ in batch)
        padded = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids, _ in batch], device=device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in batch], device=device)
        out = network.generate(padded, attention_mask=mask, max_new_tokens=max(new for _, new in batch))
        return [len(row[:new]) for row, (_, new) in zip(out[:, width:].tolist(), batch, strict=True)]

    def timed(requests: Sequence[Request], size: int) -> tuple[float, str]:
        batches = [requests[i : i + size] for i in range(0, len(requests), size)]
        steps = [max(new for _, new in batch) for batch in batches]
        start, lengths, done = time.perf_counter(), list[int](), 0
        while done < len(batches) and (done == 0 or time.perf_counter() - start < budget):
            lengths += run(batches[done])
            done += 1
        seconds = time.perf_counter() - start
        check_lengths(lengths, requests[: len(lengths)])
        if done == len(batches):
            return seconds, ""
        share = sum(steps[:done]) / sum(steps)
        note = f"estimated: {len(lengths)} of {len(requests)} requests, in batches of {size}, took {seconds:.1f} s"
        return seconds / share, f"{note}, and have {share:.3f} of the steps"

    def generate(requests: Sequence[Request]) -> tuple[float, str]:
        size = min(options.get("batch_size", 128), len(requests))
        while True:
            try:
                return timed(requests, size)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            torch.cuda.empty_cache()
            size = -(-size // 2)

    return Running(transformers.__version__, generate)


def check_lengths(found: Sequence[int], requests: Sequence[Request]) -> None:
    """Raises RuntimeError where a request did not get its number of tokens: the time would be of other work."""
    for i, (count, (_, new)) in enumerate(zip(found, requests, strict=True)):
        if count != new:
            raise RuntimeError(f"request {i} got {count} tokens, expected {new}")


# ---- the process ----


def main(job: str, out: str, began: str) -> None:
    """began: when the process was started, on the wall clock."""
    work = json.loads(Path(job).read_text())
    loads = [Load(**load) for load in work["loads"]]
    found = Measured()

    def save() -> None:
        partial = Path(out + ".partial")
        partial.write_text(json.dumps(asdict(found)))
        partial.replace(out)

    try:
        module, _, name = work["start"].partition(":")
        engine: Running = getattr(importlib.import_module(module), name)(work["model"], work["options"])
        engine.generate([(loads[0].requests[0][0][:32], 1)])
        found.version, found.startup_seconds = engine.version, time.time() - float(began)
        save()
        for load in loads:
            requests = [(ids, new) for ids, new in load.requests]
            for _ in range(load.warm_ups):
                engine.generate(requests)
            found.seconds[load.name] = []
            for _ in range(load.repeats):
                seconds, note = engine.generate(requests)
                found.seconds[load.name].append(seconds)
                if note:
                    found.notes[load.name] = note
                save()
    except Exception as error:
        import traceback

        traceback.print_exc()
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        found.error = f"{type(error).__name__}: {text[:300]}"
        save()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if found.error else 0)  # nothing of an engine's end is of interest, and some of them hang in it


if __name__ == "__main__":
    main(*sys.argv[1:])
