"""FlashInfer's cascade wrapper: what one wrapper over all pages gives."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import flashinfer
from tests.integrations.flashinfer_requests import DIM, HEADS, Requests, close, ints, layouts, make, workspace

PAGE_SIZE, SHARED, OWN, COUNTS = 4, 3, [5, 1, 9], [1, 1, 3]


def pages_of_levels(requests: Requests, shared: int) -> tuple[list[Tensor], ...]:
    """indptr, indices and last_page_len: of the first request's first pages, and of each one's other pages."""
    starts = requests.indptr.tolist()
    own = [requests.indices[a + shared : b] for a, b in pairwise(starts)]
    indptr = [0, *accumulate(len(pages) for pages in own)]
    return (
        [ints(0, shared), ints(*indptr)],
        [requests.indices[:shared], torch.cat(own)],
        [ints(PAGE_SIZE), requests.last_page_len],
    )


def with_one_prefix(dtype: torch.dtype, device: str) -> Requests:
    requests = Requests.make([SHARED * PAGE_SIZE + n for n in OWN], PAGE_SIZE, dtype, device)
    for b in (1, 2):
        start = int(requests.indptr[b])
        requests.indices[start : start + SHARED] = requests.indices[:SHARED]
        for tensors in (requests.keys, requests.values):
            tensors[b][: SHARED * PAGE_SIZE] = tensors[0][: SHARED * PAGE_SIZE]
    return requests


@layouts
@pytest.mark.parametrize("use_cuda_graph", [False, True])
def test_levels(use_cuda_graph: bool, layout: str, device: str) -> None:
    dtype = torch.float16 if device == "cuda" else torch.float32
    requests = with_one_prefix(dtype, device)
    q = make(sum(COUNTS), HEADS[0], DIM, seed=1, dtype=dtype, device=device)
    rows = [ints(0, sum(COUNTS)), ints(0, *accumulate(COUNTS))]
    buffers: tuple[Any, ...] = ()
    if use_cuda_graph:
        buffers = tuple(
            [torch.zeros(n, dtype=torch.int32, device=device) for n in sizes]
            for sizes in ((2, 4), (2, 4), (8, 16), (1, 3))
        )
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace(device), layout, use_cuda_graph, *buffers)
    assert wrapper.is_cuda_graph_enabled is use_cuda_graph
    for options, wanted in (({}, {}), ({"sm_scale": 0.2, "logits_soft_cap": 3.0}, {"scale": 0.2, "softcap": 3.0})):
        pages = [[t.to(device) for t in level] for level in pages_of_levels(requests, SHARED)]
        wrapper.plan([t.to(device) for t in rows], *pages, *HEADS, DIM, PAGE_SIZE, True, q_data_type=dtype, **options)
        expected, _ = requests.expected(q, COUNTS, causal=True, **wanted)
        for form in ("one", "pair"):
            close(wrapper.run(q, requests.given(layout, form)), expected)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"Wrapper\.__init__: num_levels is 0, expected an int ≥ 1"):
        flashinfer.MultiLevelCascadeAttentionWrapper(0, workspace())
    with pytest.raises(ValueError, match="qo_indptr_buf_arr is None, expected 2 tensors, one for each level"):
        flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace(), use_cuda_graph=True)
    requests = with_one_prefix(torch.float32, "cpu")
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace())
    pages, rows = pages_of_levels(requests, SHARED), [ints(0, 5), ints(0, 1, 2, 5)]
    with pytest.raises(ValueError, match=r"Wrapper\.plan: qo_indptr_arr is a list of 1, expected 2 tensors"):
        wrapper.plan(rows[:1], *pages, *HEADS, DIM, PAGE_SIZE)
    with pytest.raises(NotImplementedError, match="window_left"):
        wrapper.plan(rows, *pages, *HEADS, DIM, PAGE_SIZE, window_left=0)
    with pytest.raises(RuntimeError, match="there is no plan yet"):
        wrapper.run(make(5, HEADS[0], DIM), requests.cache)
