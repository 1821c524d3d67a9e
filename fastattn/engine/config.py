"""How an engine is set up; frozen once it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastattn.speculative.config import SpeculativeConfig

Policy = Literal["fcfs", "priority", "fair"]


@dataclass(frozen=True)
class EngineConfig:
    """max_model_len: longest prompt + output. max_num_seqs: most sequences in a step. max_num_batched_tokens: most
    tokens in a step, so also the largest prefill chunk. block_size: tokens a KV block, a power of two from 8 to 256.
    num_kv_blocks: blocks in the pool. num_host_kv_blocks: blocks in host memory that evicted ones are copied to, and come back
    from; 0 is off. kv_cache_dtype: "auto", the model's; "fp8" (e4m3) or "int8", 8 bits with a scale
    for each token's head (vLLM's "fp8_e4m3", "fp8_per_token_head" and "int8_per_token_head" are the same).
    kv_cache_scales: "dynamic", of each token's head; or static, of each KV head: "checkpoint", what the model's files have;
    "calculate", calibrated on the first step's tokens and fixed then; or a .safetensors file with tensors as in a checkpoint.
    enable_chunked_prefill: a prompt may be computed over several steps. policy: order of waiting requests: by arrival
    ("fcfs"), by priority, or "fair" to tenants, by what each was served. max_waiting_steps: after so many steps a
    request goes before all priorities. max_num_waiting: longer queues refuse new requests. seed: where requests without
    a seed get theirs from. use_cuda_graphs: replay decode steps as graphs (CUDA only).
    async_scheduling: a step is scheduled and queued while the one before it runs. debug_checks: verify the KV
    bookkeeping after each step. batch_invariant: a request's tokens and log-probabilities are the same bits whatever else is
    computed with it, and however. disable_cascade_attn: what the sequences of a decode step begin with (a system prompt) is read
    for each of them, and not once for all where that is faster. speculative: guess tokens and verify them, several a step; None is off.
    """

    max_model_len: int
    num_kv_blocks: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    kv_cache_dtype: str = "auto"
    kv_cache_scales: str = "dynamic"
    num_host_kv_blocks: int = 0
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    policy: Policy = "fcfs"
    max_waiting_steps: int = 1000
    max_num_waiting: int = 100_000
    seed: int = 0
    use_cuda_graphs: bool = True
    async_scheduling: bool = False
    debug_checks: bool = False
    batch_invariant: bool = False
    disable_cascade_attn: bool = False
    speculative: SpeculativeConfig | None = None

    def __post_init__(self) -> None:
        for name in (
            "max_model_len",
            "num_kv_blocks",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_num_waiting",
            "max_waiting_steps",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
                raise ValueError(f"EngineConfig: {name} is {value!r}, allowed is an integer from 1 to 2**31 - 1")
        host = self.num_host_kv_blocks
        if not isinstance(host, int) or isinstance(host, bool) or not 0 <= host < 2**31:
            raise ValueError(f"EngineConfig: num_host_kv_blocks is {host!r}, allowed is an integer from 0 to 2**31 - 1")
        if host > 0 and not self.enable_prefix_caching:
            raise ValueError(
                f"EngineConfig: num_host_kv_blocks is {host} without enable_prefix_caching, allowed is 0: it is the prefix cache's"
            )
        if self.speculative is not None and not isinstance(self.speculative, SpeculativeConfig):
            raise TypeError(
                f"EngineConfig: speculative is a {type(self.speculative).__name__}, expected SpeculativeConfig or None"
            )
        if self.async_scheduling and self.speculative is not None:
            raise ValueError("EngineConfig: async_scheduling is True, allowed is False with speculative decoding")
        if self.batch_invariant and self.speculative is not None:
            raise ValueError("EngineConfig: batch_invariant is True, allowed is False with speculative decoding")
        if self.batch_invariant and self.kv_cache_scales == "calculate":
            raise ValueError(
                "EngineConfig: batch_invariant is True with kv_cache_scales 'calculate', allowed are scales that do not follow from "
                "the first step's tokens"
            )
        if self.block_size not in (8, 16, 32, 64, 128, 256):
            raise ValueError(f"EngineConfig: block_size is {self.block_size!r}, allowed are 8, 16, 32, 64, 128 and 256")
        if self.policy not in ("fcfs", "priority", "fair"):
            raise ValueError(f"EngineConfig: policy is {self.policy!r}, allowed are 'fcfs', 'priority' and 'fair'")
        if self.num_kv_blocks * self.block_size >= 2**31:
            raise ValueError(
                f"EngineConfig: num_kv_blocks * block_size is {self.num_kv_blocks * self.block_size}, allowed is below 2**31"
            )
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise ValueError(
                f"EngineConfig: max_num_batched_tokens is {self.max_num_batched_tokens}, but without chunked prefill "
                f"a whole prompt must fit a step: allowed is at least max_model_len = {self.max_model_len}"
            )

    @property
    def max_logits_per_seq(self) -> int:
        """Rows of logits that a sequence may want in one step: after its last token, and after each draft."""
        return 1 if self.speculative is None else 1 + self.speculative.num_speculative_tokens

    @property
    def max_blocks_per_seq(self) -> int:
        return -(-self.max_model_len // self.block_size)
