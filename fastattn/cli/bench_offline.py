"""`fastattn bench latency | throughput | startup`: the engine without a server."""

from __future__ import annotations

from dataclasses import replace

import typer
from tqdm import tqdm

from fastattn.cli import _bench_options as bopt
from fastattn.cli import _options as opt
from fastattn.cli import _session
from fastattn.cli._beside import Beside


@opt.with_engine()
def latency(
    model: bopt.BenchModel,
    input_len: bopt.InputLen = 32,
    output_len: bopt.OutputLen = 128,
    batch_size: int = typer.Option(8, "--batch-size", metavar="N", help="Requests that go in together."),
    num_iters_warmup: int = typer.Option(10, "--num-iters-warmup", metavar="N", help="Batches that are not counted."),
    num_iters: int = typer.Option(30, "--num-iters", metavar="N", help="Batches that are."),
    n: bopt.Completions = 1,
    seed: bopt.BenchSeed = 0,
    output_json: bopt.OutputJson = None,
    *,
    engine: opt.Engine,
    enable_prefix_caching: bopt.BenchPrefixCaching = False,
    enforce_eager: opt.EnforceEager = False,
    async_scheduling: opt.AsyncScheduling = None,
    speculative: opt.Speculative = None,
    trace: opt.Trace = None,
    against: bopt.Against = None,
    plot: bopt.Plot = None,
) -> None:
    """Time one batch from its prompts going in to its last token."""
    _check_least(("batch-size", batch_size, 1), ("num-iters-warmup", num_iters_warmup, 0), ("num-iters", num_iters, 1))
    from fastattn.benchmarks import offline

    beside = Beside(
        "latency",
        model,
        against=against,
        plot=plot,
        output_json=output_json,
        n=n,
        engine=engine,
    )
    beside.measure(
        lambda source: offline.latency_requests(source, input_len or 32, output_len or 128, batch_size, seed),
        num_iters,
        num_iters_warmup,
    )
    loaded = _session.load_llm(
        beside.model,
        **engine,
        enable_prefix_caching=enable_prefix_caching,
        use_cuda_graphs=not enforce_eager,
        async_scheduling=async_scheduling,
        speculative=speculative,
        trace=trace,
    )
    with tqdm(total=num_iters_warmup + num_iters, desc="Batches", disable=None) as bar:
        result = offline.latency(
            loaded.llm,
            input_len=input_len or 32,
            output_len=output_len or 128,
            batch_size=batch_size,
            num_iters_warmup=num_iters_warmup,
            num_iters=num_iters,
            n=n,
            seed=seed,
            on_iteration=bar.update,
        )
    typer.echo(f"Avg latency: {result['avg_latency']:.4f} seconds")
    for percentile, seconds in result["percentiles"].items():
        typer.echo(f"{percentile}% percentile latency: {seconds:.4f} seconds")
    beside.finish(result, offline.latency_figures, "avg_latency")


