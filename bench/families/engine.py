"""The whole engine with the 8B shape and random weights, beside vLLM and transformers, each in a process of its own.

An engine runs all workloads of the chosen cases at once, in one process, before the next one starts: 1 to 3 minutes each. What
is timed is the time from the prompts going in until the last token, by the host's clock. ids: FORM_LOAD.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.harness.accuracy import WrongResultError
from bench.harness.case import Case, CaseSpec, Checked, Context, Family
from bench.harness.ceilings import Work
from bench.harness.peers import PeerAbsentError
from bench.harness.timing import Recorded
from bench.random_model import LLAMA_8B, RandomSource
from fastattn.benchmarks.engines import Load, Measured, Request, measure, missing
from fastattn.models.config import config_from_hf
from fastattn.models.loader.quantized_source import with_quantization

Lengths = list[tuple[int, int]]  # prompt tokens, new tokens

# form → (quantization of ours, the ceiling that bounds its products, vLLM's quantization)
FORMS = {
    "bf16": (None, "bf16_tflop_s", None),
    "int8": ("int8", "int8_top_s", "fp8"),
    "fp4": ("nvfp4-w4a8", "fp8_tflop_s", "fp8"),
    "fp8": ("fp8", "fp8_tflop_s", "fp8"),
}
_REPEATS = 3
_MAX_SEQS = 256
_TIMEOUT_SECONDS = {"ours": 240.0, "vllm": 210.0, "hf": 230.0}
_HF_BUDGET_SECONDS = 60.0  # a batch of 128 may take longer
# Output tokens a second of an 8B model in FP8 with TensorRT-LLM 1.0, as its perf-overview has them: GPU → lengths → rate.
_PUBLISHED = {
    "H200": {(128, 128): 27911, (128, 2048): 26221, (500, 2000): 20770, (1000, 1000): 17744},
    "H100": {(128, 128): 28312, (128, 2048): 22714, (500, 2000): 17660, (1000, 1000): 15220},
}
# Requests, all given at once: whole waves of as many as are computed together.
_SATURATED = {(128, 128): 2048, (128, 2048): 512, (500, 2000): 512, (1000, 1000): 1024}
_SATURATED_SEQS = 512


def _mixed(count: int) -> Lengths:
    g = random.Random(7)

    def drawn(low: int, high: int, mean: float, spread: float) -> int:
        return int(min(high, max(low, g.lognormvariate(mean, spread))))

    return [(drawn(16, 2048, 5.5, 0.9), drawn(8, 1024, 5.0, 0.8)) for _ in range(count)]


LOADS: dict[str, Lengths] = {f"b{n}_512_128": [(512, 128)] * n for n in (1, 8, 32, 128)}
LOADS |= {"b1_32_256": [(32, 256)], "prefill_8x4096": [(4096, 1)] * 8, "mixed512": _mixed(512)}
LOADS |= {f"saturated_{i}_{o}": [(i, o)] * count for (i, o), count in _SATURATED.items()}
# Every number of sequences in a step, once, up to that of the options: what an engine prepares for each when it first meets it is
# not timed.
WARM_UP: Lengths = [(16, i + 1) for i in range(_SATURATED_SEQS)]
SHAPE: dict[str, Any] = LLAMA_8B


def requests(lengths: Lengths) -> list[Request]:
    rng = random.Random(0)
    most = min(100_000, SHAPE["vocab_size"] - 1)
    return [([rng.randint(10, most) for _ in range(prompt)], new) for prompt, new in lengths]


@cache
def weight_bytes(form: str) -> tuple[int, int]:
    """Bytes of the weights that every step reads, and their number: all but the embedding, of which it takes rows."""
    plain = RandomSource(config_from_hf(SHAPE))
    source = with_quantization(plain, FORMS[form][0])
    num_bytes = sum(t.nbytes for name, t in source.tensors().items() if "embed" not in name)
    return num_bytes, sum(t.nbytes // 2 for name, t in plain.tensors().items() if "embed" not in name)


def work(form: str, lengths: Lengths) -> Work:
    """The floor: the weights once a step, of which there are as many as the longest answer has tokens, or as it takes for all."""
    num_bytes, num_weights = weight_bytes(form)
    new = sum(n for _, n in lengths)
    steps = max(max(n for _, n in lengths), -(-new // _MAX_SEQS))
    tokens = sum(prompt + n - 1 for prompt, n in lengths)
    head = SHAPE["vocab_size"] * SHAPE["hidden_size"]
    num_ops = 2 * ((num_weights - head) * tokens + head * new)
    return Work(steps * num_bytes, num_ops, FORMS[form][1], new, "tok")


# ---- the engines ----


def run(context: Context, engine: str, form: str) -> Measured:
    """What one engine found in all loads that this run wants of it; measured when the first of them is asked for."""
    quantization, _, theirs = FORMS[form]
    on_gpu = context.device.type == "cuda"
    sizes = {
        "max_model_len": SHAPE["max_position_embeddings"],
        "max_num_seqs": _MAX_SEQS,
        "gpu_memory_utilization": 0.85,
    }
    dtype = "bfloat16" if on_gpu else "float32"
    names = [name for name in LOADS if _wants(context, engine, form, name)]
    if engine == "ours":
        start = "bench.our_engine:ours"
        options: dict[str, Any] = {"device": context.device.type, "dtype": dtype, "quantization": quantization, **sizes}
        if any(
            name.startswith("saturated") for name in names
        ):  # as many at a time as the memory holds, with a KV cache of 8 bits, as TensorRT-LLM's are
            options |= {"max_num_seqs": _SATURATED_SEQS, "kv_cache_dtype": "fp8"}
        if not on_gpu:
            options |= {"num_kv_blocks": 512, "max_num_seqs": 8}
    elif engine == "vllm":
        start = "fastattn.benchmarks.engines:vllm"
        options = {"load_format": "dummy", "dtype": dtype, "quantization": theirs, **sizes}
    else:
        start = "fastattn.benchmarks.engines:hf"
        options = {"load_format": "dummy", "dtype": dtype, "device": context.device.type}
        options |= {"budget_seconds": _HF_BUDGET_SECONDS}
    loads = [
        Load(name, requests(LOADS[name]), repeats=1 if len(LOADS[name]) > _MAX_SEQS else _REPEATS) for name in names
    ]
    if engine != "hf":
        loads.insert(0, Load("warm_up", requests(WARM_UP[: options["max_num_seqs"]]), repeats=1))
    if on_gpu:
        torch.cuda.empty_cache()  # all of the GPU is the child's
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(SHAPE))
        return measure(start, folder, options, loads, timeout_seconds=_TIMEOUT_SECONDS[engine])


def _wants(context: Context, engine: str, form: str, load: str) -> bool:
    """Whether a case of this run needs this engine to do this load."""
    if engine == "hf":
        return load == "mixed512"
    if engine == "vllm":
        return any(f"{f}_{load}" in context.ids for f, (_, _, theirs) in FORMS.items() if theirs == FORMS[form][2])
    return f"{form}_{load}" in context.ids or (form == "bf16" and f"hf_{load}" in context.ids)


def recorded(context: Context, engine: str, form: str, load: str) -> Callable[[], Recorded]:
    """Seconds of a load ("startup": until the first token). Raises if the engine did not get that far."""
    module = {"vllm": "vllm", "hf": "transformers"}.get(engine)
    if module and (why := missing(module)):
        raise PeerAbsentError(why)
    shared = FORMS[form][2] if engine == "vllm" else form  # vLLM's fp8 is beside both of ours
    found = context.once(f"{engine} {shared}", lambda: run(context, engine, form))
    if load == "startup":
        seconds = [found.startup_seconds] if found.startup_seconds else []
    else:
        seconds = found.seconds.get(load, [])
    if not seconds:
        raise RuntimeError(f"{engine}: {found.error or f'no time of {load}'}")
    return lambda: Recorded(seconds, found.notes.get(load, ""))


# ---- cases ----


def workload(context: Context, form: str, load: str, peer: str) -> Case:
    lengths = LOADS[load]
    num_bytes, _ = weight_bytes(form)
    about = (
        f"{form}{f' ({FORMS[form][0]})' if FORMS[form][0] else ''}, {len(lengths)} request(s), {_text(lengths)}, greedy"
    )
    return Case(
        lambda: recorded(context, "ours", form, load)(),
        lambda: _check(context, form, load),
        {peer: lambda: _peer(context, peer, form, load)},
        work(form, lengths),
        f"8B shape, {about}; floor: {num_bytes / 1e9:.2f} GB of weights a step",
    )


def startup(context: Context) -> Case:
    return Case(
        lambda: recorded(context, "ours", "bf16", "startup")(),
        lambda: _check(context, "bf16", "startup"),
        {"vllm": lambda: recorded(context, "vllm", "bf16", "startup")},
        Work(),
        "8B shape, bf16, random weights: from the process's start to the first token of a prompt of 32",
    )


def _check(context: Context, form: str, load: str) -> Checked:
    """That every request got its tokens was checked where they were made; that they are right is the tests' to say."""
    try:
        recorded(context, "ours", form, load)
    except RuntimeError as error:
        raise WrongResultError(str(error)) from None
    return Checked(0.0)


