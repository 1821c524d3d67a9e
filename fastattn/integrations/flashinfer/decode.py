"""FlashInfer's `BatchDecodeWithPagedKVCacheWrapper`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn.integrations._common import offsets
from fastattn.integrations.flashinfer._common import (
    DType,
    PagedCache,
    Scale,
    check_encoding,
    given,
    refuse,
)
from fastattn.integrations.flashinfer._paged import PagedWrapper
from fastattn.integrations.flashinfer._plan import Plan
from fastattn.integrations.flashinfer._tables import Pages


class BatchDecodeWithPagedKVCacheWrapper(PagedWrapper):
    """Attention of the newest token of each request, or of its q_len_per_req newest, to the request's pages.

    float_workspace_buffer: says the device, and is not needed else. kv_layout: "NHD" or "HND", of the cache.
    use_cuda_graph: plans go into the three buffers and others that stay where they are, so that a graph captured around
      `run` serves every later plan; they also fix the batch. The buffers are paged_kv_indptr_buffer (B + 1),
      paged_kv_indices_buffer (the most pages of a batch) and paged_kv_last_page_len_buffer (B), int32.
    use_tensor_cores and backend change nothing.
    """

    _name = "BatchDecodeWithPagedKVCacheWrapper"

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph)
        op = self._op("__init__")
        refuse(op, jit_args=jit_args)
        self.use_tensor_cores = use_tensor_cores
        buffers = None
        if use_cuda_graph:
            buffers = self._fixed(
                op,
                paged_kv_indptr_buffer=paged_kv_indptr_buffer,
                paged_kv_indices_buffer=paged_kv_indices_buffer,
                paged_kv_last_page_len_buffer=paged_kv_last_page_len_buffer,
            )
        self._pages = Pages(self.device, buffers)
        self._cu_seqlens_q = offsets(0, 1, self.device)
        self._q_len = 0

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: DType | None = "float16",
        kv_data_type: DType | None = None,
        o_data_type: DType | None = None,
        data_type: DType | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: Tensor | None = None,
        seq_lens: Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
        window_right: int = 0,
    ) -> None:
        """Say what the next calls of `run` are over. It reads indptr, and waits for the GPU if that is there.

        indptr: (B + 1) int32, where the pages of each request begin in indices, int32. last_page_len: (B) int32, keys in the
          last page, 1 to page_size.
        window_left: how many keys before its own a query sees, -1 is all. logits_soft_cap: `cap * tanh(score / cap)`, None
          or 0 is off. sm_scale: 1/√head_dim if None.
        q_data_type, and the others, which must be the same: a torch.dtype or its name. kv_data_type may also be
          torch.float8_e4m3fn, with head_dim a multiple of 16.
        block_tables: (B, max_blocks) int32, in place of indices; with use_cuda_graph its width is fixed by the first plan,
          and the table takes less memory than without, which is B times the indices buffer.
        seq_lens: (B) int32, in place of the lengths that indptr and last_page_len give.
        q_len_per_req: queries of each request; they see each other causally.
        """
        op = self._op("plan")
        refuse(op, window_right=window_right)
        if q_len_per_req < 1:
            raise ValueError(f"{op}: q_len_per_req is {q_len_per_req}, expected an int ≥ 1")
        q_dtype, kv_dtype = q_data_type or data_type or "float16", kv_data_type or data_type
        planned = Plan.make(
            op, num_qo_heads, num_kv_heads, head_dim, None, page_size, q_dtype, kv_dtype, o_data_type, True,
            pos_encoding_mode, window_left, logits_soft_cap, sm_scale, fixed_split_size, disable_split_kv,
        )  # fmt: skip
        frozen = self._use_cuda_graph and self._planned is not None
        if frozen and q_len_per_req != self._q_len:
            raise ValueError(
                f"{op}: q_len_per_req is {q_len_per_req}, expected {self._q_len}: it is fixed with use_cuda_graph"
            )
        self._pages.plan(op, indptr, indices, last_page_len, page_size, block_tables, seq_lens)
        if not frozen:
            self._cu_seqlens_q = offsets(last_page_len.shape[0], q_len_per_req, self.device)
        self._planned, self._q_len = planned, q_len_per_req

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
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend. Nothing waits for the GPU.

        q: (B, H, D), or (B * q_len_per_req, H, D).
        paged_kv_cache: (pages, 2, page_size, Hk, D), for kv_layout "HND" (pages, 2, Hk, page_size, D), or a tuple (k, v)
          without the 2.
        q_scale, k_scale: factors of the scores. v_scale: one of the result. With a cache in float8_e4m3fn k_scale and v_scale
          are what its numbers are multiplied by, and may be tensors of one number or (Hk) too. out, lse: to write to.
        window_left: in place of the plan's. sinks: (H), a logit more in the sum of each row's softmax; the LSE has it too.

        Returns out like q, with return_lse also lse (B, H) fp32, base 2.
        """
        op = self._op("run")
        planned = self._plan_of(op)
        refuse(op, args=args or None, skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor)
        refuse(op, kv_cache_sf=kv_cache_sf)
        if q_len_per_req not in (None, self._q_len):
            raise ValueError(f"{op}: q_len_per_req is {q_len_per_req}, expected {self._q_len}, as planned")
        if window_left is not None:
            planned = planned.with_options(op, window_left=window_left)
        found, found_lse = self._attend(op, planned, q, paged_kv_cache, q_scale, k_scale, v_scale, sinks)
        return (given(found, out), given(found_lse, lse)) if return_lse else given(found, out)

    def forward(
        self,
        q: Tensor,
        paged_kv_cache: PagedCache,
        pos_encoding_mode: str = "NONE",
        q_scale: float | None = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Tensor:
        """FlashInfer's old `run`: options stand here and not in the plan, whose own do not count."""
        return self._forward(
            q, paged_kv_cache, pos_encoding_mode, q_scale, k_scale, v_scale, window_left, logits_soft_cap, sm_scale
        )[0]

    def forward_return_lse(
        self,
        q: Tensor,
        paged_kv_cache: PagedCache,
        pos_encoding_mode: str = "NONE",
        q_scale: float | None = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`forward` with the LSE."""
        return self._forward(
            q, paged_kv_cache, pos_encoding_mode, q_scale, k_scale, v_scale, window_left, logits_soft_cap, sm_scale
        )

    def _forward(
        self,
        q: Tensor,
        paged_kv_cache: PagedCache,
        pos_encoding_mode: str,
        q_scale: float | None,
        k_scale: Scale,
        v_scale: Scale,
        window_left: int,
        logits_soft_cap: float | None,
        sm_scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        op = self._op("forward")
        check_encoding(op, pos_encoding_mode)
        planned = self._plan_of(op).with_options(
            op, window_left=window_left, logits_soft_cap=logits_soft_cap, sm_scale=sm_scale
        )
        return self._attend(op, planned, q, paged_kv_cache, q_scale, k_scale, v_scale, None)

    def _rows_of(self, op: str, q: Tensor) -> tuple[Tensor, int]:
        num_rows = self._pages.seq_lens.shape[0] * self._q_len
        if q.dim() != 3 or q.shape[0] != num_rows:
            raise ValueError(f"{op}: q has shape {tuple(q.shape)}, expected ({num_rows}, H, D), as planned")
        return self._cu_seqlens_q, self._q_len


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """`BatchDecodeWithPagedKVCacheWrapper` with use_cuda_graph and its buffers."""

    def __init__(
        self,
        workspace_buffer: Tensor,
        indptr_buffer: Tensor,
        indices_buffer: Tensor,
        last_page_len_buffer: Tensor,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
    ) -> None:
        super().__init__(
            workspace_buffer, kv_layout, True, use_tensor_cores, indptr_buffer, indices_buffer, last_page_len_buffer
        )
