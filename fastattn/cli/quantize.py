"""`fastattn quantize`: a model in fewer bits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fastattn.cli import _compress_options as copt
from fastattn.cli import _options as opt

Scheme = Literal["int8", "fp8", "int4", "nvfp4", "mxfp4", "nvfp4-w4a8", "mxfp4-w4a8", "none"]


def quantize(
    model: opt.Model,
    out: copt.Out,
    scheme: Annotated[
        Scheme,
        typer.Option(
            "--scheme",
            help="int8, fp8: W8A8. int4, nvfp4, mxfp4: weights only. nvfp4-w4a8, mxfp4-w4a8: FP8 activations. none: a plain export.",
        ),
    ] = "int8",
    rounding: Annotated[
        Literal["auto", "gptq", "nearest"], typer.Option("--rounding", help="auto: nearest for 8 bits, gptq for 4.")
    ] = "auto",
    steps: Annotated[
        Literal["auto", "amax", "mse"], typer.Option("--steps", help="How scales are chosen. auto: mse with gptq.")
    ] = "auto",
    smooth: Annotated[
        float, typer.Option("--smooth", metavar="ALPHA", parser=float, help="SmoothQuant's alpha, int8 only; 0 is off.")
    ] = 0.5,
    group_size: Annotated[
        int | None,
        typer.Option("--group-size", metavar="N", help="int4's: 128, 64 or 32. Not given: the largest that fits."),
    ] = None,
    damp: copt.Damp = 0.01,
    reorder: Annotated[
        bool, typer.Option("--reorder/--no-reorder", help="gptq: begin with the columns of the largest inputs.")
    ] = True,
    calibration: copt.Calibration = None,
    samples: copt.Samples = 64,
    length: copt.Length = 512,
    dtype: copt.OutDtype = "auto",
    device: opt.Device = "auto",
    force: copt.Force = False,
    evaluate: copt.Evaluate = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write a model in INT8, FP8, INT4 or FP4, with a receipt.

    The folder has compressed-tensors' layout. Interrupted, the same command goes on where it was.
    """
    from fastattn.cli._compress_report import finish
    from fastattn.compress import CalibrationOptions, QuantizeOptions
    from fastattn.compress import quantize as run

    options = QuantizeOptions(
        scheme=scheme,
        rounding=rounding,
        steps=steps,
        smooth=smooth,
        group_size=group_size,
        damp=damp,
        reorder=reorder,
        dtype=dtype,
        device=device,
        calibration=CalibrationOptions(tuple(calibration or ()), samples, length),
    )
    path = run(model, out, options, force=force, show_progress=not quiet)
    if scheme == "int4" and group_size is None and not quiet:
        _say_group_size(path)
    finish(path, model, evaluate, device, quiet)


def _say_group_size(path: Path) -> None:
    from fastattn.compress import read_receipt

    size = (read_receipt(path) or {})["method"]["group_size"]
    if size != 128:
        print(f"fastattn: groups of {size}, since not all matrices have a multiple of 128 columns", file=sys.stderr)
