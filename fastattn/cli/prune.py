"""`fastattn prune`: a model with fewer weights."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from fastattn.cli import _compress_options as copt
from fastattn.cli import _options as opt


def prune(
    model: opt.Model,
    out: copt.Out,
    method: Annotated[
        Literal["magnitude", "wanda", "sparsegpt", "layers"],
        typer.Option(
            "--method",
            help="wanda, sparsegpt, magnitude: two of each four weights become zero. layers: whole layers go.",
        ),
    ] = "wanda",
    drop: Annotated[
        int, typer.Option("--drop", metavar="N", help="layers: how many go, the least important first.")
    ] = 0,
    keep_first: Annotated[int, typer.Option("--keep-first", metavar="N", help="layers: the first N stay.")] = 1,
    keep_last: Annotated[int, typer.Option("--keep-last", metavar="N", help="layers: the last N stay.")] = 1,
    damp: copt.Damp = 0.01,
    calibration: copt.Calibration = None,
    samples: copt.Samples = 64,
    length: copt.Length = 512,
    dtype: copt.OutDtype = "auto",
    device: opt.Device = "auto",
    force: copt.Force = False,
    evaluate: copt.Evaluate = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write a model with fewer weights, or with fewer layers.

    Two of each four weights become zero, or whole layers go; `fastattn distill` heals it. Interrupted, the same command goes on where it was.
    """
    from fastattn.cli._compress_report import finish
    from fastattn.compress import CalibrationOptions, PruneOptions
    from fastattn.compress import prune as run

    options = PruneOptions(
        method=method,
        drop=drop,
        keep_first=keep_first,
        keep_last=keep_last,
        damp=damp,
        dtype=dtype,
        device=device,
        calibration=CalibrationOptions(tuple(calibration or ()), samples, length),
    )
    path = run(model, out, options, force=force, show_progress=not quiet)
    finish(path, model, evaluate, device, quiet)
