"""`fastattn bench kernels`: every operator on this device, beside what the device reaches."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastattn.cli import _bench_options as bopt
from fastattn.cli import _options as opt

if TYPE_CHECKING:
    from fastattn.benchmarks.kernels import Row


def _size(flag: str, help: str) -> object:
    return typer.Option(flag, metavar="N", min=1, help=help)


def kernels(
    operators: Annotated[
        list[str] | None, typer.Argument(metavar="OPERATOR", help="Such as rms_norm linear; all, if none is named.")
    ] = None,
    num_tokens: Annotated[list[int] | None, _size("--num-tokens", "Rows of a step; may be repeated.")] = None,
    hidden_size: Annotated[int, _size("--hidden-size", "Width of the model.")] = 4096,
    intermediate_size: Annotated[int, _size("--intermediate-size", "Width of its MLP.")] = 14336,
    num_heads: Annotated[int, _size("--num-heads", "Query heads.")] = 32,
    num_kv_heads: Annotated[int, _size("--num-kv-heads", "Key and value heads.")] = 8,
    head_dim: Annotated[int, _size("--head-dim", "Width of a head.")] = 128,
    vocab_size: Annotated[int, _size("--vocab-size", "Tokens in the vocabulary.")] = 128256,
    context_len: Annotated[int, _size("--context-len", "Keys of each sequence that decodes.")] = 2048,
    block_size: opt.BlockSize = 16,
    device: opt.Device = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option("--dtype", help="auto is bfloat16 on a GPU, float32 on a CPU."),
    ] = "auto",
    min_seconds: Annotated[float, opt._number("--min-seconds", "SECONDS", "Time to spend on each case.")] = 0.2,
    output_json: bopt.OutputJson = None,
) -> None:
    """Time each operator beside the rates of this device.

    Sizes are those of an 8B-class model; rates are those of torch's copy and matrix product.
    """
    if not min_seconds >= 0:
        raise ValueError(f"--min-seconds is {min_seconds:g}, allowed is a number from 0")
    import torch

    from fastattn.benchmarks import kernels as bench
    from fastattn.benchmarks.kernel_cases import cases
    from fastattn.engine.device import choose_device, choose_dtype

    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    chosen = []
    for rows in num_tokens or ([1, 128, 2048] if where.type == "cuda" else [1, 32]):
        shapes = bench.Shapes(
            rows, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, vocab_size, context_len, block_size
        )
        chosen += bench.choose(list(cases(shapes, where, kind)), operators or [])
    timer = bench.Timer(where, min_seconds)
    limits = bench.ceilings(timer, where, kind)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    typer.echo(
        f"{name}, {str(kind).removeprefix('torch.')}: copy {limits['memory']:.3g} TB/s, matrix {limits['matrix']:.3g} TFLOP/s"
    )
    width = 2 + max(len("operator"), *(len(case.operator) for case in chosen))
    typer.echo(f"{'operator':{width}}{'shape':38}{'µs':>12}{'':>4}{'rate':>12}  {'share':>6} of")
    rows_out = []
    for case in chosen:
        row = bench.measure(case, timer, limits)
        rows_out.append(row)
        typer.echo(line(row, width))
    if output_json is not None:
        _write(output_json, name, str(kind), timer.method, limits, rows_out)


def line(row: Row, width: int) -> str:
    unit = "TFLOP/s" if row.bound == "matrix" else "TB/s"
    return f"{row.operator:{width}}{row.shape:38}{row.us:12.1f}{'':4}{row.rate:>8.3g} {unit:7} {row.share:6.0%} {row.bound}"


def _write(path: Path, device: str, dtype: str, method: str, limits: dict[str, float], rows: list[Row]) -> None:
    result = {"device": device, "dtype": dtype, "method": method, "ceilings": limits, "rows": [asdict(r) for r in rows]}
    path.write_text(json.dumps(result, indent=2) + "\n")
