"""What the wrappers over pages share: where the pages are, and attention to them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.integrations._common import not_implemented
from fastattn.integrations.flashinfer._common import (
    FP8,
    PagedCache,
    Scale,
    base2,
    caches,
    scale_of,
    scale_of_heads,
    scaled,
    window_of,
)
from fastattn.integrations.flashinfer._plan import Plan, Wrapper
from fastattn.integrations.flashinfer._tables import Pages
from fastattn.ops.attention import paged_attention


class PagedWrapper(Wrapper):
    _pages: Pages

    def _rows_of(self, op: str, q: Tensor) -> tuple[Tensor, int]:
        """cu_seqlens_q, and the most queries of a request."""
        raise NotImplementedError

    @torch.no_grad()
    def _attend(
        self,
        op: str,
        planned: Plan,
        q: Tensor,
        paged_kv_cache: PagedCache,
        q_scale: float | None,
        k_scale: Scale,
        v_scale: Scale,
        sinks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        k, v = caches(op, paged_kv_cache, self._kv_layout)
        planned.check(op, q, k, v)
        if planned.tree_mask is not None and planned.window_left >= 0:
            not_implemented(op, f"window_left is {planned.window_left} with a custom mask, expected -1")
        k_of_heads = v_of_heads = None
        if k.dtype is FP8 and (isinstance(k_scale, Tensor) or isinstance(v_scale, Tensor)):
            # The kernels read them where they are; numbers cost less as factors of the scores and of the result.
            k_of_heads = scale_of_heads(op, "k_scale", k_scale, k)
            v_of_heads = scale_of_heads(op, "v_scale", v_scale, k)
            k_scale = v_scale = None
        cu_seqlens_q, longest = self._rows_of(op, q)
        out, lse = paged_attention(
            q, k, v, cu_seqlens_q, self._pages.seq_lens, self._pages.block_table, longest,
            softmax_scale=scale_of(op, planned.head_dim_qk, planned.sm_scale, q_scale=q_scale, k_scale=k_scale),
            causal=planned.causal or planned.tree_mask is not None, window_size=window_of(op, planned.window_left),
            softcap=planned.softcap, sinks=sinks, tree_mask=planned.tree_mask, k_scale=k_of_heads, v_scale=v_of_heads,
        )  # fmt: skip
        return scaled(out, v_scale), base2(lse)
