"""From a model's name and a few wishes to a running engine: device, dtype, lengths, cache size, weights."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch

from fastattn.engine.allowed import FLAG, OPTIONAL_SIZE, Allowed, above_0, check_fields, integer, or_none, text
from fastattn.engine.batch import step_builder
from fastattn.engine.config import EngineConfig, Policy
from fastattn.engine.device import choose_device, choose_dtype, rank_memory
from fastattn.engine.engine import Engine
from fastattn.engine.host_memory import host_memory
from fastattn.engine.kv_scales import check_kv_scales, choose_kv_cache, load_kv_scales
from fastattn.engine.memory_plan import PlanOptions, memory_plan
from fastattn.engine.rank_setup import start_ranks
from fastattn.engine.runner import Runner
from fastattn.engine.startup import Startup
from fastattn.engine.trace import NO_TRACE, NoTrace, Trace, check_trace_path
from fastattn.models.config import ModelConfig
from fastattn.models.loader import ModelSource, open_model
from fastattn.models.loader.quantized_source import check_quantization, with_quantization
from fastattn.models.registry import load_model
from fastattn.nn import TensorParallel, kv_cache_format
from fastattn.speculative.config import SpeculativeConfig
from fastattn.speculative.setup import build_speculator, open_draft

# A step on a GPU may have to record a graph; on CPUs a rank may have to wait for other programs.
_RANK_TIMEOUT_SECONDS = 15.0
# Of which kind each option is; what is wrong with a number or name that is of the right kind, others know better.
_ALLOWED: Allowed = {
    "dtype": (text, "'auto', 'float32', 'bfloat16' or 'float16'"),
    "tensor_parallel_size": (integer(1, 2**31 - 1), "an integer from 1"),
    "max_model_len": OPTIONAL_SIZE,
    "max_num_seqs": OPTIONAL_SIZE,
    "max_num_batched_tokens": OPTIONAL_SIZE,
    "num_kv_blocks": OPTIONAL_SIZE,
    "kv_cache_dtype": (text, "'auto', a dtype, 'fp8' or 'int8'"),
    "kv_cache_scales": (text, "'auto', 'dynamic', 'checkpoint', 'calculate' or a file's name"),
    "kv_offloading_size": (or_none(above_0(1e6)), "above 0, below 1e6 (GiB)"),
    "gpu_memory_utilization": (above_0(1, inclusive=True), "above 0 and up to 1"),
    "rank_timeout_seconds": (or_none(above_0(1e6)), "above 0, below 1e6"),
    "seed": (integer(-(2**63), 2**63 - 1), "a 64-bit integer"),
    "enable_prefix_caching": FLAG,
    "enable_chunked_prefill": FLAG,
    "use_cuda_graphs": FLAG,
    "async_scheduling": (or_none(FLAG[0]), "None, True or False"),
    "debug_checks": FLAG,
    "batch_invariant": FLAG,
    "disable_cascade_attn": FLAG,
}


@dataclass(frozen=True)
class EngineOptions:
    """What a user may say; None leaves the choice to us. See EngineConfig for the meanings.

    quantization: the form that the weights of the model's layers are rounded to as they are loaded: "int8", "fp8" (W8A8), "int4",
    "nvfp4", "mxfp4" (W4A16), "nvfp4-w4a8" or "mxfp4-w4a8" (FP4 weights, FP8 activations); of a model with FP4 weights it chooses the
    activations. None: as they are stored. kv_cache_dtype "auto" and kv_cache_scales "auto": what the model's kv_cache_scheme asks
    for, with its static scales, else the model's dtype; of "fp8" and "int8" that are asked for, dynamic scales.
    async_scheduling: a step is scheduled and queued while the one before it runs; None: on GPUs, but for several ranks and
    speculative decoding. kv_offloading_size: GiB of host memory, of all ranks together, for KV blocks that are evicted; None
    is off. batch_invariant: a request's tokens and log-probabilities are the same bits alone and in any batch, however its prompt is
    cut, with prefix hits and after preemption; on one GPU (or CPU), without speculative decoding. disable_cascade_attn: see
    `EngineConfig`. tensor_parallel_size: ranks that share the model, a process and, on GPUs, a device each. rank_timeout_seconds: how long one
    may keep the others waiting before all are ended, on CPUs in an exchange, on GPUs in a step; 15 if not given.
    trace: file that takes a trace of every step, for Perfetto; compressed if it ends in .gz.
    """

    device: str = "auto"
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int = 16
    kv_cache_dtype: str = "auto"
    kv_cache_scales: str = "auto"
    quantization: str | None = None
    num_kv_blocks: int | None = None
    kv_offloading_size: float | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    policy: Policy = "fcfs"
    seed: int = 0
    use_cuda_graphs: bool = True
    async_scheduling: bool | None = None
    debug_checks: bool = False
    batch_invariant: bool = False
    disable_cascade_attn: bool = False
    speculative: SpeculativeConfig | None = None
    rank_timeout_seconds: float | None = None
    trace: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, _ALLOWED)
        size = self.tensor_parallel_size
        if self.kv_offloading_size is not None and not self.enable_prefix_caching:
            raise ValueError(
                f"kv_offloading_size is {self.kv_offloading_size} with enable_prefix_caching False, allowed is None there: "
                "host memory is a second tier of the prefix cache"
            )
        check_quantization(self.quantization)
        check_trace_path(self.trace)
        if self.batch_invariant and size > 1:
            raise ValueError(
                f"tensor_parallel_size is {size} with batch_invariant, allowed is 1 there: the order in which ranks' results are added "
                "depends on the size of a step"
            )
        if self.async_scheduling and (size > 1 or self.speculative is not None):
            raise ValueError(
                "async_scheduling is True, allowed is False or None with several ranks or speculative decoding, whose steps "
                "wait for what the one before drew"
            )

    def overlaps(self, device_type: str) -> bool:
        """Whether a step is queued before the results of the one before it are known."""
        if self.async_scheduling is None:
            return device_type == "cuda" and self.tensor_parallel_size == 1 and self.speculative is None
        return self.async_scheduling


def for_model(options: EngineOptions, source: ModelSource) -> tuple[EngineOptions, ModelSource]:
    """The options with what they leave to the model decided, and the model in the form that they ask for."""
    source = with_quantization(source, options.quantization)
    scales, dtype = choose_kv_cache(options.kv_cache_scales, options.kv_cache_dtype, source)
    return replace(options, kv_cache_scales=scales, kv_cache_dtype=dtype), source


def choose_model_len(config: ModelConfig, wish: int | None) -> int:
    if wish is None:
        return min(config.max_position_embeddings, 8192)
    if not 2 <= wish <= config.max_position_embeddings:  # one token to read and one to say
        raise ValueError(f"max_model_len is {wish}, allowed is 2 to {config.max_position_embeddings} for this model")
    return wish


def plan_options(config: ModelConfig, options: EngineOptions, device: torch.device, dtype: torch.dtype) -> PlanOptions:
    """Every size that is open in the options, chosen."""
    most = min(config.num_heads, config.intermediate_size, config.vocab_size)
    if options.tensor_parallel_size > most:
        raise ValueError(
            f"tensor_parallel_size is {options.tensor_parallel_size}, allowed is up to {most} for this model: its attention heads"
        )
    # Refused before anything is loaded.
    kv_cache_format(options.kv_cache_dtype, dtype, config.head_dim, options.kv_cache_scales)
    on_gpu = device.type == "cuda"
    max_model_len = choose_model_len(config, options.max_model_len)
    max_num_seqs, max_tokens = options.max_num_seqs, options.max_num_batched_tokens
    if max_num_seqs is not None and max_tokens is not None and max_tokens < max_num_seqs:
        raise ValueError(
            f"max_num_batched_tokens is {max_tokens}, allowed is at least max_num_seqs = {max_num_seqs}: each sequence that "
            "decodes has a token in a step"
        )
    # What is asked for is kept, what is left to us follows it.
    if max_num_seqs is None:
        most_seqs = 256 if on_gpu else 32
        max_num_seqs = min(most_seqs, max_tokens or most_seqs)
    if max_tokens is None:
        max_tokens = max(8192 if on_gpu else 512, max_num_seqs, 0 if options.enable_chunked_prefill else max_model_len)
    return PlanOptions(
        device_type=device.type,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_tokens,
        block_size=options.block_size,
        kv_cache_dtype=options.kv_cache_dtype,
        kv_cache_scales=options.kv_cache_scales,
        num_kv_blocks=options.num_kv_blocks,
        kv_offloading_bytes=int((options.kv_offloading_size or 0) * 2**30),
        gpu_memory_utilization=options.gpu_memory_utilization,
        tensor_parallel_size=options.tensor_parallel_size,
        speculative=options.speculative,
    )


def engine_config(
    options: EngineOptions, sizes: PlanOptions, num_kv_blocks: int, num_host_kv_blocks: int = 0
) -> EngineConfig:
    return EngineConfig(
        max_model_len=sizes.max_model_len,
        num_kv_blocks=num_kv_blocks,
        num_host_kv_blocks=num_host_kv_blocks,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        block_size=sizes.block_size,
        kv_cache_dtype=sizes.kv_cache_dtype,
        kv_cache_scales=sizes.kv_cache_scales,
        enable_prefix_caching=options.enable_prefix_caching,
        enable_chunked_prefill=options.enable_chunked_prefill,
        policy=options.policy,
        seed=options.seed,
        use_cuda_graphs=options.use_cuda_graphs,
        async_scheduling=options.overlaps(sizes.device_type),
        debug_checks=options.debug_checks,
        batch_invariant=options.batch_invariant,
        disable_cascade_attn=options.disable_cascade_attn,
        speculative=options.speculative,
    )


def build_engine(model: str | ModelSource, options: EngineOptions, show_progress: bool = False) -> Engine:
    """Loads ``model`` (a name, a path, or an opened source) and sets up everything that it runs with.

    What `fastattn plan` says is what happens: the same plan sizes the cache, and refuses before anything is loaded.
    """
    startup = Startup()
    options, source = for_model(options, open_model(model) if isinstance(model, str) else model)
    startup.lap("open")
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    sizes = plan_options(source.config, options, device, dtype)
    engine_config(options, sizes, options.num_kv_blocks or 1)  # what is out of range is said before what is too much
    check_kv_scales(options.kv_cache_scales, options.kv_cache_dtype, source)
    first = TensorParallel(0, options.tensor_parallel_size)
    kv_scales = load_kv_scales(options.kv_cache_scales, options.kv_cache_dtype, source, first)
    draft = open_draft(options.speculative)
    with ExitStack() as on_error:
        ranks, memory = None, rank_memory(device, options.tensor_parallel_size)
        if options.tensor_parallel_size > 1:
            limit = options.rank_timeout_seconds or _RANK_TIMEOUT_SECONDS
            ranks = start_ranks(options.tensor_parallel_size, source, device, limit)
            on_error.callback(ranks.close)
            device = torch.device("cuda", 0) if device.type == "cuda" else device
            found = ranks.set_up(source.name, dtype, options.quantization)
            memory = min(memory, *found) if device.type == "cuda" else memory
        startup.lap("device")
        plan = memory_plan(
            source.config, source.tensors(), sizes, *memory, (draft.config, draft.tensors()) if draft else None
        )
        if plan.problem is not None:
            raise ValueError(
                f"{source.name}: {plan.problem}: lower max_model_len or max_num_seqs, or set num_kv_blocks"
            )
        host_bytes, host_free = plan.host_kv_bytes * sizes.tensor_parallel_size, host_memory().available
        if host_bytes > host_free:
            raise ValueError(
                f"kv_offloading_size is {options.kv_offloading_size}: {host_bytes} bytes are needed, "
                f"{host_free} of the host's memory are available"
            )
        config = engine_config(options, sizes, plan.num_kv_blocks, plan.num_host_kv_blocks)
        tokenizer = source.tokenizer()
        startup.lap("tokenizer")
        trace: NoTrace = NO_TRACE if options.trace is None else Trace(options.trace, device)
        # The draft model comes first: what can be wrong with it is found before the larger one is read.
        speculator = build_speculator(config, source.config, tokenizer, draft, device, dtype, show_progress)
        if draft is not None:
            startup.lap("draft")
        load = partial(load_model, source, device, dtype, sizes.max_model_len, batch_invariant=options.batch_invariant)
        startup.weight_bytes = sum(plan.stored_bytes.values())
        step_memory = None
        if ranks is None:
            network = load(show_progress)
        else:
            tp, step_memory = ranks.load(config, step_builder(config).nbytes)
            network = load(show_progress, tp)
            ranks.wait_until_loaded()
        startup.lap("weights")
        runner = Runner(
            network, config, device, dtype, step_memory=step_memory, ranks=ranks, kv_scales=kv_scales, trace=trace
        )
        engine = Engine(runner, config, tokenizer, speculator, startup=startup, reload=load)
        startup.lap("kv_cache")
        on_error.pop_all()
    return engine
