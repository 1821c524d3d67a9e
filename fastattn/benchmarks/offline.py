"""The engine without a server: the latency of one batch, and the throughput of many requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastattn.benchmarks.datasets import DatasetOptions, load_samples

if TYPE_CHECKING:
    from fastattn.engine.intake import Prompt
    from fastattn.engine.llm import LLM

PERCENTILES = (10, 25, 50, 75, 90, 99)


def random_prompts(llm: LLM, lengths: Sequence[int], seed: int) -> list[Prompt]:
    """Prompts of random tokens: nothing is shared, and no text is needed."""
    rng = np.random.default_rng(seed)
    vocab_size = llm.model_config.vocab_size
    return [{"prompt_token_ids": rng.integers(0, vocab_size, length).tolist()} for length in lengths]


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
    prompts = random_prompts(llm, [input_len] * batch_size, seed)
    seconds = []
    for iteration in range(num_iters_warmup + num_iters):
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        if iteration >= num_iters_warmup:
            seconds.append(time.perf_counter() - start)
        on_iteration()
    return {
        "avg_latency": float(np.mean(seconds)),
        "latencies": seconds,
        "percentiles": {str(p): float(np.percentile(seconds, p)) for p in PERCENTILES},
    }


def throughput(llm: LLM, options: DatasetOptions, *, n: int = 1, show_progress: bool = True) -> dict[str, Any]:
    """All requests at once, to the end. Keys as in vLLM's --output-json, and how many tokens were generated."""
    from fastattn.engine.sampling_params import SamplingParams

    samples = load_samples(options, llm.tokenizer)
    prompts: Sequence[Prompt] = [s.prompt for s in samples]
    if options.name == "random" and not options.prefix_len:  # exact lengths, whatever the tokenizer makes of words
        prompts = random_prompts(llm, [s.prompt_len for s in samples], options.seed)
    params = [SamplingParams(n=n, temperature=1.0, ignore_eos=True, max_tokens=s.output_len) for s in samples]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=show_progress)
    elapsed = time.perf_counter() - start
    num_prompt = sum(len(o.prompt_token_ids) for o in outputs)
    num_output = sum(len(c.token_ids) for o in outputs for c in o.outputs)
    return {
        "elapsed_time": elapsed,
        "num_requests": len(outputs),
        "total_num_tokens": num_prompt + num_output,
        "total_output_tokens": num_output,
        "requests_per_second": len(outputs) / elapsed,
        "tokens_per_second": (num_prompt + num_output) / elapsed,
        "output_tokens_per_second": num_output / elapsed,
    }
