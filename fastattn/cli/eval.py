"""`fastattn eval`: how well a model predicts text, and how far it is from another."""

from __future__ import annotations

from typing import Annotated

import typer

from fastattn.cli import _compress_options as copt
from fastattn.cli import _options as opt


def eval_(
    model: opt.Model,
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL", help="The model to compare with, such as the original.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", metavar="FILE", help="Text in UTF-8; may be repeated. Not given: Python's own help texts."
        ),
    ] = None,
    length: copt.Length = 512,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", parser=opt.parse_size, metavar="N", help="So many tokens of the text at most."),
    ] = 16384,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    kv_cache_dtype: opt.KvCacheDtype = "auto",
    kv_cache_scales: opt.KvCacheScales = "auto",
    quantization: opt.Quantization = None,
    as_json: copt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure perplexity, and how far a model is from another.

    With --against: the KL divergence, and how often both think the same token likeliest.
    """
    from fastattn.cli._compress_report import evaluation_lines, print_json
    from fastattn.compress import EvalOptions, evaluate

    options = EvalOptions(
        tuple(text or ()), length, max_tokens, device, dtype, kv_cache_dtype, kv_cache_scales, quantization
    )
    result = evaluate(model, against, options, show_progress=not quiet)
    if as_json:
        print_json(result.as_dict())
    else:
        for line in evaluation_lines([result]):
            typer.echo(line)
