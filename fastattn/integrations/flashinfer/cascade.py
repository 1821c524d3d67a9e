"""FlashInfer's `MultiLevelCascadeAttentionWrapper`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn.integrations.flashinfer._common import DType, PagedCache, refuse
from fastattn.integrations.flashinfer.merge import merge_state
from fastattn.integrations.flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper


class MultiLevelCascadeAttentionWrapper:
    """Attention to pages in levels: of a prefix that requests share, and of what each has of its own.

    num_levels: at least 1. float_workspace_buffer, kv_layout, use_cuda_graph and the lists of buffers, one of each a level: as
      in `BatchPrefillWithPagedKVCacheWrapper`.
    """

    def __init__(
        self,
        num_levels: int,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf_arr: list[Tensor] | None = None,
        paged_kv_indptr_buf_arr: list[Tensor] | None = None,
        paged_kv_indices_buf_arr: list[Tensor] | None = None,
        paged_kv_last_page_len_buf_arr: list[Tensor] | None = None,
    ) -> None:
        op = self._op("__init__")
        if num_levels < 1:
            raise ValueError(f"{op}: num_levels is {num_levels}, expected an int ≥ 1")
        self._use_cuda_graph = use_cuda_graph
        if use_cuda_graph:
            given: dict[str, Any] = {
                "qo_indptr_buf_arr": qo_indptr_buf_arr,
                "paged_kv_indptr_buf_arr": paged_kv_indptr_buf_arr,
                "paged_kv_indices_buf_arr": paged_kv_indices_buf_arr,
                "paged_kv_last_page_len_buf_arr": paged_kv_last_page_len_buf_arr,
            }
            _check_lists(op, num_levels, **given)
            buffers = list(zip(*given.values(), strict=True))
        else:
            buffers = [(None,) * 4] * num_levels
        self._levels = [
            BatchPrefillWithPagedKVCacheWrapper(
                float_workspace_buffer, kv_layout, use_cuda_graph,
                qo_indptr_buf=rows, paged_kv_indptr_buf=ends, paged_kv_indices_buf=pages, paged_kv_last_page_len_buf=last,
            )
            for rows, ends, pages, last in buffers
        ]  # fmt: skip

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether plans go into fixed buffers, so that a captured graph serves later ones."""
        return self._use_cuda_graph

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffers: list[Tensor]) -> None:
        """Nothing: the kernels take their workspace from torch."""

    def plan(
        self,
        qo_indptr_arr: list[Tensor],
        paged_kv_indptr_arr: list[Tensor],
        paged_kv_indices_arr: list[Tensor],
        paged_kv_last_page_len: list[Tensor],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
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
    ) -> None:
        """Say what the next calls of `run` are over.

        The lists have a tensor for each level, outermost first, as `BatchPrefillWithPagedKVCacheWrapper.plan` has them: of
        qo_indptr's groups of queries each shares its pages. causal is of the last level. A window_left is a
        NotImplementedError: a query does not know how far the keys of other levels are.
        """
        op = self._op("plan")
        _check_lists(
            op,
            len(self._levels),
            qo_indptr_arr=qo_indptr_arr,
            paged_kv_indptr_arr=paged_kv_indptr_arr,
            paged_kv_indices_arr=paged_kv_indices_arr,
            paged_kv_last_page_len=paged_kv_last_page_len,
        )
        refuse(op, window_left=None if window_left == -1 else window_left + 1)
        for i, level in enumerate(self._levels):
            level.plan(
                qo_indptr_arr[i], paged_kv_indptr_arr[i], paged_kv_indices_arr[i], paged_kv_last_page_len[i],
                num_qo_heads, num_kv_heads, head_dim, page_size, causal=causal and i == len(self._levels) - 1,
                pos_encoding_mode=pos_encoding_mode, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap,
                q_data_type=q_data_type, kv_data_type=kv_data_type,
            )  # fmt: skip

    begin_forward = plan

    def run(self, q: Tensor, paged_kv_cache: PagedCache) -> Tensor:
        """Attend. q: (T, H, D). paged_kv_cache: as in `BatchPrefillWithPagedKVCacheWrapper.run`. Nothing waits for the GPU.

        Returns out (T, H, D).
        """
        first, *rest = self._levels
        state = first.run_return_lse(q, paged_kv_cache)
        for level in rest:
            state = merge_state(*state, *level.run_return_lse(q, paged_kv_cache))
        return state[0]

    forward = run

    def end_forward(self) -> None:
        """Nothing, as in FlashInfer."""

    @staticmethod
    def _op(method: str) -> str:
        return f"flashinfer.MultiLevelCascadeAttentionWrapper.{method}"


def _check_lists(op: str, num_levels: int, **lists: Any) -> None:
    for name, given in lists.items():
        if given is None or len(given) != num_levels:
            found = "None" if given is None else f"a list of {len(given)}"
            raise ValueError(f"{op}: {name} is {found}, expected {num_levels} tensors, one for each level")
