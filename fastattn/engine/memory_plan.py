"""What a model will take in memory, to the byte, computed from its description alone: no weight is read, no GPU asked.

Weights and KV cache are exact. The workspace of a step is an upper bound: the tensors of its widest phase, all counted as
alive at once, without what the allocator rounds up. A request for prompt_logprobs takes logits of a whole chunk on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fastattn.engine.decode_shapes import DecodeShapes
from fastattn.models.config import ModelConfig
from fastattn.models.registry import build_meta, loaded_bytes
from fastattn.nn import KVCacheFormat, TensorParallel, kv_cache_format
from fastattn.speculative.config import SpeculativeConfig

if TYPE_CHECKING:
    from fastattn.models.loader import TensorInfo

# Kernels' own workspaces, CUDA graphs and the allocator's slack on a GPU.
CUDA_RESERVE_BYTES = 512 << 20
# Without a wish a CPU's cache takes this share of free memory at most: a laptop has other work to do.
CPU_MEMORY_SHARE = 0.25
# Queries per pass of the CPU's attention (fastattn.reference.attention), which holds fp32 scores of that many rows.
_CPU_ATTENTION_ROWS = 256


@dataclass(frozen=True)
class PlanOptions:
    """The engine's sizes, every choice made (see EngineConfig). num_kv_blocks None: as many as fit. kv_offloading_bytes: host
    memory of all ranks for blocks that are evicted."""

    device_type: str  # "cpu" or "cuda"
    dtype: torch.dtype
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int = 16
    kv_cache_dtype: str = "auto"
    kv_cache_scales: str = "dynamic"
    num_kv_blocks: int | None = None
    kv_offloading_bytes: int = 0
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    speculative: SpeculativeConfig | None = None

    @property
    def num_logits(self) -> int:
        """Most rows of logits in a step: each sequence's last token and drafts."""
        per_seq = 1 if self.speculative is None else 1 + self.speculative.num_speculative_tokens
        return min(self.max_num_seqs * per_seq, max(self.max_num_seqs, self.max_num_batched_tokens))


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, but for the counts. memory_free, memory_total: of the device, before anything was loaded. draft_…: what a draft
    model takes on top; its KV cache has as many blocks as the target's.

    With tensor parallelism all of it is for one rank, rank 0: it has the largest part, the logits of all, and the whole draft
    model. num_parameters and stored_bytes are the model's.
    """

    options: PlanOptions
    num_parameters: int
    stored_bytes: Mapping[str, int]  # on disk, by stored type
    weight_bytes: Mapping[str, int]  # loaded, by dtype; the rotary tables are the fp32 part of a half-precision model
    kv_bytes_per_token: int
    num_kv_blocks: int
    activation_bytes: int
    sampling_bytes: int
    buffer_bytes: int
    reserve_bytes: int
    memory_free: int
    memory_total: int
    draft_weight_bytes: int = 0
    draft_kv_bytes_per_token: int = 0

    @property
    def host_kv_bytes_per_block(self) -> int:
        """Without the draft model's: what that forgets it computes again."""
        return self.kv_bytes_per_token * self.options.block_size

    @property
    def num_host_kv_blocks(self) -> int:
        return self.options.kv_offloading_bytes // (self.host_kv_bytes_per_block * self.options.tensor_parallel_size)

    @property
    def host_kv_bytes(self) -> int:
        """Host memory for blocks that are evicted, this rank's part."""
        return self.host_kv_bytes_per_block * self.num_host_kv_blocks

    @property
    def kv_bytes_per_block(self) -> int:
        return (self.kv_bytes_per_token + self.draft_kv_bytes_per_token) * self.options.block_size

    @property
    def kv_bytes(self) -> int:
        return self.kv_bytes_per_block * self.num_kv_blocks

    @property
    def num_kv_tokens(self) -> int:
        return self.num_kv_blocks * self.options.block_size

    @property
    def weights_total(self) -> int:
        return sum(self.weight_bytes.values()) + self.draft_weight_bytes

    @property
    def workspace_bytes(self) -> int:
        return self.activation_bytes + self.sampling_bytes + self.buffer_bytes + self.reserve_bytes

    @property
    def total_bytes(self) -> int:
        """Of the device, which on a CPU is the host."""
        on_host = self.host_kv_bytes if self.options.device_type == "cpu" else 0
        return self.weights_total + self.kv_bytes + self.workspace_bytes + on_host

    @property
    def memory_budget(self) -> int:
        """What all of it may take together: on a GPU its share of the card, less what others hold there already."""
        return _budget(self.options, self.memory_free, self.memory_total)

    @property
    def blocks_per_request(self) -> int:
        return -(-self.options.max_model_len // self.options.block_size)

    @property
    def num_full_requests(self) -> int:
        """Requests of max_model_len tokens that can run at the same time without preemption."""
        return min(self.num_kv_blocks // self.blocks_per_request, self.options.max_num_seqs)

    @property
    def fits(self) -> bool:
        return self.problem is None

    @property
    def problem(self) -> str | None:
        """Why it cannot run, in one sentence with both numbers; None if it can."""
        if self.total_bytes > self.memory_budget:
            return f"{self.total_bytes} bytes are needed, {self.memory_budget} may be used"
        if self.num_kv_blocks < self.blocks_per_request:
            return (
                f"a request of max_model_len = {self.options.max_model_len} tokens needs {self.blocks_per_request} KV blocks "
                f"of {self.kv_bytes_per_block} bytes, and there is room for {self.num_kv_blocks}"
            )
        if self.options.kv_offloading_bytes > 0 and self.num_host_kv_blocks == 0:
            return (
                f"kv_offloading_size is {self.options.kv_offloading_bytes} bytes, and a block takes "
                f"{self.host_kv_bytes_per_block} on each of {self.options.tensor_parallel_size} ranks"
            )
        return None


def memory_plan(
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    options: PlanOptions,
    memory_free: int,
    memory_total: int,
    draft: tuple[ModelConfig, Mapping[str, TensorInfo]] | None = None,
) -> MemoryPlan:
    """The plan for a model of these tensors on a device with that much memory, or on one such device a rank. draft: the draft
    model of speculation."""
    stored: dict[str, int] = {}
    for info in tensors.values():
        stored[_type_name(info.dtype)] = stored.get(_type_name(info.dtype), 0) + info.nbytes
    num_parameters, weights = _weight_bytes(config, options)
    activations, sampling = activation_bytes(config, options), sampling_bytes(config, options)
    buffers = buffer_bytes(options) + _static_scale_bytes(config, options)
    per_token = kv_bytes_per_token(config, options)
    draft_weights = draft_per_token = 0
    if draft is not None:
        own = draft[0]
        length = min(options.max_model_len, own.max_position_embeddings)
        own_options = replace(
            options, max_model_len=length, speculative=None, tensor_parallel_size=1, kv_cache_scales="dynamic"
        )
        draft_weights = sum(_weight_bytes(own, own_options)[1].values())
        draft_per_token = kv_bytes_per_token(own, own_options)
        # The two models take turns, so their work space is the larger one's.
        activations = max(activations, activation_bytes(own, own_options))
        sampling = max(sampling, sampling_bytes(own, own_options)) + draft_logits_bytes(config, options)
        buffers += buffer_bytes(own_options)
    reserve = CUDA_RESERVE_BYTES if options.device_type == "cuda" else 0
    fixed = sum(weights.values()) + draft_weights + activations + sampling + buffers + reserve
    if options.device_type == "cpu":
        fixed += options.kv_offloading_bytes // options.tensor_parallel_size
    blocks = options.num_kv_blocks
    if blocks is None:
        room = _budget(options, memory_free, memory_total) - fixed
        blocks = _num_kv_blocks(options, per_token + draft_per_token, room)
    return MemoryPlan(
        options=options,
        num_parameters=num_parameters,
        stored_bytes=stored,
        weight_bytes=weights,
        kv_bytes_per_token=per_token,
        num_kv_blocks=blocks,
        activation_bytes=activations,
        sampling_bytes=sampling,
        buffer_bytes=buffers,
        reserve_bytes=reserve,
        memory_free=memory_free,
        memory_total=memory_total,
        draft_weight_bytes=draft_weights,
        draft_kv_bytes_per_token=draft_per_token,
    )


def _weight_bytes(config: ModelConfig, options: PlanOptions) -> tuple[int, dict[str, int]]:
    """Number of the model's parameters, and what a rank's part of them and the rotary tables take when loaded, by dtype."""
    size = options.tensor_parallel_size
    rank = build_meta(config, 1, TensorParallel(0, size))
    weights = {_type_name(kind): n for kind, n in loaded_bytes(rank, options.dtype, options.device_type).items()}
    num_parameters = (rank if size == 1 else build_meta(config, 1)).num_parameters
    num_tables = 1 if config.rope_local is None else 2
    table_bytes = num_tables * options.max_model_len * config.head_dim * 4
    weights["float32"] = weights.get("float32", 0) + table_bytes
    if config.tie_word_embeddings and options.device_type == "cpu" and options.dtype is torch.float32:
        # The head's own copy, laid out for the CPU's matrix kernels (DecoderModel.pack).
        weights["float32"] += _rank_sizes(config, size).vocab * config.hidden_size * 4
    return num_parameters, weights


@dataclass(frozen=True)
class _Sizes:
    """Rank 0's part of what is cut across ranks."""

    heads: int
    kv_heads: int
    intermediate: int
    vocab: int


def _rank_sizes(config: ModelConfig, size: int) -> _Sizes:
    tp = TensorParallel(0, size)
    heads, kv_heads = tp.shard_heads(config.num_heads, config.num_kv_heads)
    return _Sizes(
        heads.length, kv_heads.length, tp.shard(config.intermediate_size).length, tp.shard(config.vocab_size).length
    )


def kv_bytes_per_token(config: ModelConfig, options: PlanOptions) -> int:
    """On rank 0, scales included."""
    kv_heads = _rank_sizes(config, options.tensor_parallel_size).kv_heads
    return _kv_format(config, options).bytes_per_token(config.num_layers, kv_heads, config.head_dim)


def _kv_format(config: ModelConfig, options: PlanOptions) -> KVCacheFormat:
    return kv_cache_format(options.kv_cache_dtype, options.dtype, config.head_dim, options.kv_cache_scales)


def _static_scale_bytes(config: ModelConfig, options: PlanOptions) -> int:
    kv_heads = _rank_sizes(config, options.tensor_parallel_size).kv_heads
    return _kv_format(config, options).static_bytes(config.num_layers, kv_heads)


def _budget(options: PlanOptions, free: int, total: int) -> int:
    if options.device_type == "cuda":
        return max(0, free - int((1 - options.gpu_memory_utilization) * total))
    return free


def _num_kv_blocks(options: PlanOptions, per_token: int, room: int) -> int:
    """As many blocks as memory allows, but never more than all sequences at full length could use."""
    if options.device_type == "cpu":
        room = int(room * CPU_MEMORY_SHARE)
    most = -(-options.max_model_len // options.block_size) * options.max_num_seqs
    return max(0, min(room // (per_token * options.block_size), most, (2**31 - 1) // options.block_size))


def activation_bytes(config: ModelConfig, options: PlanOptions) -> int:
    """Upper bound of what a step of max_num_batched_tokens holds between embedding and final norm."""
    c, tokens, item = config, options.max_num_batched_tokens, options.dtype.itemsize
    part = _rank_sizes(config, options.tensor_parallel_size)
    q_width, kv_width = part.heads * c.head_dim, part.kv_heads * c.head_dim
    # Residual stream, the previous layer's output and its norm live on through both phases.
    stream = 3 * c.hidden_size * item
    attention = (q_width + 2 * kv_width + q_width + c.hidden_size) * item + part.heads * 4  # qkv, out, o_proj; lse
    if options.kv_cache_scales == "calculate":
        # In the first step: k and v as they are kept, mixed keys in fp32, magnitudes.
        attention = max(attention, (q_width + 2 * kv_width) * item + kv_width * (2 * item + 3 * 4 + 1))
    mlp = (3 * part.intermediate + c.hidden_size) * item  # gate and up, their product, down
    if options.device_type == "cuda":
        return tokens * (stream + max(attention, mlp)) + _quantized_bytes(config, options)
    # The CPU's operators are plain torch and round once at the end, so each holds fp32 copies of what it works on.
    norm = 3 * c.hidden_size * 4
    rope = 3 * q_width * 4
    gated = 3 * part.intermediate * 4
    step = tokens * (stream + max(attention + rope, mlp + gated, norm))
    keys, rows = options.max_model_len, min(tokens, _CPU_ATTENTION_ROWS)
    # k and v out of their pages, and in fp32, contiguous for the product; of 8 bits also without and with their scales.
    gathered = 2 * keys * kv_width * (item + 2 * 4)
    if _kv_format(config, options).is_8bit:
        gathered = 2 * keys * kv_width * (1 + 3 * 4)
        step += tokens * kv_width * 5 * 4  # what is written in fp32: as it is, its magnitudes, scaled, clamped, rounded
    if _kv_format(config, options).has_token_scales:  # and in fp8 with 8 scales each, to choose one of them
        step += tokens * kv_width * 8 * 3 * 4
    scores = rows * (keys * (part.heads * 2 * 4 + 3) + q_width * 3 * 4)  # scores twice, mask, grouped q and result
    return step + gathered + scores + max(_cpu_upcast_bytes(config, options), _quantized_bytes(config, options))


def _quantized_bytes(config: ModelConfig, options: PlanOptions) -> int:
    """What a product with a quantized weight holds beside its input and output: on a GPU, x in 8 bits; on a CPU, fp32 and
    integer copies of both."""
    if config.quantization is None:
        return 0
    c, part = config, _rank_sizes(config, options.tensor_parallel_size)
    widest_in = max(c.hidden_size, part.intermediate, part.heads * c.head_dim)
    widest_out = max(2 * part.intermediate, (part.heads + 2 * part.kv_heads) * c.head_dim, c.hidden_size)
    each = widest_in + 4 if options.device_type == "cuda" else 17 * widest_in + 16 * widest_out
    return options.max_num_batched_tokens * each


def _cpu_upcast_bytes(config: ModelConfig, options: PlanOptions) -> int:
    """The CPU multiplies fp16 (and bf16 with a bias) in fp32: a copy of the matrix, its input and its output."""
    if options.dtype is torch.float32 or (options.dtype is torch.bfloat16 and not _has_bias(config)):
        return 0
    c, part = config, _rank_sizes(config, options.tensor_parallel_size)
    widest = max(2 * part.intermediate, (part.heads + 2 * part.kv_heads) * c.head_dim, c.hidden_size)
    layer = (c.hidden_size + options.max_num_batched_tokens) * 2 * widest
    head = (part.vocab + options.num_logits) * c.hidden_size + options.num_logits * part.vocab
    return 4 * max(layer, head)


def _has_bias(config: ModelConfig) -> bool:
    return config.attention_bias or config.attention_out_bias or config.mlp_bias


def sampling_bytes(config: ModelConfig, options: PlanOptions) -> int:
    """Upper bound for logits and the draw: so many rows of the vocabulary."""
    elements = options.num_logits * config.vocab_size
    # As multiplied, in fp32, and the untouched copy that logprobs are taken from.
    logits = options.dtype.itemsize + 4 + 4
    if options.device_type == "cuda":  # CUDA graphs have their own
        logits += options.dtype.itemsize + 4
    if options.tensor_parallel_size > 1:  # rank 0's own part and those of all, before they stand side by side
        logits += 2 * options.dtype.itemsize
    # The CPU ranks the whole vocabulary when top-p asks for it: rows, weights, ranks and indices, fp64 sums.
    draw = 0 if options.device_type == "cuda" else 44
    return elements * (logits + draw) + options.num_logits * config.hidden_size * options.dtype.itemsize


def draft_logits_bytes(config: ModelConfig, options: PlanOptions) -> int:
    """What drafts were drawn from, kept for the verdict on them in fp32: once as drawn, once side by side."""
    if options.speculative is None or not options.speculative.is_probabilistic:
        return 0
    return 2 * options.max_num_seqs * options.speculative.num_speculative_tokens * config.vocab_size * 4


def buffer_bytes(options: PlanOptions) -> int:
    """The step buffer (`_runtime.BatchBuilder`), and on a GPU its pinned twin on the host is not counted."""
    per_seq = 1 if options.speculative is None else 1 + options.speculative.num_speculative_tokens
    tokens = options.max_num_batched_tokens
    seqs = DecodeShapes(options.max_num_seqs, per_seq, tokens).max_num_seqs
    rows = seqs * per_seq
    blocks = -(-options.max_model_len // options.block_size)
    # of a cascade one sequence more is what all share
    fields = [4 * tokens] * 3 + [4 * (seqs + 3), 4 * (seqs + 1)] + [4 * rows] * 5 + [8 * rows] * 2
    fields.append(4 * (seqs + 1) * blocks)
    return sum(-(-nbytes // 16) * 16 for nbytes in fields)


def _type_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
