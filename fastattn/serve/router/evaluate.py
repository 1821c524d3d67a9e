"""What a cascade costs and what it is worth: both models answer every prompt once, every threshold follows from that."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fastattn.serve.contract import APIError, Chunk, RequestContext
from fastattn.serve.fold import Fold
from fastattn.serve.protocol import ChatCompletionRequest
from fastattn.serve.router.confidence import Confidence, with_logprobs
from fastattn.serve.router.config import CascadeConfig, DeploymentConfig
from fastattn.serve.router.deployment import cost
from fastattn.serve.router.router import Router


@dataclass(frozen=True)
class Prompt:
    messages: list[dict[str, Any]]
    reference: str | None


@dataclass(frozen=True)
class Judged:
    """One prompt. qualities from 0 to 1; costs in the operator's currency, or in answers where no price is set."""

    confidence: float | None
    first_quality: float
    then_quality: float
    first_cost: float
    then_cost: float


@dataclass(frozen=True)
class Point:
    """What a threshold gives. escalated: share of prompts. random: quality if as many were escalated by lot."""

    threshold: float
    escalated: float
    cost: float
    quality: float
    random: float


@dataclass(frozen=True)
class Evaluation:
    cascade: str
    judge: Literal["reference", "agreement"]
    currency: Literal["price", "answers"]
    prompts: list[Judged]
    points: list[Point]


def read_prompts(path: Path) -> list[Prompt]:
    """A JSON object a line: `prompt` or `messages`, and `reference` if the right answer is known. Raises ValueError."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: it is not JSON: {error}") from None
        where = f"{path}:{number}"
        if not isinstance(row, dict) or not set(row) <= {"prompt", "messages", "reference"}:
            raise ValueError(f"{where}: expected an object with prompt or messages, and reference")
        if ("prompt" in row) == ("messages" in row):
            raise ValueError(f"{where}: expected either prompt or messages")
        if not isinstance(row.get("reference", ""), str) or not isinstance(row.get("prompt", ""), str):
            raise ValueError(f"{where}: prompt and reference are texts")
        messages = row.get("messages") or [{"role": "user", "content": row.get("prompt")}]
        found.append(Prompt(messages, row.get("reference")))
    if not found:
        raise ValueError(f"{path}: there is no prompt in it")
    if 0 < sum(prompt.reference is not None for prompt in found) < len(found):
        raise ValueError(f"{path}: some prompts have a reference and some have none")
    return found


async def evaluate(
    router: Router, name: str, prompts: Sequence[Prompt], *, max_tokens: int = 128, concurrency: int = 8
) -> Evaluation:
    """Asks both models of a cascade, greedily. Without references the capable model's answer counts as right, and a small
    one's quality is how far it agrees. Raises APIError if a model cannot be had."""
    cascade = router.config.cascades[name]
    has_references = prompts[0].reference is not None
    first, then = (_prices(router, model) for model in (cascade.first, cascade.then))
    priced = bool(first.input_cost or first.output_cost or then.input_cost or then.output_cost)
    slots = asyncio.Semaphore(concurrency)

    async def judge(number: int, prompt: Prompt) -> Judged:
        async with slots:
            body = {"model": name, "messages": prompt.messages, "temperature": 0.0, "max_tokens": max_tokens}
            request = ChatCompletionRequest.model_validate(body)
            text, usage, confidence = await _ask(router, cascade.first, request, cascade, f"evaluate-{number}-first")
            best, best_usage, _ = await _ask(router, cascade.then, request, cascade, f"evaluate-{number}-then")
        reference = prompt.reference if prompt.reference is not None else best
        costs = (cost(first, usage), cost(then, best_usage)) if priced else (0.0, 1.0)
        return Judged(confidence, agreement(text, reference), agreement(best, reference), *costs)

    judged = list(await asyncio.gather(*(judge(number, prompt) for number, prompt in enumerate(prompts))))
    return Evaluation(
        name,
        "reference" if has_references else "agreement",
        "price" if priced else "answers",
        judged,
        curve(judged),
    )


