"""The engine without a server: the latency of one batch, and the throughput of many requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn.benchmarks.datasets import DatasetOptions, Sample, load_samples

if TYPE_CHECKING:
    from fastattn.benchmarks.engines import Request
    from fastattn.engine.llm import LLM
    from fastattn.models.loader import ModelSource
    from fastattn.models.tokenizer import Tokenizer

PERCENTILES = (10, 25, 50, 75, 90, 99)


def random_prompts(vocab_size: int, lengths: Sequence[int], seed: int) -> list[dict[str, list[int]]]:
    """Prompts of random tokens: nothing is shared, and no text is needed. The same arguments give the same prompts."""
    rng = np.random.default_rng(seed)
    return [{"prompt_token_ids": rng.integers(0, vocab_size, length).tolist()} for length in lengths]


def throughput_prompts(
    options: DatasetOptions, vocab_size: int, tokenizer: Tokenizer
) -> tuple[Sequence[str | dict[str, list[int]]], list[Sample]]:
    """What `throughput` asks, and how long the answers are."""
    samples = load_samples(options, tokenizer)
    if options.name == "random" and not options.prefix_len:  # exact lengths, whatever the tokenizer makes of words
        return random_prompts(vocab_size, [s.prompt_len for s in samples], options.seed), samples
    return [s.prompt for s in samples], samples


def latency_requests(source: ModelSource, input_len: int, output_len: int, batch_size: int, seed: int) -> list[Request]:
    """What `latency` asks of a model, in token ids."""
    prompts = random_prompts(source.config.vocab_size, [input_len] * batch_size, seed)
    return [(p["prompt_token_ids"], output_len) for p in prompts]


def throughput_requests(source: ModelSource, options: DatasetOptions) -> list[Request]:
    """What `throughput` asks of a model, in token ids."""
    tokenizer = source.tokenizer()
    prompts, samples = throughput_prompts(options, source.config.vocab_size, tokenizer)
    ids = [tokenizer.encode(p) if isinstance(p, str) else p["prompt_token_ids"] for p in prompts]
    return [(found, sample.output_len) for found, sample in zip(ids, samples, strict=True)]


def latency(
    llm: LLM,
    *,
    input_len: int,
    output_len: int,
    batch_size: int,
    num_iters_warmup: int,
    num_iters: int,
    n: int = 1,
    seed: int = 0,
    on_iteration: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Seconds from a batch going in to its last token. Keys as in vLLM's --output-json: avg_latency, latencies, percentiles."""
    from fastattn.engine.sampling_params import SamplingParams

    params = SamplingParams(n=n, temperature=1.0, ignore_eos=True, max_tokens=output_len)
    prompts = random_prompts(llm.model_config.vocab_size, [input_len] * batch_size, seed)
    seconds = []
    for iteration in range(num_iters_warmup + num_iters):
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        if iteration >= num_iters_warmup:
            seconds.append(time.perf_counter() - start)
        on_iteration()
    return latency_figures(seconds)


def latency_figures(seconds: Sequence[float]) -> dict[str, Any]:
    return {
        "avg_latency": float(np.mean(seconds)),
        "latencies": list(seconds),
        "percentiles": {str(p): float(np.percentile(seconds, p)) for p in PERCENTILES},
    }


def throughput(llm: LLM, options: DatasetOptions, *, n: int = 1, show_progress: bool = True) -> dict[str, Any]:
    """All requests at once, to the end. Keys as in vLLM's --output-json, and how many tokens were generated."""
    from fastattn.engine.sampling_params import SamplingParams

    prompts, samples = throughput_prompts(options, llm.model_config.vocab_size, llm.tokenizer)
    params = [SamplingParams(n=n, temperature=1.0, ignore_eos=True, max_tokens=s.output_len) for s in samples]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=show_progress)
    elapsed = time.perf_counter() - start
    num_prompt = sum(len(o.prompt_token_ids) for o in outputs)
    num_output = sum(len(c.token_ids) for o in outputs for c in o.outputs)
    return throughput_figures(elapsed, len(outputs), num_prompt, num_output)


def throughput_figures(elapsed: float, num_requests: int, num_prompt: int, num_output: int) -> dict[str, Any]:
    return {
        "elapsed_time": elapsed,
        "num_requests": num_requests,
        "total_num_tokens": num_prompt + num_output,
        "total_output_tokens": num_output,
        "requests_per_second": num_requests / elapsed,
        "tokens_per_second": (num_prompt + num_output) / elapsed,
        "output_tokens_per_second": num_output / elapsed,
    }
