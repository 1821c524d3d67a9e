"""Options that quantize, prune, distill and eval share."""

from __future__ import annotations

from typing import Annotated

import typer

from fastattn.cli import _options as opt

Out = Annotated[str, typer.Argument(metavar="OUT", help="The folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT, once the new folder is whole.")]
OutDtype = Annotated[
    opt.DType, typer.Option("--dtype", help="Of the weights that stay plain; auto is the source's, bfloat16 for GGUF.")
]
CALIBRATION = "Calibration"
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="Text in UTF-8; may be repeated. Not given: Python's own help texts.",
        rich_help_panel=CALIBRATION,
    ),
]
Samples = Annotated[
    int, typer.Option("--samples", metavar="N", help="Windows of calibration text.", rich_help_panel=CALIBRATION)
]
Length = Annotated[int, typer.Option("--length", metavar="N", help="Tokens in a window.")]
Damp = Annotated[
    float, typer.Option("--damp", metavar="SHARE", parser=float, help="Added to the Hessian's diagonal, of its mean.")
]
Evaluate = Annotated[
    bool, typer.Option("--evaluate", help="Compare with the source on held-out text afterwards; goes into the receipt.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
