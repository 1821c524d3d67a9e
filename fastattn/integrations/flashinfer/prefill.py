"""FlashInfer's `BatchPrefillWithPagedKVCacheWrapper`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from fastattn.integrations._common import not_implemented
from fastattn.integrations.flashinfer._common import (
    DType,
    PagedCache,
    Scale,
    check_encoding,
    given,
    refuse,
)
from fastattn.integrations.flashinfer._masks import tree_mask
from fastattn.integrations.flashinfer._paged import PagedWrapper
from fastattn.integrations.flashinfer._plan import Plan
from fastattn.integrations.flashinfer._tables import Pages, Rows


class BatchPrefillWithPagedKVCacheWrapper(PagedWrapper):
    """Attention of some queries of each request to the request's pages.

    float_workspace_buffer: says the device, and is not needed else. kv_layout: "NHD" or "HND", of the cache.
    use_cuda_graph: plans go into the four buffers and others that stay where they are, so that a graph captured around
      `run` serves every later plan of as many requests and at most as many queries as the first. The buffers are
      qo_indptr_buf and paged_kv_indptr_buf (B + 1), paged_kv_indices_buf (the most pages of a batch) and
      paged_kv_last_page_len_buf (B), int32.
    backend changes nothing. jit_args, and custom masks with use_cuda_graph, are NotImplementedErrors.
    """

    _name = "BatchPrefillWithPagedKVCacheWrapper"

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph)
        op = self._op("__init__")
        refuse(op, custom_mask_buf=custom_mask_buf, mask_indptr_buf=mask_indptr_buf)
        refuse(op, jit_args=jit_args, jit_kwargs=jit_kwargs)
        rows, buffers = None, None
        if use_cuda_graph:
            rows, *buffers = self._fixed(
                op,
                qo_indptr_buf=qo_indptr_buf,
                paged_kv_indptr_buf=paged_kv_indptr_buf,
                paged_kv_indices_buf=paged_kv_indices_buf,
                paged_kv_last_page_len_buf=paged_kv_last_page_len_buf,
            )
        self._rows = Rows(self.device, rows)
        self._pages = Pages(self.device, buffers, extra=int(use_cuda_graph))

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: DType = "float16",
        kv_data_type: DType | None = None,
        o_data_type: DType | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: Tensor | None = None,
        token_pos_in_items_ptr: Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Tensor | None = None,
        seq_lens: Tensor | None = None,
        seq_lens_q: Tensor | None = None,
        block_tables: Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        """Say what the next calls of `run` are over. It reads both indptrs, and waits for the GPU if they are there.

        qo_indptr: (B + 1) int32, where each request's queries begin. causal: aligned bottom-right.
        custom_mask, packed_custom_mask: in FlashInfer's forms, instead of causal; read here. Each request's must be a tree
          of guesses, up to 64 queries that see all keys before theirs and of these their ancestors, or a chain.
        The pages, window_left and the rest are as in `BatchDecodeWithPagedKVCacheWrapper.plan`. use_fp16_qk_reduction
        (products are summed in fp32), seq_lens_q, max_token_per_sequence and max_sequence_kv change nothing.
        """
        op = self._op("plan")
        masks = {"custom_mask": custom_mask, "packed_custom_mask": packed_custom_mask}
        if self._use_cuda_graph:
            refuse(op, **masks)
        refuse(op, prefix_len_ptr=prefix_len_ptr)
        refuse(op, token_pos_in_items_ptr=token_pos_in_items_ptr, token_pos_in_items_len=token_pos_in_items_len)
        refuse(op, max_item_len_ptr=max_item_len_ptr)
        if head_dim_vo not in (None, head_dim_qk):
            not_implemented(op, f"head_dim_vo is {head_dim_vo}, expected head_dim_qk, {head_dim_qk}, with pages")
        planned = Plan.make(
            op, num_qo_heads, num_kv_heads, head_dim_qk, None, page_size, q_data_type, kv_data_type, o_data_type, causal,
            pos_encoding_mode, window_left, logits_soft_cap, sm_scale, fixed_split_size, disable_split_kv,
        )  # fmt: skip
        self._rows.plan(op, qo_indptr, paged_kv_last_page_len.shape[0])
        self._pages.plan(
            op, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size, block_tables, seq_lens
        )
        if any(mask is not None for mask in masks.values()):
            words = tree_mask(op, **masks, starts=qo_indptr.tolist(), key_lengths=self._pages.seq_lens.tolist())
            planned = replace(planned, tree_mask=words.to(self.device))
        self._planned = planned

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        paged_kv_cache: PagedCache,
        *args: Any,
        q_scale: float | None = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        kv_cache_sf: Any = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend. Nothing waits for the GPU.

        q: (T, H, D); with use_cuda_graph it may have more rows than the plan says, which give 0 and −∞.
        The rest is as in `BatchDecodeWithPagedKVCacheWrapper.run`.

        Returns out (T, H, D), with return_lse also lse (T, H) fp32, base 2.
        """
        op = self._op("run")
        planned = self._plan_of(op)
        refuse(op, args=args or None, kv_cache_sf=kv_cache_sf, use_fp16_softmax=use_fp16_softmax)
        refuse(op, skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor)
        refuse(op, uses_spcompress=uses_spcompress)
        if window_left is not None:
            planned = planned.with_options(op, window_left=window_left)
        found, found_lse = self._attend(op, planned, q, paged_kv_cache, q_scale, k_scale, v_scale, sinks)
        return (given(found, out), given(found_lse, lse)) if return_lse else given(found, out)

    def forward_return_lse(
        self,
        q: Tensor,
        paged_kv_cache: PagedCache,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: Scale = None,
        v_scale: Scale = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """FlashInfer's old `run_return_lse`: options stand here and not in the plan, whose own do not count."""
        op = self._op("forward")
        check_encoding(op, pos_encoding_mode)
        planned = self._plan_of(op).with_options(
            op, causal=causal, window_left=window_left, logits_soft_cap=logits_soft_cap, sm_scale=sm_scale
        )
        return self._attend(op, planned, q, paged_kv_cache, None, k_scale, v_scale, None)

    def forward(
        self,
        q: Tensor,
        paged_kv_cache: PagedCache,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: Scale = None,
        v_scale: Scale = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Tensor:
        """`forward_return_lse` without the LSE."""
        return self.forward_return_lse(
            q, paged_kv_cache, causal, pos_encoding_mode, use_fp16_qk_reduction, k_scale, v_scale, window_left,
            logits_soft_cap, sm_scale, rope_scale, rope_theta,
        )[0]  # fmt: skip

    def _rows_of(self, op: str, q: Tensor) -> tuple[Tensor, int]:
        return self._rows.of(q)
