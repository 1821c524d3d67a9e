"""Where a batch's queries and keys lie, as the attention operators want it, in memory that graph mode keeps."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastattn.integrations.flashinfer.cache import get_seq_lens
from fastattn.ops.checks import check_offsets, values_readable


def longest_run(ends: list[int]) -> int:
    return max((b - a for a, b in pairwise(ends)), default=0)


class Rows:
    """Where each request's queries begin, and the longest run of them.

    In graph mode one request more, without keys, has the rows that a captured call brings and the plan does not use: every
    row of the result is written, and there is no longest run to know.
    """

    def __init__(self, device: torch.device, buffer: Tensor | None) -> None:
        self.device, self.buffer = device, buffer
        self.most = 0  # rows of the first plan, in graph mode
        self.longest = 0
        num_offsets = 0 if buffer is None else buffer.shape[0] + 1
        self.cu_seqlens = torch.zeros(num_offsets, dtype=torch.int32, device=device)

    def plan(self, op: str, qo_indptr: Tensor, batch: int) -> None:
        ends = qo_indptr.tolist()
        if len(ends) != batch + 1:
            raise ValueError(
                f"{op}: qo_indptr has {len(ends)} entries, expected {batch + 1}, as many as the keys' indptr"
            )
        check_offsets(op, "qo_indptr", ends)
        self.longest = longest_run(ends)
        if self.buffer is None:
            self.cu_seqlens = qo_indptr.to(self.device, torch.int32)
            return
        if self.buffer.shape[0] != batch + 1:
            raise ValueError(
                f"{op}: the batch has {batch} requests, expected {self.buffer.shape[0] - 1}, as many as qo_indptr_buf has: "
                "it is fixed with use_cuda_graph"
            )
        self.most = self.most or ends[-1]
        if ends[-1] > self.most:
            raise ValueError(
                f"{op}: qo_indptr[-1] is {ends[-1]}, expected at most {self.most}, as in the first plan: it is fixed with "
                "use_cuda_graph"
            )
        self.buffer.copy_(qo_indptr, non_blocking=True)
        self.cu_seqlens[:-1].copy_(qo_indptr, non_blocking=True)

    def of(self, q: Tensor) -> tuple[Tensor, int]:
        """cu_seqlens_q and max_seqlen_q of a call with these queries."""
        if self.buffer is None:
            return self.cu_seqlens, self.longest
        self.cu_seqlens[-1:].fill_(q.shape[0])
        return self.cu_seqlens, q.shape[0]


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
