"""`fastattn distill`: a student learns to predict as its teacher does."""

from __future__ import annotations

from typing import Annotated

import typer

from fastattn.cli import _compress_options as copt
from fastattn.cli import _options as opt


def distill(
    student: Annotated[
        str, typer.Argument(metavar="STUDENT", help="The model that learns: a name, a folder, a .gguf file.")
    ],
    out: copt.Out,
    teacher: Annotated[str, typer.Option("--teacher", metavar="MODEL", help="The model that it learns from.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", metavar="FILE", help="Text in UTF-8; may be repeated. Not given: Python's own help texts."
        ),
    ] = None,
    generate: Annotated[
        int,
        typer.Option("--generate", metavar="N", help="Learn from N texts that the teacher writes, begun as that text."),
    ] = 0,
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="Steps of the optimizer.")] = 200,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", help="Windows of text in a step.")] = 4,
    micro_batch: Annotated[int, typer.Option("--micro-batch", metavar="N", help="Windows computed at a time.")] = 2,
    length: Annotated[int, typer.Option("--length", metavar="N", help="Tokens in a window.")] = 256,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "--lr", metavar="RATE", parser=float, help="Its peak.")
    ] = 2e-4,
    weight_decay: Annotated[
        float, typer.Option("--weight-decay", metavar="SHARE", parser=float, help="AdamW's.")
    ] = 0.0,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", parser=float, help="Softens both distributions.")
    ] = 1.0,
    max_minutes: Annotated[
        float | None,
        typer.Option("--max-minutes", metavar="MINUTES", parser=float, help="End by then; the rate falls in time."),
    ] = None,
    train_embeddings: Annotated[
        bool, typer.Option("--train-embeddings", help="Embeddings and head learn too.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Order of the text, and of what is generated.")] = 0,
    dtype: copt.OutDtype = "auto",
    device: opt.Device = "auto",
    force: copt.Force = False,
    evaluate: copt.Evaluate = False,
    quiet: opt.Quiet = False,
) -> None:
    """Train a smaller model to predict as its teacher does.

    Zeros that `fastattn prune` made stay zeros. Needs transformers (pip install 'fastattn[compress]'). Interrupted, the same command goes on from its last checkpoint.
    """
    from fastattn.cli._compress_report import finish
    from fastattn.compress import DistillOptions
    from fastattn.compress import distill as run

    options = DistillOptions(
        files=tuple(text or ()),
        generate=generate,
        steps=steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        length=length,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        temperature=temperature,
        max_minutes=max_minutes,
        train_embeddings=train_embeddings,
        seed=seed,
        dtype=dtype,
        device=device,
    )
    path = run(student, out, teacher, options, force=force, show_progress=not quiet)
    finish(path, teacher, evaluate, device, quiet)
