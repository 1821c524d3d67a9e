"""Drives a server as its users would: requests arrive by the clock, whether earlier ones were answered or not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastattn import openai_http
from fastattn.benchmarks.datasets import Sample
from fastattn.openai_http import Server, ServerError


@dataclass
class Outcome:
    """What became of one request. Times in seconds: start since the load's start, ttft to the first text, itls between
    pieces of text, latency to the last chunk. cache: the server's x-fastattn-cache header."""

    prompt_len: int
    start: float = 0.0
    ttft: float = 0.0
    latency: float = 0.0
    itls: list[float] = field(default_factory=list)
    num_output_tokens: int = 0
    text: str = ""
    cache: str = ""
    error: str | None = None


@dataclass(frozen=True)
class Target:
    """Where requests go. endpoint: a path; one that ends in chat/completions gets messages, any other a prompt.
    extra: further fields of every request's body."""

    server: Server
    model: str
    endpoint: str = "/v1/completions"
    extra: Mapping[str, Any] = field(default_factory=dict)

    def body(self, sample: Sample) -> dict[str, Any]:
        chat = self.endpoint.endswith("chat/completions")
        question = (
            {"messages": [{"role": "user", "content": sample.prompt}], "max_completion_tokens": sample.output_len}
            if chat
            else {"prompt": sample.prompt, "max_tokens": sample.output_len}
        )
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        return {"model": self.model, **question, **stream, **self.extra}


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start at which each request is sent; all 0 at rate infinity.

    Gaps are gamma-distributed with this mean rate; burstiness 1 is a Poisson process, below is burstier, above is more even.
    They are scaled so that the last arrival is where the rate says, as in vLLM: a run's rate is then not a matter of luck.
    """
    if not rate > 0:
        raise ValueError(f"request-rate is {rate}, allowed is above 0, or inf")
    if not 0 < burstiness < float("inf"):
        raise ValueError(f"burstiness is {burstiness}, allowed is a number above 0")
    if rate == float("inf"):
        return [0.0] * count
    gaps = np.random.default_rng(seed).gamma(shape=burstiness, scale=1 / (rate * burstiness), size=count)
    times = np.cumsum(gaps)
    return [float(t) for t in times * (count / rate / times[-1])] if times[-1] > 0 else [0.0] * count


async def run_load(
    target: Target,
    samples: Sequence[Sample],
    arrivals: Sequence[float],
    *,
    max_concurrency: int | None = None,
    timeout_seconds: float = 600.0,
    on_done: Callable[[Outcome], None] = lambda _: None,
) -> tuple[list[Outcome], float]:
    """Sends each sample at its time; → their outcomes in the same order, and the seconds until the last one ended.

    max_concurrency: more are not in flight at once; those that wait for it are not yet counted as sent. timeout_seconds: the
    longest silence of a server.
    """
    http = openai_http.httpx()
    turn = asyncio.Semaphore(max_concurrency or len(samples) or 1)
    limits = http.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = http.Timeout(timeout_seconds, connect=30, pool=None)
    async with http.AsyncClient(limits=limits, timeout=timeout, trust_env=False) as client:
        begin = time.perf_counter()

        async def one(sample: Sample, at: float) -> Outcome:
            await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
            async with turn:
                outcome = await send(client, target, sample, begin)
            on_done(outcome)
            return outcome

        outcomes = await asyncio.gather(*(one(s, at) for s, at in zip(samples, arrivals, strict=True)))
        return list(outcomes), time.perf_counter() - begin


async def send(client: Any, target: Target, sample: Sample, begin: float) -> Outcome:
    """One request, followed to its end. What goes wrong with it is in its outcome."""
    http = openai_http.httpx()
    outcome = Outcome(sample.prompt_len)
    url, headers = target.server.url(target.endpoint), target.server.headers
    start = last = time.perf_counter()
    outcome.start = start - begin
    num_pieces, finished = 0, False
    try:
        async with client.stream("POST", url, json=target.body(sample), headers=headers) as answer:
            if answer.status_code != 200:
                raise ServerError(openai_http.error_message(answer.status_code, await answer.aread()))
            outcome.cache = answer.headers.get("x-fastattn-cache", "")
            async for line in answer.aiter_lines():
                data = openai_http.event_data(line)
                if data is None:
                    continue
                if data == openai_http.DONE:
                    finished = True
                    break
                chunk, now = openai_http.parse_chunk(data), time.perf_counter()
                if text := openai_http.text_of(chunk):
                    if num_pieces:
                        outcome.itls.append(now - last)
                    else:
                        outcome.ttft = now - start
                    num_pieces, last = num_pieces + 1, now
                    outcome.text += text
                if chunk.get("choices"):
                    outcome.latency = now - start
                if usage := chunk.get("usage"):
                    outcome.num_output_tokens = int(usage.get("completion_tokens") or 0)
                    outcome.prompt_len = int(usage.get("prompt_tokens") or outcome.prompt_len)
        if not finished:
            raise ServerError("the stream broke off before its end")
        if not num_pieces:
            raise ServerError("the answer has no text")
    except ServerError as error:
        outcome.error = str(error)
    except http.HTTPError as error:
        outcome.error = openai_http.connection_message(target.server, error)
    # A server that does not count is counted by its pieces, which is a token each at most servers.
    outcome.num_output_tokens = outcome.num_output_tokens or num_pieces
    return outcome
