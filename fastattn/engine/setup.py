"""From a model's name and a few wishes to a running engine: device, dtype, lengths, cache size, weights."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from fastattn import ops
from fastattn.engine.config import EngineConfig, Policy
from fastattn.engine.engine import Engine
from fastattn.engine.runner import Runner
from fastattn.models.config import ModelConfig
from fastattn.models.loader import ModelSource, open_model
from fastattn.models.registry import load_model

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Without a wish a CPU's cache takes this share of free memory at most: a laptop has other work to do.
_CPU_MEMORY_SHARE = 0.25
# Kernels' workspaces, graphs and the allocator's slack on a GPU, beyond weights and activations.
_CUDA_RESERVE_BYTES = 512 << 20


@dataclass(frozen=True)
class EngineOptions:
    """What a user may say; None leaves the choice to us. See EngineConfig for the meanings."""

    device: str = "auto"
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int = 16
    num_kv_blocks: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    policy: Policy = "fcfs"
    seed: int = 0
    use_cuda_graphs: bool = True
    debug_checks: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization is {self.gpu_memory_utilization}, allowed is above 0 and up to 1")


def choose_device(device: str) -> torch.device:
    """ "auto" is the GPU if there is one and the kernels were built, else the CPU."""
    if device == "auto":
        device = "cuda" if ops.has_cuda_kernels() and torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}, allowed are 'auto', 'cpu', 'cuda' and 'cuda:N'") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}, allowed are 'auto', 'cpu', 'cuda' and 'cuda:N'")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device is {device!r}, but torch {torch.__version__} sees no CUDA device")
        if not ops.has_cuda_kernels():
            raise ValueError(
                f"device is {device!r}, but the CUDA kernels are not built: FASTATTN_CUDA=on pip install ."
            )
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}, allowed are 'auto', {', '.join(map(repr, _DTYPES))}")
    if dtype == "float32" and device.type == "cuda":
        raise ValueError("dtype is 'float32' on a CUDA device, allowed are 'bfloat16' and 'float16'")
    return _DTYPES[dtype]


def choose_model_len(config: ModelConfig, wish: int | None) -> int:
    if wish is None:
        return min(config.max_position_embeddings, 8192)
    if not 1 <= wish <= config.max_position_embeddings:
        raise ValueError(f"max_model_len is {wish}, allowed is 1 to {config.max_position_embeddings} for this model")
    return wish


def kv_bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    return config.num_layers * 2 * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize


def choose_num_kv_blocks(
    config: ModelConfig,
    options: EngineOptions,
    max_model_len: int,
    max_num_seqs: int,
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """As many blocks as memory allows, but never more than all sequences at full length could use."""
    if options.num_kv_blocks is not None:
        return options.num_kv_blocks
    per_block = kv_bytes_per_block(config, options.block_size, dtype)
    blocks_per_seq = -(-max_model_len // options.block_size)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        budget = int(free - (1 - options.gpu_memory_utilization) * total) - _CUDA_RESERVE_BYTES
    else:
        budget = int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _CPU_MEMORY_SHARE)
    blocks = min(budget // per_block, blocks_per_seq * max_num_seqs, (2**31 - 1) // options.block_size)
    if blocks < blocks_per_seq:
        raise ValueError(
            f"a request of max_model_len = {max_model_len} tokens needs {blocks_per_seq} KV blocks of {per_block} bytes, but memory is left "
            f"for {max(blocks, 0)}: lower max_model_len, or set num_kv_blocks"
        )
    return blocks


def build_engine(model: str | ModelSource, options: EngineOptions, show_progress: bool = False) -> Engine:
    """Loads ``model`` (a name, a path, or an opened source) and sets up everything that it runs with."""
    source = open_model(model) if isinstance(model, str) else model
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    max_model_len = choose_model_len(source.config, options.max_model_len)
    max_num_seqs = options.max_num_seqs or (256 if device.type == "cuda" else 32)
    max_tokens = options.max_num_batched_tokens or (8192 if device.type == "cuda" else 512)
    if not options.enable_chunked_prefill:
        max_tokens = max(max_tokens, max_model_len)
    network = load_model(source, device, dtype, max_model_len, show_progress)
    config = EngineConfig(
        max_model_len=max_model_len,
        num_kv_blocks=choose_num_kv_blocks(source.config, options, max_model_len, max_num_seqs, device, dtype),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(max_tokens, max_num_seqs),
        block_size=options.block_size,
        enable_prefix_caching=options.enable_prefix_caching,
        enable_chunked_prefill=options.enable_chunked_prefill,
        policy=options.policy,
        seed=options.seed,
        use_cuda_graphs=options.use_cuda_graphs,
        debug_checks=options.debug_checks,
    )
    return Engine(Runner(network, config, device, dtype), config, source.tokenizer())