@opt.with_engine()
def throughput(
    model: bopt.BenchModel,
    dataset_name: bopt.Dataset = "random",
    dataset_path: bopt.DatasetPath = None,
    num_prompts: bopt.NumPrompts = 1000,
    num_warmups: bopt.NumWarmups = 0,
    input_len: bopt.InputLen = None,
    output_len: bopt.OutputLen = None,
    random_range_ratio: bopt.RangeRatio = 0.0,
    random_prefix_len: bopt.PrefixLen = 0,
    n: bopt.Completions = 1,
    seed: bopt.BenchSeed = 0,
    output_json: bopt.OutputJson = None,
    *,
    engine: opt.Engine,
    enable_prefix_caching: bopt.BenchPrefixCaching = False,
    enforce_eager: opt.EnforceEager = False,
    async_scheduling: opt.AsyncScheduling = None,
    speculative: opt.Speculative = None,
    trace: opt.Trace = None,
    against: bopt.Against = None,
    plot: bopt.Plot = None,
) -> None:
    """Time many requests, all given at once."""
    from fastattn.benchmarks import offline
    from fastattn.benchmarks.datasets import DatasetOptions

    options = DatasetOptions(
        dataset_name, dataset_path, num_prompts, input_len, output_len, random_range_ratio, random_prefix_len, seed
    )
    beside = Beside(
        "throughput",
        model,
        against=against,
        plot=plot,
        output_json=output_json,
        n=n,
        engine=engine,
    )
    # A peer's warm-up is the load itself: it is done once before it is timed.
    beside.measure(lambda source: offline.throughput_requests(source, options), warm_ups=min(num_warmups, 1))
    loaded = _session.load_llm(
        beside.model,
        **engine,
        enable_prefix_caching=enable_prefix_caching,
        use_cuda_graphs=not enforce_eager,
        async_scheduling=async_scheduling,
        speculative=speculative,
        trace=trace,
    )
    if num_warmups:
        warm_up = replace(options, num_prompts=num_warmups, seed=seed + 1)  # other prompts: none is in the prefix cache
        offline.throughput(loaded.llm, warm_up, n=n, show_progress=False)
    result = offline.throughput(loaded.llm, options, n=n)
    typer.echo(
        f"Throughput: {result['requests_per_second']:.2f} requests/s, {result['tokens_per_second']:.2f} total tokens/s, "
        f"{result['output_tokens_per_second']:.2f} output tokens/s"
    )
    num_output = result["total_output_tokens"]
    counts = result["num_requests"], result["total_num_tokens"] - num_output, num_output
    beside.finish(result, lambda seconds: offline.throughput_figures(seconds[0], *counts), "tokens_per_second")


@opt.with_engine("kv_offloading_size")
def startup(
    model: bopt.BenchModel,
    num_iters_cold: int = typer.Option(
        3, "--num-iters-cold", metavar="N", help="Starts with the model's files dropped from the page cache."
    ),
    num_iters_warmup: int = typer.Option(
        1, "--num-iters-warmup", metavar="N", help="Starts that are not counted, before the warm ones."
    ),
    num_iters_warm: int = typer.Option(3, "--num-iters-warm", metavar="N", help="Starts with the files in the cache."),
    output_json: bopt.OutputJson = None,
    *,
    engine: opt.Engine,
    against: bopt.Against = None,
) -> None:
    """Time the start of new processes, to the first token."""
    _check_least(
        ("num-iters-cold", num_iters_cold, 0),
        ("num-iters-warmup", num_iters_warmup, 0),
        ("num-iters-warm", num_iters_warm, 0),
    )
    if num_iters_cold + num_iters_warm == 0:
        raise ValueError("--num-iters-cold and --num-iters-warm are 0, expected a start that is counted")
    if against is not None and num_iters_warm == 0:
        raise ValueError(
            "--num-iters-warm is 0, allowed is at least 1 with --against: a peer starts with the files in the cache"
        )
    from fastattn.benchmarks.offline import latency_requests
    from fastattn.benchmarks.startup import PROMPT_LEN
    from fastattn.benchmarks.startup import startup as measure

    beside = Beside("startup", model, against=against, plot=None, output_json=output_json, n=1, engine=engine)
    beside.measure(lambda source: latency_requests(source, PROMPT_LEN, 1, 1, 0))
    with tqdm(total=num_iters_cold + num_iters_warmup + num_iters_warm, desc="Starts", disable=None) as bar:
        result = measure(
            model,
            {name: value for name, value in engine.items() if value is not None},
            num_iters_cold=num_iters_cold,
            num_iters_warmup=num_iters_warmup,
            num_iters_warm=num_iters_warm,
            on_iteration=bar.update,
        )
    for kind in ("cold", "warm"):
        if f"{kind}_phases" in result:
            typer.echo(
                f"Avg {kind} startup time: {result[f'avg_{kind}_startup_time']:.2f} seconds, "
                f"process start to first token: {result[f'avg_{kind}_first_token_time']:.2f} seconds"
            )
            last = result[f"{kind}_phases"][-1]
            typer.echo("  last: " + ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in last.items()))
    shown = "avg_warm_first_token_time"
    beside.finish(result, lambda seconds: {shown: seconds[0]}, shown)


def _check_least(*counts: tuple[str, int, int]) -> None:
    for name, value, least in counts:
        if value < least:
            raise ValueError(f"--{name} is {value}, allowed is at least {least}")
