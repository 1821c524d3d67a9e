"""`fastattn plan`: what a model will take in memory, before anything is loaded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastattn.cli import _errors, _session
from fastattn.cli import _options as opt
from fastattn.cli._summary import bytes_text

if TYPE_CHECKING:
    from fastattn.engine.memory_plan import MemoryPlan, PlanOptions
    from fastattn.models.loader import ModelSource


@opt.with_engine()
def plan(
    model: opt.Model,
    *,
    engine: opt.Engine,
    speculative: opt.Speculative = None,
    memory: Annotated[
        int | None,
        typer.Option(
            "--memory", parser=opt.parse_size, metavar="BYTES", help="Plan for a device of this size, e.g. 80G."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a model takes in memory, before it is loaded.

    Weights, KV cache and workspace, to the byte. Exit code 1 if it does not fit.
    """
    import torch

    from fastattn.engine.device import rank_memory
    from fastattn.engine.memory_plan import memory_plan
    from fastattn.speculative.setup import open_draft

    stored = _session.open_source(model)
    options, source = make_options(
        stored,
        **engine,
        speculative=speculative,
        what_if=memory is not None,
    )
    chosen = torch.device(engine["device"] if engine["device"] != "auto" else options.device_type)
    free, total = (memory, memory) if memory is not None else rank_memory(chosen, engine["tensor_parallel_size"])
    draft = open_draft(options.speculative)
    drafts = (draft.config, draft.tensors()) if draft is not None else None
    result = memory_plan(source.config, stored.tensors(), options, free, total, drafts)
    if as_json:
        typer.echo(json.dumps(as_dict(source.name, result), indent=2))
    else:
        _print_table(source.name, result)
    if not result.fits:
        raise typer.Exit(1)


def make_options(
    source: ModelSource, *, device: str, dtype: str, what_if: bool, **wishes: Any
) -> tuple[PlanOptions, ModelSource]:
    """The choices that the engine would make, and the model in the form that it would run. what_if: the device need not be here."""
    import torch

    from fastattn.engine import setup
    from fastattn.engine.device import choose_device, choose_dtype

    if what_if and device.partition(":")[0] == "cuda":
        chosen = torch.device("cuda")
    else:
        try:
            chosen = choose_device(device)
        except ValueError as error:
            hint = " (--memory 80G plans for a GPU that is not here)" if device.startswith("cuda") else ""
            raise _errors.CLIError(f"{error}{hint}") from error
    wished = {name: value for name, value in wishes.items() if value is not None}
    options, source = setup.for_model(setup.EngineOptions(device=device, dtype=dtype, **wished), source)
    sizes = setup.plan_options(source.config, options, chosen, choose_dtype(dtype, chosen))
    setup.engine_config(options, sizes, options.num_kv_blocks or 1)  # checks what the engine would refuse
    return sizes, source


def as_dict(name: str, plan: MemoryPlan) -> dict[str, Any]:
    """The plan with stable keys; every *_bytes is exact, but activation_bytes and sampling_bytes, which are upper bounds."""
    o = plan.options
    return {
        "model": name,
        "device": o.device_type,
        "dtype": str(o.dtype).removeprefix("torch."),
        "tensor_parallel_size": o.tensor_parallel_size,
        "max_model_len": o.max_model_len,
        "max_num_seqs": o.max_num_seqs,
        "max_num_batched_tokens": o.max_num_batched_tokens,
        "block_size": o.block_size,
        "kv_cache_dtype": o.kv_cache_dtype,
        "kv_cache_scales": o.kv_cache_scales,
        "num_parameters": plan.num_parameters,
        "stored_bytes": dict(plan.stored_bytes),
        "weight_bytes": dict(plan.weight_bytes),
        "draft_weight_bytes": plan.draft_weight_bytes,
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "draft_kv_bytes_per_token": plan.draft_kv_bytes_per_token,
        "kv_bytes_per_block": plan.kv_bytes_per_block,
        "num_kv_blocks": plan.num_kv_blocks,
        "num_kv_tokens": plan.num_kv_tokens,
        "kv_bytes": plan.kv_bytes,
        "num_host_kv_blocks": plan.num_host_kv_blocks,
        "host_kv_bytes": plan.host_kv_bytes,
        "activation_bytes": plan.activation_bytes,
        "sampling_bytes": plan.sampling_bytes,
        "buffer_bytes": plan.buffer_bytes,
        "reserve_bytes": plan.reserve_bytes,
        "total_bytes": plan.total_bytes,
        "memory_free": plan.memory_free,
        "memory_total": plan.memory_total,
        "memory_budget": plan.memory_budget,
        "num_full_requests": plan.num_full_requests,
        "fits": plan.fits,
        "problem": plan.problem,
    }


def _print_table(name: str, plan: MemoryPlan) -> None:
    from rich.console import Console
    from rich.table import Table

    o = plan.options
    dtype = str(o.dtype).removeprefix("torch.")
    each = f", each of {o.tensor_parallel_size} ranks" if o.tensor_parallel_size > 1 else ""
    table = Table(title=f"{name}, {o.device_type}, {dtype}{each}", title_justify="left", box=None, pad_edge=False)
    kv_dtype = "" if o.kv_cache_dtype == "auto" else f", in {o.kv_cache_dtype}"
    for column, justify in (("part", "left"), ("bytes", "right"), ("", "right"), ("how", "left")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]

    def row(part: str, count: int, how: str) -> None:
        table.add_row(part, f"{count:,}", bytes_text(count), how)

    stored = ", ".join(f"{kind} {bytes_text(count)}" for kind, count in plan.stored_bytes.items())
    row("file", sum(plan.stored_bytes.values()), stored)
    loaded = ", ".join(f"{kind} {bytes_text(count)}" for kind, count in plan.weight_bytes.items())
    row("weights", sum(plan.weight_bytes.values()), f"{plan.num_parameters:,} parameters, rotary tables; {loaded}")
    if plan.draft_weight_bytes:
        row("draft weights", plan.draft_weight_bytes, "of the draft model")
    row("KV, a token", plan.kv_bytes_per_token, f"all layers, k and v{kv_dtype}")
    if plan.draft_kv_bytes_per_token:
        row("draft KV, a token", plan.draft_kv_bytes_per_token, "all layers of the draft model, k and v")
    row("KV, a block", plan.kv_bytes_per_block, f"{o.block_size} tokens")
    row("KV cache", plan.kv_bytes, f"{plan.num_kv_blocks:,} blocks, {plan.num_kv_tokens:,} tokens")
    if plan.num_host_kv_blocks:
        where = "" if o.device_type == "cpu" else ", of host memory, not in the total"
        row("KV offloaded", plan.host_kv_bytes, f"{plan.num_host_kv_blocks:,} blocks{where}")
    row("activations", plan.activation_bytes, f"at most, in a step of {o.max_num_batched_tokens:,} tokens")
    row("logits, sampling", plan.sampling_bytes, f"at most, for {o.num_logits:,} rows")
    row("step buffers", plan.buffer_bytes, "token ids, positions, block tables")
    if plan.reserve_bytes:
        row("reserve", plan.reserve_bytes, "kernels' workspaces, CUDA graphs")
    row("total", plan.total_bytes, f"of {plan.memory_budget:,} that may be used")
    Console(highlight=False, soft_wrap=True).print(table)
    if plan.problem is not None:
        typer.echo(f"Does not fit: {plan.problem}.")
    else:
        requests = plan.num_full_requests
        noun = "request" if requests == 1 else "requests"
        typer.echo(f"Fits: {requests} {noun} of {o.max_model_len:,} tokens at the same time.")
