"""What the batch wrappers keep between plan and run: the options of a plan, lengths, and pages in a dense table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from fastattn.integrations._common import not_implemented
from fastattn.integrations.flashinfer._common import (
    DType,
    check_encoding,
    check_layout,
    dtype_of,
    refuse,
    softcap_of,
    window_of,
)
from fastattn.integrations.flashinfer.cache import get_seq_lens
from fastattn.ops.checks import values_readable


@dataclass(frozen=True)
class Plan:
    """What a plan says of every call until the next one."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    page_size: int | None
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    causal: bool
    window_left: int
    softcap: float
    sm_scale: float | None

    @staticmethod
    def make(
        op: str,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None,
        page_size: int | None,
        q_data_type: DType,
        kv_data_type: DType | None,
        o_data_type: DType | None,
        causal: bool,
        pos_encoding_mode: str,
        window_left: int,
        logits_soft_cap: float | None,
        sm_scale: float | None,
        fixed_split_size: int | None,
        disable_split_kv: bool,
    ) -> Plan:
        check_encoding(op, pos_encoding_mode)
        window_of(op, window_left)
        # Both promise that a row does not depend on its batch, which our kernels do not.
        refuse(op, fixed_split_size=fixed_split_size, disable_split_kv=disable_split_kv)
        q_dtype = dtype_of(op, "q_data_type", q_data_type)
        for name, dtype in (("kv_data_type", kv_data_type), ("o_data_type", o_data_type)):
            if dtype is not None and dtype_of(op, name, dtype) != q_dtype:
                not_implemented(op, f"{name} is {dtype}, expected q_data_type, {q_dtype}")
        if page_size is not None and page_size < 1:
            raise ValueError(f"{op}: page_size is {page_size}, expected an int ≥ 1")
        return Plan(
            num_qo_heads, num_kv_heads, head_dim_qk, head_dim_qk if head_dim_vo is None else head_dim_vo, page_size, q_dtype,
            q_dtype, causal, window_left, softcap_of(op, logits_soft_cap), sm_scale,
        )  # fmt: skip

    def check(self, op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
        """That a call's tensors, k and v with tokens before heads, are those that were planned for."""
        heads, dim, dim_v = self.num_kv_heads, self.head_dim_qk, self.head_dim_vo
        planned = (("q", q, (self.num_qo_heads, dim)), ("k", k, (heads, dim)), ("v", v, (heads, dim_v)))
        for name, t, shape in planned:
            if t.shape[-2:] != shape:
                raise ValueError(
                    f"{op}: {name} has shape {tuple(t.shape)}, expected heads and head dim {shape}, as planned"
                )
            if t.dtype != self.q_dtype:
                raise ValueError(
                    f"{op}: {name} is {t.dtype}, expected {self.q_dtype}, as planned: give plan q_data_type={t.dtype}"
                )
        if self.page_size is not None and k.shape[1] != self.page_size:
            raise ValueError(
                f"{op}: paged_kv_cache has pages of {k.shape[1]} tokens, expected page_size {self.page_size}, as planned"
            )

    def with_options(self, op: str, **options: bool | float | None) -> Plan:
        """What the old `forward` says in place of the plan."""
        if "logits_soft_cap" in options:
            options["softcap"] = softcap_of(op, options.pop("logits_soft_cap"))
        return replace(self, **options)  # type: ignore[arg-type]


class Wrapper:
    """What all wrappers have: a device, a layout, the last plan."""

    _name = ""

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str, use_cuda_graph: bool) -> None:
        check_layout(self._op("__init__"), kv_layout)
        self.device = float_workspace_buffer.device
        self._kv_layout = kv_layout
        self._use_cuda_graph = use_cuda_graph
        self._planned: Plan | None = None

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether plans go into fixed buffers, so that a captured graph serves later ones."""
        return self._use_cuda_graph

    def reset_workspace_buffer(
        self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor | None = None
    ) -> None:
        """Nothing: the kernels take their workspace from torch."""

    def end_forward(self) -> None:
        """Nothing, as in FlashInfer."""

    def _op(self, method: str) -> str:
        return f"flashinfer.{self._name}.{method}"

    def _plan_of(self, op: str) -> Plan:
        if self._planned is None:
            raise RuntimeError(f"{op}: there is no plan yet, expected a call of plan before it")
        return self._planned

    def _fixed(self, op: str, **buffers: Tensor | None) -> list[Tensor]:
        """The buffers of graph mode, all of which the caller brings."""
        for name, buffer in buffers.items():
            if buffer is None:
                raise ValueError(f"{op}: {name} is None, expected an int32 tensor, as use_cuda_graph is True")
        return [buffer for buffer in buffers.values() if buffer is not None]

    def _int32(self, t: Tensor) -> Tensor:
        return t.to(self.device, torch.int32)


def longest_run(ends: list[int]) -> int:
    return max((b - a for a, b in pairwise(ends)), default=0)


class Pages:
    """Lengths (B) and a dense block table (B, max_blocks) out of indptr, indices and last_page_len.

    In graph mode both keep their memory. The table is then as wide as one request could be long, which is all of the indices
    buffer; or as block_tables of the first plan. `extra` requests without keys follow those of the batch.
    """

    def __init__(self, device: torch.device, buffers: list[Tensor] | None = None, extra: int = 0) -> None:
        self.device = device
        self.buffers = buffers  # indptr, indices, last_page_len
        self.extra = extra
        self.seq_lens = torch.empty(0, dtype=torch.int32, device=device)
        self.block_table = torch.empty((0, 0), dtype=torch.int32, device=device)

    def plan(
        self,
        op: str,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        page_size: int,
        block_tables: Tensor | None,
        seq_lens: Tensor | None,
    ) -> None:
        ends = indptr.tolist()  # FlashInfer's plan reads it too; it is on the CPU often
        batch = last_page_len.shape[0]
        _check_pages(op, ends, indices, last_page_len, page_size)
        listed = [indptr, indices[: ends[-1]], last_page_len]
        if self.buffers is not None:
            self._check_buffers(op, batch, ends[-1])
            listed = [
                buffer[: source.shape[0]].copy_(source, non_blocking=True)
                for buffer, source in zip(self.buffers, listed, strict=True)
            ]
        indptr, indices, last_page_len = (t.to(self.device, torch.int32) for t in listed)
        if seq_lens is None:
            seq_lens = get_seq_lens(indptr, last_page_len, page_size).masked_fill(indptr.diff() == 0, 0)
        longest = longest_run(ends)
        self._make_room(op, batch, longest, block_tables)
        self.seq_lens[:batch] = seq_lens.flatten()
        if block_tables is not None:
            self.block_table[:batch] = block_tables
        else:
            page = torch.arange(ends[-1], dtype=torch.int32, device=self.device)
            request = torch.searchsorted(indptr[1:].contiguous(), page, right=True)
            self.block_table[request, (page - indptr[request]).long()] = indices

    def _check_buffers(self, op: str, batch: int, num_pages: int) -> None:
        assert self.buffers is not None
        _, indices, last_page_len = self.buffers
        if batch != last_page_len.shape[0]:
            raise ValueError(
                f"{op}: the batch has {batch} requests, expected {last_page_len.shape[0]}, as many as the buffers have: it is "
                "fixed with use_cuda_graph"
            )
        if num_pages > indices.shape[0]:
            raise ValueError(
                f"{op}: there are {num_pages} indices, expected at most {indices.shape[0]}, the size of the indices buffer"
            )

    def _make_room(self, op: str, batch: int, longest: int, block_tables: Tensor | None) -> None:
        rows = batch + self.extra
        width = longest if block_tables is None else block_tables.shape[1]
        if self.buffers is None:
            self.seq_lens = torch.zeros(rows, dtype=torch.int32, device=self.device)
            self.block_table = torch.zeros((rows, width), dtype=torch.int32, device=self.device)
        elif self.block_table.numel() == 0:
            widest = self.buffers[1].shape[0] if block_tables is None else width
            self.seq_lens = torch.zeros(rows, dtype=torch.int32, device=self.device)
            self.block_table = torch.zeros((rows, widest), dtype=torch.int32, device=self.device)
        elif width > self.block_table.shape[1] or (block_tables is not None and width != self.block_table.shape[1]):
            raise ValueError(
                f"{op}: a request has {width} pages, expected at most {self.block_table.shape[1]}, the width of the first "
                "plan's block table: it is fixed with use_cuda_graph"
            )


def _check_pages(op: str, ends: list[int], indices: Tensor, last_page_len: Tensor, page_size: int) -> None:
    if len(ends) != last_page_len.shape[0] + 1:
        raise ValueError(
            f"{op}: indptr has {len(ends)} entries and last_page_len {last_page_len.shape[0]}, expected B + 1 and B"
        )
    if ends[0] != 0 or ends != sorted(ends) or ends[-1] > indices.shape[0]:
        raise ValueError(
            f"{op}: indptr is {ends}, expected it ascending from 0 to at most {indices.shape[0]}, of indices"
        )
    if not values_readable(last_page_len):
        return
    for b, filled in enumerate(last_page_len.tolist()):
        if ends[b + 1] > ends[b] and not 1 <= filled <= page_size:
            raise ValueError(
                f"{op}: last_page_len[{b}] is {filled}, expected 1 ≤ last_page_len ≤ page_size {page_size}"
            )
