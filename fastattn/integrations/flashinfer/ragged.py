"""FlashInfer's `BatchPrefillWithRaggedKVCacheWrapper`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.integrations.flashinfer._common import (
    DType,
    base2,
    check_encoding,
    given,
    refuse,
    scale_of,
    scaled,
    tokens_first,
    window_of,
)
from fastattn.integrations.flashinfer._plan import Plan, Wrapper
from fastattn.integrations.flashinfer._tables import Rows, longest_run
from fastattn.ops.attention import varlen_attention
from fastattn.ops.checks import check_offsets


class BatchPrefillWithRaggedKVCacheWrapper(Wrapper):
    """Attention of packed queries to packed keys.

    use_cuda_graph: as in `BatchPrefillWithPagedKVCacheWrapper`, with the buffers qo_indptr_buf and kv_indptr_buf (B + 1).
    kv_layout: "NHD": keys are (Tk, Hk, D); "HND": (Hk, Tk, D).
    """

    _name = "BatchPrefillWithRaggedKVCacheWrapper"

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        kv_indptr_buf: Tensor | None = None,
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
        rows, self._kv_buffer = None, None
        if use_cuda_graph:
            rows, self._kv_buffer = self._fixed(op, qo_indptr_buf=qo_indptr_buf, kv_indptr_buf=kv_indptr_buf)
        self._rows = Rows(self.device, rows)
        self._cu_seqlens_k = torch.zeros_like(self._rows.cu_seqlens)
        self._longest_k = 0

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
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
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        seq_lens: Tensor | None = None,
        seq_lens_q: Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        v_indptr: Tensor | None = None,
        o_indptr: Tensor | None = None,
    ) -> None:
        """Say what the next calls of `run` are over. It reads both indptrs, and waits for the GPU if they are there.

        qo_indptr, kv_indptr: (B + 1) int32, where each request's queries and keys begin. head_dim_vo: V's, if it is another.
        The rest is as in `BatchPrefillWithPagedKVCacheWrapper.plan`; the lengths are not needed.
        """
        op = self._op("plan")
        refuse(op, custom_mask=custom_mask, packed_custom_mask=packed_custom_mask, prefix_len_ptr=prefix_len_ptr)
        refuse(op, token_pos_in_items_ptr=token_pos_in_items_ptr, token_pos_in_items_len=token_pos_in_items_len)
        refuse(op, max_item_len_ptr=max_item_len_ptr, v_indptr=v_indptr, o_indptr=o_indptr)
        planned = Plan.make(
            op, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, None, q_data_type, kv_data_type, o_data_type, causal,
            pos_encoding_mode, window_left, logits_soft_cap, sm_scale, fixed_split_size, disable_split_kv,
        )  # fmt: skip
        ends = kv_indptr.tolist()
        check_offsets(op, "kv_indptr", ends)
        self._rows.plan(op, qo_indptr, len(ends) - 1)
        self._longest_k = longest_run(ends)
        if self._kv_buffer is None:
            self._cu_seqlens_k = self._int32(kv_indptr)
        else:
            self._kv_buffer.copy_(kv_indptr, non_blocking=True)
            self._cu_seqlens_k[:-1].copy_(kv_indptr, non_blocking=True)
            self._cu_seqlens_k[-1:].fill_(ends[-1])
        self._planned = planned

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        o_scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        kv_cache_sf: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend. Nothing waits for the GPU.

        q: (T, H, D). k: (Tk, Hk, D). v: (Tk, Hk, Dv). out, lse: to write to.

        Returns out (T, H, Dv), with return_lse also lse (T, H) fp32, base 2.
        """
        op = self._op("run")
        refuse(op, args=args or None, o_scale=o_scale, kv_cache_sf=kv_cache_sf)
        found, found_lse = self._attend(op, self._plan_of(op), q, k, v, q_scale, k_scale, v_scale)
        return (given(found, out), given(found_lse, lse)) if return_lse else given(found, out)

    def forward_return_lse(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
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
        return self._attend(op, planned, q, k, v, None, None, None)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Tensor:
        """`forward_return_lse` without the LSE."""
        return self.forward_return_lse(
            q, k, v, causal, pos_encoding_mode, use_fp16_qk_reduction, window_left, logits_soft_cap, sm_scale, rope_scale,
            rope_theta,
        )[0]  # fmt: skip

    @torch.no_grad()
    def _attend(
        self,
        op: str,
        planned: Plan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_scale: float | None,
        k_scale: float | None,
        v_scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        k, v = tokens_first(k, self._kv_layout), tokens_first(v, self._kv_layout)
        planned.check(op, q, k, v)
        cu_seqlens_q, longest_q = self._rows.of(q)
        longest_k = self._longest_k if self._kv_buffer is None else k.shape[0]
        out, lse = varlen_attention(
            q, k, v, cu_seqlens_q, self._cu_seqlens_k, longest_q, longest_k,
            softmax_scale=scale_of(op, planned.head_dim_qk, planned.sm_scale, q_scale=q_scale, k_scale=k_scale),
            causal=planned.causal, window_size=window_of(op, planned.window_left), softcap=planned.softcap,
        )  # fmt: skip
        return scaled(out, v_scale), base2(lse)
