"""What the commands that write a model say at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fastattn.cli._summary import bytes_text

if TYPE_CHECKING:
    from fastattn.compress import Evaluation


def finish(out: Path, source: str, evaluate: bool, device: str, quiet: bool) -> None:
    """Evaluates if that was asked for, and sums up on stderr."""
    from fastattn.compress import EvalOptions, read_receipt
    from fastattn.compress import evaluate as run_evaluation
    from fastattn.compress.receipt import amend_receipt

    result = None
    if evaluate:
        result = run_evaluation(str(out), source, EvalOptions(device=device), show_progress=not quiet)
        amend_receipt(out, {"evaluation": result.as_dict()})
    receipt = read_receipt(out)
    assert receipt is not None
    if not quiet:
        size = receipt["bytes"]
        print(f"{out}: {bytes_text(size['after'])}, from {bytes_text(size['before'])}", file=sys.stderr)
        if result is not None:
            for line in evaluation_lines([result]):
                print(line, file=sys.stderr)


def evaluation_lines(results: Sequence[Evaluation]) -> list[str]:
    lines = []
    for r in results:
        lines.append(f"text         {r.text}, {r.num_tokens:,} tokens")
        against = "" if r.against is None else f" (against {r.against}: {r.against_perplexity:.3f})"
        lines.append(f"perplexity   {r.perplexity:.3f}{against}")
        if r.kl_mean is not None and r.top1 is not None:
            lines.append(f"KL           {r.kl_mean:.5f} nats mean, {r.kl_max:.3f} max")
            lines.append(f"top-1        {100 * r.top1:.2f} % the same likeliest token")
    return lines


def print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=2))