def _peer(context: Context, peer: str, form: str, load: str) -> Callable[[], Recorded]:
    if peer != "tensorrt_llm":
        return recorded(context, peer, form, load)
    name = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else "a CPU"
    rates = next((rates for gpu, rates in _PUBLISHED.items() if gpu in name), None)
    if rates is None:
        raise PeerAbsentError(f"nothing published for {name}")
    lengths = LOADS[load]
    seconds = sum(new for _, new in lengths) / rates[lengths[0]]
    return lambda: Recorded([seconds], "published, not measured here: FP8, TensorRT-LLM 1.0's perf-overview")


def _text(lengths: Lengths) -> str:
    if len(set(lengths)) == 1:
        return f"{lengths[0][0]} prompt and {lengths[0][1]} new tokens each"
    prompt, new = (sum(column) for column in zip(*lengths, strict=True))
    return f"{prompt} prompt and {new} new tokens together"


def _spec(form: str, load: str) -> CaseSpec:
    quick = (form, load) == ("bf16", "b1_512_128")
    return CaseSpec(f"{form}_{load}", lambda c: workload(c, form, load, "vllm"), quick)


def _saturated(form: str, load: str) -> CaseSpec:
    quick = load == "saturated_128_128"
    return CaseSpec(f"{form}_{load}", lambda c: workload(c, form, load, "tensorrt_llm"), quick)


FAMILY = Family(
    "engine",
    "cuda",
    "our engine with an 8B shape, beside vLLM (bf16, and fp8 beside our int8 and fp4) and transformers",
    (
        *(_spec(form, load) for form in ("bf16", "int8", "fp4") for load in LOADS if not load.startswith("saturated")),
        CaseSpec("hf_mixed512", lambda c: workload(c, "bf16", "mixed512", "hf")),
        CaseSpec("startup", startup),
    ),
    timer="recorded",
)
SATURATED = Family(
    "engine_saturated",
    "cuda",
    "our engine with an 8B shape and as many requests as it takes, beside what TensorRT-LLM publishes",
    tuple(_saturated(form, load) for form in ("int8", "fp8", "fp4") for load in LOADS if load.startswith("saturated")),
    timer="recorded",
)
