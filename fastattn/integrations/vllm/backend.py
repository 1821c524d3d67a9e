"""The classes that vLLM 0.26 asks an attention backend for. It imports this module when the backend is chosen.

vLLM's cache of a layer is (num_blocks, num_kv_heads, block_size, 2 · head_size), keys in the first half of a row and values
in the second. `paged_attention` takes any strides, so that both are views of it, in either of vLLM's memory layouts.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm import _custom_ops as vllm_ops
from vllm import envs
from vllm.config import CUDAGraphMode
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import get_kv_cache_layout

from fastattn.ops import has_cuda_kernels
from fastattn.ops._library import HOW_TO_BUILD
from fastattn.ops.attention import paged_attention
from fastattn.ops.checks import FP8, MAX_HEAD_DIM

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_FP8_NAMES = ("fp8", "fp8_e4m3")
# Memory's order of (num_blocks, num_kv_heads, block_size, 2 · head_size), and of the same behind a dimension of layers.
_ORDERS = {"NHD": ((0, 2, 1, 3), (1, 0, 3, 2, 4)), "HND": ((0, 1, 2, 3), (1, 2, 0, 3, 4))}
# Steps with a run of so many queries have prompts. They are not captured, or with the widest table.
_PROMPT_TOKENS = 64


class FastattnBackend(AttentionBackend):
    """What the backend can do. vLLM asks before it builds a model, and refuses what is not here with the reason."""

    supported_dtypes: ClassVar[list[torch.dtype]] = list(_DTYPES.values())
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", *_DTYPES, *_FP8_NAMES]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # a layer looks it up among vLLM's own names

    @staticmethod
    def get_impl_cls() -> type[FastattnImpl]:
        return FastattnImpl

    @staticmethod
    def get_builder_cls() -> type[FastattnMetadataBuilder]:
        return FastattnMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        # Any size is right. vLLM gives layers with a window the smallest that is named, and pages of one token are slow.
        return [MultipleOf(16)]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        return num_blocks, num_kv_heads, block_size, 2 * head_size

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        return _ORDERS[get_kv_cache_layout()][include_num_layers_dimension]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 8 == 0 and 0 < head_size <= MAX_HEAD_DIM

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True  # VLLM_BATCH_INVARIANT=1; where prompts are not cut by the batch, which the builder sees to

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return capability.major in (8, 9)  # the machine code that is built, without PTX for others

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: Any,
    ) -> str | None:
        """What vLLM adds to its reasons: here also the values and what is allowed."""
        reasons = []
        step = 16 if kv_cache_dtype in _FP8_NAMES else 8
        if head_size % step != 0 or not 0 < head_size <= MAX_HEAD_DIM:
            reasons.append(
                f"head_size is {head_size}, expected a multiple of {step} up to {MAX_HEAD_DIM} with kv_cache_dtype "
                f"{kv_cache_dtype}"
            )
        if dtype not in cls.supported_dtypes:
            reasons.append(f"dtype is {dtype}, expected one of {', '.join(map(str, cls.supported_dtypes))}")
        if kv_cache_dtype is not None and kv_cache_dtype not in cls.supported_kv_cache_dtypes:
            allowed = ", ".join(cls.supported_kv_cache_dtypes)
            reasons.append(f"kv_cache_dtype is {kv_cache_dtype}, expected one of {allowed}")
        elif _DTYPES.get(kv_cache_dtype or "", dtype) != dtype:
            reasons.append(f"kv_cache_dtype is {kv_cache_dtype}, expected auto or fp8 with dtype {dtype}")
        if not cls.supports_compute_capability(device_capability):
            reasons.append(
                f"compute capability is {device_capability.major}.{device_capability.minor}, expected 8.x or 9.0"
            )
        elif not has_cuda_kernels():
            reasons.append(f"its CUDA kernels are not built; {HOW_TO_BUILD}")
        return "fastattn: " + "; ".join(reasons) if reasons else None


@dataclass
class FastattnMetadata(AttentionMetadata):
    """Where the tokens of a step stand, for all layers that share a block table.

    query_start_loc: (B + 1) int32. seq_lens: (B) int32. block_table: (B, max_blocks) int32. slot_mapping: (T) int64.
    """

    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor


class FastattnMetadataBuilder(AttentionMetadataBuilder[FastattnMetadata]):
    """Makes a step's metadata, out of views: the kernels plan on the device, and graphs read the tensors anew."""

    _cudagraph_support = AttentionCGSupport.ALWAYS
    supports_update_block_table = True

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        window = vllm_config.model_config.rswa_window
        if window is not None:
            raise NotImplementedError(f"fastattn: rswa_window is {window}, expected None: prefixes outside a window")
        if envs.VLLM_BATCH_INVARIANT:
            # How many tokens of a prompt come in a step says which kernel takes them, and how its rows lie in tiles.
            for part, option in (
                ("scheduler_config", "enable_chunked_prefill"),
                ("cache_config", "enable_prefix_caching"),
            ):
                if getattr(getattr(vllm_config, part), option):
                    raise NotImplementedError(
                        f"fastattn: {option} is True with VLLM_BATCH_INVARIANT=1, expected False: a prompt's bits depend on "
                        "where it is cut"
                    )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FastattnMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError("fastattn: causal is not True for all sequences, expected causal attention only")
        num_reqs, max_query_len = common.num_reqs, int(common.max_query_len)
        table = common.block_table_tensor[:num_reqs]
        if max_query_len >= _PROMPT_TOKENS:
            # How the keys of prompts are shared out follows from how many there can be, which is known here. Not so
            # where a draft's graph is captured: what is the longest now is not at a later replay.
            table = table[:, : -(-int(common.max_seq_len) // self.kv_cache_spec.block_size)]
        return FastattnMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=max_query_len,
            max_seq_len=common.max_seq_len,
            query_start_loc=common.query_start_loc[: num_reqs + 1],
            seq_lens=common.seq_lens[:num_reqs],
            block_table=table,
            slot_mapping=common.slot_mapping,
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> FastattnMetadata:
        metadata = self.build(0, common_attn_metadata)
        if self.vllm_config.compilation_config.cudagraph_mode.mixed_mode() == CUDAGraphMode.FULL:
            # The graph is replayed for prompts too, and vLLM captures it with one query a sequence.
            metadata.max_query_len = metadata.num_actual_tokens
        return metadata

    def update_block_table(
        self, metadata: FastattnMetadata, blk_table: Tensor, slot_mapping: Tensor
    ) -> FastattnMetadata:
        other = copy.copy(metadata)
        num_reqs, max_blocks = metadata.block_table.shape
        other.block_table, other.slot_mapping = blk_table[:num_reqs, :max_blocks], slot_mapping
        return other


class FastattnImpl(AttentionImpl[FastattnMetadata]):
    """Attention of one layer."""

    supports_dcp = False  # decode context parallelism

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        """scale: of the scores. sliding_window: how many keys a query sees, itself included. sinks: (num_heads)."""
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"fastattn: attn_type is {attn_type}, expected {AttentionType.DECODER.value}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.window_size = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        self.kv_cache_dtype = kv_cache_dtype
        self.softcap = logits_soft_cap or 0.0
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self.batch_invariant = bool(envs.VLLM_BATCH_INVARIANT)
        self._fp32_sinks: Tensor | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Converts the sinks once; after a reload in place, for the graphs that read them."""
        if self.sinks is None:
            return
        if self._fp32_sinks is None:
            self._fp32_sinks = self.sinks.detach().to(torch.float32, copy=True)
        else:
            self._fp32_sinks.copy_(self.sinks.detach())

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Whether `forward` can quantize: then vLLM's compiler leaves that of the projection behind to it (fuse_attn_quant)."""
        return bool(quant_key == kFp8StaticTensorSym)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: FastattnMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query, output: (T, num_heads, head_size); output is written. The step's key and value are in kv_cache already.

        output_scale: of one element, with output in e4m3, of the results divided by it.
        """
        if output_block_scale is not None:
            raise NotImplementedError("fastattn: output_block_scale is given, expected None: out has one scale, in fp8")
        if attn_metadata is None:  # a run that measures memory
            return output.fill_(0)
        num_tokens = attn_metadata.num_actual_tokens
        k_cache, v_cache = self._pages(kv_cache)
        k_scale = v_scale = None
        if self.kv_cache_dtype in _FP8_NAMES:
            k_cache, v_cache = k_cache.view(FP8), v_cache.view(FP8)
            k_scale, v_scale = (scale.expand(self.num_kv_heads) for scale in (layer._k_scale, layer._v_scale))
        paged_attention(
            query[:num_tokens],
            k_cache,
            v_cache,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            attn_metadata.block_table,
            attn_metadata.max_query_len,
            softmax_scale=self.scale,
            window_size=self.window_size,
            softcap=self.softcap,
            alibi_slopes=self.alibi_slopes,
            sinks=self.sinks if self._fp32_sinks is None else self._fp32_sinks,
            k_scale=k_scale,
            v_scale=v_scale,
            batch_invariant=self.batch_invariant,
            out_scale=None if output_scale is None else output_scale.reshape(1),
            out=output[:num_tokens],
        )
        return output

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Writes key and value (T, num_kv_heads, head_size) to their slots, by vLLM's own kernel."""
        k_cache, v_cache = self._pages(kv_cache)
        vllm_ops.reshape_and_cache_flash(
            key, value, k_cache, v_cache, slot_mapping, self.kv_cache_dtype, layer._k_scale, layer._v_scale
        )

    def _pages(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Both (num_blocks, block_size, num_kv_heads, head_size), views."""
        rows = kv_cache.transpose(1, 2)
        return rows[..., : self.head_size], rows[..., self.head_size :]
