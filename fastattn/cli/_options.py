"""Options that several commands share, under vLLM's names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, Literal

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


def _number(flag: str, metavar: str, help: str, panel: str | None = None) -> object:
    return typer.Option(flag, parser=_parse_number, metavar=metavar, help=help, rich_help_panel=panel)


def _size(flag: str, help: str, *aliases: str, panel: str | None = None) -> object:
    return typer.Option(flag, *aliases, parser=parse_size, metavar="N", help=help, rich_help_panel=panel)


Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="smollm2, gemma3-270m, a folder in Hugging Face's layout, or a .gguf file."),
]

# ---- engine ----

ENGINE = "Engine"

DType = Literal["auto", "float32", "bfloat16", "float16"]

Device = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.", rich_help_panel=ENGINE)
]
Dtype = Annotated[
    DType, typer.Option("--dtype", help="auto is bfloat16 on a GPU, float32 on a CPU.", rich_help_panel=ENGINE)
]
TensorParallelSize = Annotated[
    int,
    typer.Option(
        "--tensor-parallel-size",
        "-tp",
        metavar="N",
        help="Share the model among N processes, with a GPU each on cuda.",
        rich_help_panel=ENGINE,
    ),
]
EnforceEager = Annotated[bool, typer.Option("--enforce-eager", help="No CUDA graphs.", rich_help_panel=ENGINE)]
AsyncScheduling = Annotated[
    bool | None,
    typer.Option(
        "--async-scheduling/--no-async-scheduling",
        help="Queue a step while the one before it runs. Not given: on GPUs, but for several or with speculation.",
        rich_help_panel=ENGINE,
    ),
]
MaxModelLen = Annotated[
    int | None,
    _size(
        "--max-model-len",
        "Longest prompt and answer together, in tokens. Not given: the model's, up to 8192.",
        "-c",
        panel=ENGINE,
    ),
]
MaxNumSeqs = Annotated[
    int | None,
    _size("--max-num-seqs", "Most sequences in one step. Not given: 256 on a GPU, 32 on a CPU.", panel=ENGINE),
]
MaxNumBatchedTokens = Annotated[
    int | None,
    _size("--max-num-batched-tokens", "Most tokens in one step. Not given: 8192 on a GPU, 512 on a CPU.", panel=ENGINE),
]
BlockSize = Annotated[
    int, typer.Option("--block-size", metavar="N", help="Tokens in a KV-cache block.", rich_help_panel=ENGINE)
]
KvCacheDtype = Annotated[
    str,
    typer.Option(
        "--kv-cache-dtype",
        metavar="DTYPE",
        help="fp8 or int8: 8 bits with scales. auto: what the model was quantized for, else its dtype; that dtype: 16 bits always.",
        rich_help_panel=ENGINE,
    ),
]
KvCacheScales = Annotated[
    str,
    typer.Option(
        "--kv-cache-scales",
        metavar="SCALES",
        help="Scales of a KV cache of 8 bits: dynamic, one for each token's head; or one for each KV head: checkpoint (the "
        "model's), calculate (calibrated on the first step's tokens) or a .safetensors file. auto: checkpoint where the model "
        "was quantized for such a cache, else dynamic.",
        rich_help_panel=ENGINE,
    ),
]
Quantization = Annotated[
    str | None,
    typer.Option(
        "--quantization",
        metavar="FORM",
        help="Round the weights as they are loaded: int8, fp8, int4, nvfp4, mxfp4; nvfp4-w4a8 or mxfp4-w4a8 with FP8 activations, "
        "also of models in FP4.",
        rich_help_panel=ENGINE,
    ),
]
NumKvBlocks = Annotated[
    int | None, _size("--num-kv-blocks", "KV-cache blocks. Not given: as many as fit.", panel=ENGINE)
]
KvOffloadingSize = Annotated[
    float | None,
    _number(
        "--kv-offloading-size",
        "GIB",
        "Host memory, GiB of all ranks together, that evicted KV blocks go to and come back from. Not given: none.",
        ENGINE,
    ),
]
GpuMemoryUtilization = Annotated[
    float, _number("--gpu-memory-utilization", "SHARE", "Share of the GPU's memory to use at most.", ENGINE)
]
EnablePrefixCaching = Annotated[
    bool,
    typer.Option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        help="Keep what was computed, for prompts that begin alike.",
        rich_help_panel=ENGINE,
    ),
]
BatchInvariant = Annotated[
    bool,
    typer.Option(
        "--batch-invariant/--no-batch-invariant",
        help="Give a request the same bits whatever else is computed with it, however; slower.",
        rich_help_panel=ENGINE,
    ),
]
DisableCascadeAttn = Annotated[
    bool,
    typer.Option(
        "--disable-cascade-attn/--no-disable-cascade-attn",
        help="Read what requests begin with for each of them, also where once for all is faster.",
        rich_help_panel=ENGINE,
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
        rich_help_panel=ENGINE,
    ),
]

Trace = Annotated[
    str | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        help="Write what host and device do in every step, for Perfetto; compressed if it ends in .gz.",
        rich_help_panel=ENGINE,
    ),
]

# ---- what all commands have that run an engine ----

Engine = dict[str, Any]  # name → value

_SHARED: dict[str, tuple[object, object]] = {
    "device": (Device, "auto"),
    "dtype": (Dtype, "auto"),
    "tensor_parallel_size": (TensorParallelSize, 1),
    "max_model_len": (MaxModelLen, None),
    "max_num_seqs": (MaxNumSeqs, None),
    "max_num_batched_tokens": (MaxNumBatchedTokens, None),
    "block_size": (BlockSize, 16),
    "kv_cache_dtype": (KvCacheDtype, "auto"),
    "kv_cache_scales": (KvCacheScales, "auto"),
    "quantization": (Quantization, None),
    "num_kv_blocks": (NumKvBlocks, None),
    "kv_offloading_size": (KvOffloadingSize, None),
    "gpu_memory_utilization": (GpuMemoryUtilization, 0.9),
}


def with_engine(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the flags that engines share, but for those `without`, where its keyword `engine` stands: it gets them
    there by name."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        names = [name for name in _SHARED if name not in without]
        parameters = []
        for parameter in own.parameters.values():
            if parameter.name != "engine":
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            for name in names:
                kind, default = _SHARED[name]
                parameters.append(
                    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
                )

        @wraps(command)
        def with_flags(**values: Any) -> None:
            engine = {name: values.pop(name) for name in names}
            command(**values, engine=engine)

        with_flags.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        with_flags.__annotations__ = {p.name: p.annotation for p in parameters}
        return with_flags

    return decorate


# ---- sampling ----

SAMPLING = "Sampling"

MaxTokens = Annotated[int | None, _size("--max-tokens", "Longest answer, in tokens.", panel=SAMPLING)]
Temperature = Annotated[float, _number("--temperature", "T", "0 takes the likeliest token each time.", SAMPLING)]
TopP = Annotated[float, _number("--top-p", "P", "Draw among the likeliest tokens of this total; 1 is off.", SAMPLING)]
TopK = Annotated[
    int,
    typer.Option(
        "--top-k", metavar="K", help="Draw among so many likeliest tokens; 0 is off.", rich_help_panel=SAMPLING
    ),
]
MinP = Annotated[
    float,
    _number("--min-p", "P", "Leave out tokens below this share of the likeliest one's; 0 is off.", SAMPLING),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed", metavar="N", help="Same seed, same text. Not given: a new one each time.", rich_help_panel=SAMPLING
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="End before this text; may be repeated.", rich_help_panel=SAMPLING),
]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message, for chat models.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")]
