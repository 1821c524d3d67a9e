"""`fastattn bench serve`: drives any OpenAI-compatible server, and says what its users would have seen."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from tqdm import tqdm

from fastattn import config
from fastattn.cli import _bench_options as bopt
from fastattn.cli._options import Temperature, _number

if TYPE_CHECKING:
    from fastattn.benchmarks.datasets import Sample
    from fastattn.benchmarks.load import Outcome, Target


def serve(
    base_url: Annotated[
        str | None, typer.Option("--base-url", metavar="URL", help="The server; OPENAI_BASE_URL, else this machine's.")
    ] = None,
    host: Annotated[str, typer.Option("--host", metavar="HOST", help="Without --base-url.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="PORT", help="Without --base-url.")] = 8000,
    endpoint: Annotated[
        str | None,
        typer.Option(
            "--endpoint", metavar="PATH", help="/v1/completions or /v1/chat/completions; --backend's if not given."
        ),
    ] = None,
    backend: Annotated[
        Literal["openai", "openai-chat", "vllm"],
        typer.Option("--backend", help="Which endpoint, in vLLM's words: openai-chat is /v1/chat/completions."),
    ] = "openai",
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="NAME", help="As the server calls it; the first it lists.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", metavar="KEY", help="OPENAI_API_KEY, if not given.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="MODEL", help="A model whose tokenizer makes prompts of exact length."),
    ] = None,
    dataset_name: bopt.Dataset = "random",
    dataset_path: bopt.DatasetPath = None,
    num_prompts: bopt.NumPrompts = 1000,
    num_warmups: bopt.NumWarmups = 0,
    input_len: bopt.InputLen = None,
    output_len: bopt.OutputLen = None,
    random_range_ratio: bopt.RangeRatio = 0.0,
    random_prefix_len: bopt.PrefixLen = 0,
    request_rate: Annotated[
        list[str] | None,
        typer.Option("--request-rate", metavar="R", help="Requests a second, or inf; repeated: one run for each."),
    ] = None,
    burstiness: Annotated[
        float, _number("--burstiness", "B", "1: a Poisson process; below 1 burstier, above more even.")
    ] = 1.0,
    max_concurrency: Annotated[
        int | None, typer.Option("--max-concurrency", metavar="N", min=1, help="Most requests in flight.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos/--no-ignore-eos", help="Ask for answers of full length.")
    ] = False,
    temperature: Temperature = 0.0,
    extra_body: Annotated[
        str | None, typer.Option("--extra-body", metavar="JSON", help="Further fields of every request.")
    ] = None,
    seed: bopt.BenchSeed = 0,
    percentile_metrics: Annotated[
        str, typer.Option("--percentile-metrics", metavar="LIST", help="Which of ttft,tpot,itl,e2el to show.")
    ] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[
        str, typer.Option("--metric-percentiles", metavar="LIST", help="Percentiles, such as 50,90,99.")
    ] = "99",
    goodput: Annotated[
        list[str] | None,
        typer.Option("--goodput", metavar="METRIC:MS", help="Count requests below this, such as ttft:200; repeatable."),
    ] = None,
    timeout: Annotated[float, _number("--timeout", "SECONDS", "The longest silence of the server.")] = 600.0,
    save_result: Annotated[bool, typer.Option("--save-result", help="Write the result as JSON.")] = False,
    save_detailed: Annotated[
        bool, typer.Option("--save-detailed", help="With every request's figures and text in it.")
    ] = False,
    result_dir: Annotated[Path, typer.Option("--result-dir", metavar="FOLDER", help="Where to.")] = Path("."),
    result_filename: Annotated[
        str | None, typer.Option("--result-filename", metavar="NAME", help="Not given: rate, model and time.")
    ] = None,
    plot: bopt.Plot = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against", metavar="NAME=URL", help="Another server to give the same load afterwards; repeatable."
        ),
    ] = None,
    disable_tqdm: Annotated[bool, typer.Option("--disable-tqdm", help="No progress bar.")] = False,
) -> None:
    """Send requests to a server by the clock, and time the answers.

    Exit code 1 if a request failed.
    """
    from fastattn.benchmarks import load, summary
    from fastattn.benchmarks.datasets import DatasetOptions, load_samples
    from fastattn.benchmarks.plot import load_section, require_matplotlib, write
    from fastattn.openai_http import Server

    # What can be wrong without the server is found before it is asked.
    endpoint = endpoint or ("/v1/chat/completions" if backend == "openai-chat" else "/v1/completions")
    if backend == "openai-chat" and not endpoint.endswith("chat/completions"):
        raise ValueError(f"--endpoint is {endpoint!r}, expected /v1/chat/completions with --backend openai-chat")
    metrics = _metrics(percentile_metrics)
    percentiles = [_in(text, "metric-percentiles", 0, 100) for text in metric_percentiles.split(",")]
    limits = dict(_limit(text) for text in goodput or [])
    rates = [float("inf") if r == "inf" else _in(r, "request-rate", 0, float("inf")) for r in request_rate or ["inf"]]
    arrivals = [load.arrival_times(num_prompts, rate, burstiness, seed) for rate in rates]
    extra = _extra(extra_body, temperature, ignore_eos)
    options = DatasetOptions(
        dataset_name, dataset_path, num_prompts, input_len, output_len, random_range_ratio, random_prefix_len, seed
    )
    if plot is not None:
        require_matplotlib()
    if (save_result or save_detailed) and not result_dir.is_dir():
        raise ValueError(f"--result-dir is {str(result_dir)!r}, expected a folder that is there")
    url = base_url or config.openai_base_url() or f"http://{host}:{port}"
    server = Server(url, api_key or config.openai_api_key())
    others = {name: Server(other) for name, other in map(_named_url, against or [])}
    samples = load_samples(options, _tokenizer(tokenizer))
    target = load.Target(server, server.choose_model(model), endpoint, extra)
    peers = {name: load.Target(other, other.choose_model(None), endpoint, extra) for name, other in others.items()}
    for each in (target, *peers.values()):
        _try(each)
        if num_warmups:
            _run(each, samples[:1] * num_warmups, [0.0] * num_warmups, max_concurrency, timeout, hide=True)

    results = []
    for rate, times in zip(rates, arrivals, strict=True):
        outcomes, seconds = _run(target, samples, times, max_concurrency, timeout, hide=disable_tqdm)
        outcomes_of_all = list(outcomes)
        result: dict[str, Any] = {
            "date": datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S"),
            "backend": "openai-chat" if endpoint.endswith("chat/completions") else "openai",
            "model_id": target.model,
            "tokenizer_id": tokenizer,
            "num_prompts": num_prompts,
            "request_rate": "inf" if rate == float("inf") else rate,
            "burstiness": burstiness,
            "max_concurrency": max_concurrency,
            **summary.summarize(outcomes, seconds, metrics=metrics, percentiles=percentiles, goodput=limits),
        }
        typer.echo("\n".join(summary.lines(result, metrics, percentiles)))
        for name, peer in peers.items():
            theirs, taken = _run(peer, samples, times, max_concurrency, timeout, hide=disable_tqdm)
            found = summary.summarize(theirs, taken, metrics=metrics, percentiles=percentiles, goodput=limits)
            ratio = (
                found["mean_e2el_ms"] / result["mean_e2el_ms"] if result["completed"] and found["completed"] else None
            )
            result.setdefault("against", {})[name] = {"model_id": peer.model, **found, "ratio": ratio}
            typer.echo("\n".join([f"{name}:", *summary.lines(found, metrics, percentiles)]))
            if ratio is not None:
                typer.echo(f"Its answers take {ratio:.2f} times as long.")
            outcomes_of_all += theirs
        if save_result or save_detailed:
            path = result_dir / _file_name(result_filename, result, several=len(rates) > 1)
            path.write_text(json.dumps(result | (_details(outcomes) if save_detailed else {}), indent=2) + "\n")
        results.append(result | {k: v for k, v in _details(outcomes).items() if k in ("ttfts", "e2els")})
        for error in sorted({o.error for o in outcomes_of_all if o.error is not None})[:5]:
            print(f"fastattn: {error}", file=sys.stderr)
    if plot is not None:
        write(load_section(target.model, results), plot)
    if any(found["failed"] for result in results for found in (result, *result.get("against", {}).values())):
        raise typer.Exit(1)


def _run(
    target: Target,
    samples: Sequence[Sample],
    times: Sequence[float],
    max_concurrency: int | None,
    timeout: float,
    *,
    hide: bool,
) -> tuple[list[Outcome], float]:
    from fastattn.benchmarks import load

    with tqdm(total=len(samples), desc="Requests", unit="req", disable=True if hide else None) as bar:

        def advance(_: Outcome) -> None:
            bar.update()

        return asyncio.run(
            load.run_load(
                target, samples, times, max_concurrency=max_concurrency, timeout_seconds=timeout, on_done=advance
            )
        )


def _try(target: Target) -> None:
    """One small request first: a wrong name or key is one line, not a thousand failures."""
    from fastattn.benchmarks import load
    from fastattn.benchmarks.datasets import Sample
    from fastattn.openai_http import ServerError

    (outcome,), _ = asyncio.run(load.run_load(target, [Sample("Hello, how are you?", 5, 8)], [0.0]))
    if outcome.error is not None:
        raise ServerError(outcome.error)


def _tokenizer(model: str | None) -> Any:
    if model is None:
        return None
    from fastattn.models import loader

    return loader.open_model(model).tokenizer()


def _metrics(text: str) -> list[str]:
    from fastattn.benchmarks.summary import METRICS

    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in METRICS:
            raise ValueError(f"--percentile-metrics has {name!r}, allowed are {', '.join(METRICS)}")
    return names


def _in(text: str, flag: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise ValueError(f"--{flag} has {text!r}, allowed is a number from {low:g} to {high:g}")
    return value


def _limit(text: str) -> tuple[str, float]:
    from fastattn.benchmarks.summary import METRICS

    name, _, value = text.partition(":")
    if name not in METRICS:
        raise ValueError(f"--goodput has {text!r}, expected METRIC:MS with one of {', '.join(METRICS)}")
    return name, _in(value, "goodput", 0, float("inf"))


def _named_url(text: str) -> tuple[str, str]:
    name, found, url = text.partition("=")
    if not (found and name and url):
        raise ValueError(
            f"--against is {text!r}, expected NAME=URL of a server that runs, such as vllm=http://127.0.0.1:8001"
        )
    return name, url


def _extra(text: str | None, temperature: float, ignore_eos: bool) -> dict[str, Any]:
    """Fields of every request beside the prompt."""
    extra: dict[str, Any] = {"temperature": temperature}
    if ignore_eos:
        extra["ignore_eos"] = True
    if text is not None:
        try:
            more = json.loads(text)
        except ValueError:
            more = None
        if not isinstance(more, dict):
            raise ValueError(f"--extra-body is {text!r}, expected a JSON object")
        extra |= more
    return extra


def _details(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Per request, in the order they were sent; vLLM's keys. Times of those that failed are 0."""
    return {
        "input_lens": [o.prompt_len for o in outcomes],
        "output_lens": [o.num_output_tokens for o in outcomes],
        "start_times": [o.start for o in outcomes],
        "ttfts": [o.ttft for o in outcomes],
        "e2els": [o.latency for o in outcomes],
        "itls": [o.itls for o in outcomes],
        "generated_texts": [o.text for o in outcomes],
        "errors": [o.error or "" for o in outcomes],
    }


def _file_name(wish: str | None, result: dict[str, Any], *, several: bool) -> str:
    rate = f"{result['request_rate']}qps"
    if wish is None:
        return f"{result['backend']}-{rate}-{Path(result['model_id']).name}-{result['date']}.json"
    path = Path(wish)
    return f"{path.stem}-{rate}{path.suffix}" if several else wish