def curve(judged: Sequence[Judged]) -> list[Point]:
    """From never to always escalating: one point for each confidence that was seen."""
    seen = sorted({j.confidence for j in judged if j.confidence is not None})
    first, then = (
        sum(values) / len(judged) for values in zip(*((j.first_quality, j.then_quality) for j in judged), strict=True)
    )
    points = []
    for threshold in [*seen, 0.0]:
        up = [j.confidence is None or j.confidence < threshold for j in judged]
        if threshold == 0.0:  # nothing is surer than that, so everything goes up
            up = [True] * len(judged)
        share = sum(up) / len(judged)
        quality = sum(j.then_quality if u else j.first_quality for j, u in zip(judged, up, strict=True)) / len(judged)
        total = sum(j.first_cost + j.then_cost * u for j, u in zip(judged, up, strict=True)) / len(judged)
        points.append(Point(threshold, share, total, quality, first + share * (then - first)))
    return points


def agreement(answer: str, reference: str) -> float:
    """F1 of the words that two texts share, as in SQuAD: 1 for the same words, 0 for none."""
    a, b = (re.findall(r"\w+", text.lower()) for text in (answer, reference))
    if not a or not b:
        return float(a == b)
    shared = sum((Counter(a) & Counter(b)).values())
    return 2 * shared / (len(a) + len(b))


def table(evaluation: Evaluation, rows: int = 11) -> list[tuple[str, ...]]:
    """A header and about so many points, evenly spread over the share that is escalated."""
    points = evaluation.points
    chosen = {round(i * (len(points) - 1) / max(1, rows - 1)) for i in range(rows)}
    unit = "cost a prompt" if evaluation.currency == "price" else "capable answers a prompt"
    lines: list[tuple[str, ...]] = [("threshold", "escalated", unit, "quality", "quality by lot")]
    for index in sorted(chosen):
        p = points[index]
        lines.append(
            (f"{p.threshold:.3f}", f"{p.escalated:.0%}", f"{p.cost:.3g}", f"{p.quality:.3f}", f"{p.random:.3f}")
        )
    return lines


def save(evaluation: Evaluation, folder: Path) -> tuple[Path, Path]:
    """Writes evaluation.json and evaluation.png. Raises ImportError that names the extra without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("the plot needs matplotlib: pip install 'fastattn[bench]'") from None
    folder.mkdir(parents=True, exist_ok=True)
    numbers, picture = folder / "evaluation.json", folder / "evaluation.png"
    numbers.write_text(json.dumps(asdict(evaluation), indent=1) + "\n")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    costs = [point.cost for point in evaluation.points]
    axes.plot(costs, [point.quality for point in evaluation.points], marker="o", markersize=3, label="by confidence")
    axes.plot(costs, [point.random for point in evaluation.points], linestyle="--", label="by lot")
    axes.set_xlabel("cost a prompt" if evaluation.currency == "price" else "answers of the capable model, a prompt")
    axes.set_ylabel("quality" if evaluation.judge == "reference" else "agreement with the capable model")
    axes.set_title(f"cascade {evaluation.cascade}, {len(evaluation.prompts)} prompts")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
    return numbers, picture


async def _ask(
    router: Router, model: str, request: ChatCompletionRequest, cascade: CascadeConfig, request_id: str
) -> tuple[str, dict[str, Any], float | None]:
    """(text, usage, confidence)"""
    meter, fold = Confidence(cascade.confidence), Fold()
    context = RequestContext(request_id)
    asked = with_logprobs(request) if model == cascade.first else request
    async with aclosing(router.answer(model, asked, context, "evaluate")) as chunks:  # type: ignore[type-var]
        async for chunk in chunks:
            _add(fold, meter, chunk)
    if context.headers["x-fastattn-model"] != model:
        raise APIError(503, f"model {model!r} did not answer itself", "server_error")
    answer = fold.result()
    return answer["choices"][0]["message"]["content"] or "", answer.get("usage") or {}, meter.value


def _add(fold: Fold, meter: Confidence, chunk: Chunk) -> None:
    fold.add(chunk)
    meter.add(chunk)


def _prices(router: Router, model: str) -> DeploymentConfig:
    return next(entry for entry in router.config.model_list if entry.model_name == model)
