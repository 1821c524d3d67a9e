"""Options that several commands share, under vLLM's names."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from fastattn import sizes


def parse_size(text: str | int) -> int:
    """A count as vLLM writes it: "32K", "1.5m"."""
    try:
        return sizes.parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _parse_number(text: str | float) -> float:
    """A number; which ones are allowed is SamplingParams' and EngineOptions' to say."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number") from None


def _number(flag: str, metavar: str, help: str) -> object:
    return typer.Option(flag, parser=_parse_number, metavar=metavar, help=help)


def _size(flag: str, help: str, *aliases: str) -> object:
    return typer.Option(flag, *aliases, parser=parse_size, metavar="N", help=help, show_default=False)


Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="smollm2, gemma3-270m, a folder in Hugging Face's layout, or a .gguf file."),
]

# ---- engine ----

DType = Literal["auto", "float32", "bfloat16", "float16"]

Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[DType, typer.Option("--dtype", help="auto is bfloat16 on a GPU, float32 on a CPU.")]
TensorParallelSize = Annotated[
    int,
    typer.Option(
        "--tensor-parallel-size", "-tp", metavar="N", help="Share the model among N processes, with a GPU each on cuda."
    ),
]
MaxModelLen = Annotated[int | None, _size("--max-model-len", "Longest prompt and answer together, in tokens.", "-c")]
MaxNumSeqs = Annotated[int | None, _size("--max-num-seqs", "Most sequences in one step.")]
MaxNumBatchedTokens = Annotated[int | None, _size("--max-num-batched-tokens", "Most tokens in one step.")]
BlockSize = Annotated[int, typer.Option("--block-size", metavar="N", help="Tokens in a KV-cache block.")]
NumKvBlocks = Annotated[int | None, _size("--num-kv-blocks", "KV-cache blocks; as many as fit, if not given.")]
GpuMemoryUtilization = Annotated[
    float, _number("--gpu-memory-utilization", "SHARE", "Share of the GPU's memory to use at most.")
]
EnablePrefixCaching = Annotated[
    bool,
    typer.Option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        help="Keep what was computed, for prompts that begin alike.",
    ),
]


def _parse_speculative(text: str) -> object:
    from fastattn.speculative.config import SpeculativeConfig

    try:
        return SpeculativeConfig.from_json(text)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None


Speculative = Annotated[
    object | None,
    typer.Option(
        "--speculative-config",
        parser=_parse_speculative,
        metavar="JSON",
        help='Guess tokens and verify them: {"method": "ngram"}, or {"model": "…"} for a draft model.',
        show_default=False,
    ),
]

# ---- sampling ----

MaxTokens = Annotated[int | None, _size("--max-tokens", "Longest answer, in tokens.")]
Temperature = Annotated[float, _number("--temperature", "T", "0 takes the likeliest token each time.")]
TopP = Annotated[float, _number("--top-p", "P", "Draw among the likeliest tokens of this total; 1 is off.")]
TopK = Annotated[int, typer.Option("--top-k", metavar="K", help="Draw among so many likeliest tokens; 0 is off.")]
MinP = Annotated[
    float,
    _number("--min-p", "P", "Leave out tokens below this share of the likeliest one's; 0 is off."),
]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Same seed, same text. Not given: a new one each time.")
]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; may be repeated.")
]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message, for chat models.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only the text: no progress, no summary.")]
