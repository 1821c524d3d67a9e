"""fastattn.flashinfer: attention to pages, ragged and single, planned, captured and not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastattn.flashinfer as flashinfer
from tests.integrations.flashinfer_requests import (
    DIM,
    HEADS,
    LENGTHS,
    Requests,
    close,
    dtypes,
    ints,
    layouts,
    make,
    skip_fp32_on_gpu,
    workspace,
)
from tests.integrations.reference import attention


@dtypes
@layouts
@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
def test_decode(layout: str, page_size: int, dtype: torch.dtype, device: str) -> None:
    skip_fp32_on_gpu(device, dtype)
    requests = Requests.make(LENGTHS, page_size, dtype, device)
    q = make(5, HEADS[0], DIM, seed=1, dtype=dtype, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(device), layout)
    wrapper.plan(requests.indptr, requests.indices, requests.last_page_len, *HEADS, DIM, page_size, q_data_type=dtype)
    expected, expected_lse = requests.expected(q, [1] * 5)
    for form in ("one", "pair"):
        out, lse = wrapper.run_return_lse(q, requests.given(layout, form))
        assert out.dtype == dtype and lse.dtype == torch.float32 and lse.shape == (5, HEADS[0])
        close(out, expected)
        close(lse, expected_lse, dtype)
    assert (lse[2] == -math.inf).all() and (out[2] == 0).all()
    kept, kept_lse = torch.empty_like(out), torch.empty_like(lse)
    again, _ = wrapper.run(q, requests.given(layout, "one"), out=kept, lse=kept_lse, return_lse=True)
    assert again is kept and torch.equal(kept, out) and torch.equal(kept_lse, lse)


@pytest.mark.parametrize("heads", [(4, 4), (5, 1), (14, 2)])
@pytest.mark.parametrize(
    "options",
    [{"window_left": 3}, {"logits_soft_cap": 2.0}, {"sm_scale": 0.3}, {"window_left": 0, "logits_soft_cap": 5.0}],
    ids=str,
)
def test_decode_options_and_group_sizes(heads: tuple[int, int], options: dict[str, Any], device: str) -> None:
    dtype = torch.bfloat16
    requests = Requests.make(LENGTHS, 4, dtype, device, heads[1])
    q = make(5, heads[0], DIM, seed=1, dtype=dtype, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(device))
    pages = (requests.indptr, requests.indices, requests.last_page_len, *heads, DIM, 4)
    wrapper.begin_forward(*pages, q_data_type="bfloat16", **options)
    names = {"logits_soft_cap": "softcap", "sm_scale": "scale"}
    expected = {names[n]: value for n, value in options.items() if n in names}
    wanted, wanted_lse = requests.expected(
        q, [1] * 5, causal=True, window=(options.get("window_left", -1), -1), **expected
    )
    out, lse = wrapper.run_return_lse(q, requests.cache)
    close(out, wanted)
    close(lse, wanted_lse, dtype)
    wrapper.begin_forward(*pages, q_data_type=dtype)  # forward takes its options itself
    old, old_lse = wrapper.forward_return_lse(q, requests.cache, **options)
    assert torch.equal(old, out) and torch.equal(old_lse, lse)
    assert torch.equal(wrapper.forward(q, requests.cache, **options), out)
    wrapper.end_forward()
    if "window_left" in options and len(options) == 1:
        assert torch.equal(wrapper.run(q, requests.cache, window_left=options["window_left"]), out)


def test_decode_of_several_tokens_scales_and_sinks(device: str) -> None:
    dtype = torch.bfloat16
    requests = Requests.make([9, 37, 64], 16, dtype, device)
    q, sinks = make(9, HEADS[0], DIM, seed=1, dtype=dtype, device=device), make(HEADS[0], seed=3, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(device))
    pages = (requests.indptr, requests.indices, requests.last_page_len)
    wrapper.plan(*pages, *HEADS, DIM, 16, q_data_type=None, data_type=dtype, q_len_per_req=3)
    expected, expected_lse = requests.expected(q, [3] * 3, causal=True, scale=0.5 * 2 / math.sqrt(DIM), sinks=sinks)
    out, lse = wrapper.run(
        q, requests.cache, q_scale=0.5, k_scale=2.0, v_scale=3.0, sinks=sinks, return_lse=True, q_len_per_req=3
    )
    close(out, expected * 3)
    close(lse, expected_lse, dtype)
    table = torch.full((3, 4), 2**20, dtype=torch.int32)
    for b in range(3):
        own = requests.indices[requests.indptr[b] : requests.indptr[b + 1]]
        table[b, : own.shape[0]] = own
    lengths = ints(9, 37, 64)
    nothing = torch.zeros_like(requests.indices)
    wrapper.plan(
        pages[0], nothing, pages[2], *HEADS, DIM, 16, q_data_type=dtype, q_len_per_req=3, block_tables=table,
        seq_lens=lengths,
    )  # fmt: skip
    close(wrapper.run(q, requests.cache, sinks=sinks), requests.expected(q, [3] * 3, causal=True, sinks=sinks)[0])


@dtypes
@layouts
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_paged_prefill(causal: bool, page_size: int, layout: str, dtype: torch.dtype, device: str) -> None:
    skip_fp32_on_gpu(device, dtype)
    requests = Requests.make(LENGTHS, page_size, dtype, device)
    counts = [1, 30, 2, 0, 5]
    q = make(38, HEADS[0], DIM, seed=1, dtype=dtype, device=device)
    indptr = torch.tensor([0, *counts]).cumsum(0).int().to(device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(device), layout)
    arguments = (indptr, requests.indptr.to(device), requests.indices.to(device), requests.last_page_len.to(device))
    for options, wanted in (
        ({}, {}),
        (
            {"window_left": 4, "logits_soft_cap": 3.0, "sm_scale": 0.2},
            {"window": (4, -1), "softcap": 3.0, "scale": 0.2},
        ),
    ):
        wrapper.plan(*arguments, *HEADS, DIM, page_size, causal=causal, q_data_type=dtype, **options)
        expected, expected_lse = requests.expected(q, counts, causal=causal, **wanted)
        for form in ("one", "pair"):
            out, lse = wrapper.run(q, requests.given(layout, form), return_lse=True)
            close(out, expected)
            close(lse, expected_lse, dtype)
        old, old_lse = wrapper.forward_return_lse(q, requests.given(layout, "one"), causal, **options)
        assert torch.equal(old, out) and torch.equal(old_lse, lse)


@dtypes
@pytest.mark.parametrize("packed", [False, True])
def test_custom_masks_of_trees(packed: bool, dtype: torch.dtype, device: str) -> None:
    skip_fp32_on_gpu(device, dtype)
    parents, lengths = [[-1, 0, 0, 1, 1, 2, 5], [-1], [], [-1, 0, 1]], [20, 64, 3, 5]
    requests = Requests.make(lengths, 4, dtype, device)
    masks = [torch.ones(len(own), n, dtype=torch.bool) for own, n in zip(parents, lengths, strict=True)]
    for own, mask in zip(parents, masks, strict=True):
        nodes = mask[:, mask.shape[1] - len(own) :]
        for i, parent in enumerate(own):
            nodes[i] = nodes[parent] if parent >= 0 else False
            nodes[i, i] = True
    counts = [len(own) for own in parents]
    q = make(sum(counts), HEADS[0], DIM, seed=1, dtype=dtype, device=device)
    indptr = torch.tensor([0, *counts]).cumsum(0).int().to(device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(device))
    given: dict[str, Tensor] = {"custom_mask": torch.cat([mask.flatten() for mask in masks])}
    if packed:
        rows = [F.pad(mask.flatten(), (0, -mask.numel() % 8)).view(-1, 8) for mask in masks]
        given = {"packed_custom_mask": (torch.cat(rows).int() << torch.arange(8)).sum(1).to(torch.uint8)}
    wrapper.plan(
        indptr, requests.indptr.to(device), requests.indices.to(device), requests.last_page_len.to(device), *HEADS, DIM, 4,
        q_data_type=dtype, **{name: mask.to(device) for name, mask in given.items()},
    )  # fmt: skip
    out = wrapper.run(q, requests.cache)
    assert torch.equal(wrapper.forward(q, requests.cache), out)
    for rows_of, k, v, mask, found in zip(
        q.split(counts), requests.keys, requests.values, masks, out.split(counts), strict=True
    ):
        heads = (t.float().transpose(0, 1) for t in (rows_of, k, v))
        expected = F.scaled_dot_product_attention(*heads, attn_mask=mask.to(device), enable_gqa=True)
        close(found, expected.transpose(0, 1), dtype)


@layouts
@pytest.mark.parametrize("causal", [False, True])
def test_ragged_prefill(causal: bool, layout: str, device: str) -> None:
    dtype, counts, lengths = torch.bfloat16, [1, 30, 0, 5], [1, 37, 6, 9]
    q = make(36, HEADS[0], DIM, seed=1, dtype=dtype, device=device)
    k, v = (make(53, HEADS[1], DIM // i, seed=1 + i, dtype=dtype, device=device) for i in (1, 2))
    qo, kv = (torch.tensor([0, *n]).cumsum(0).int() for n in (counts, lengths))
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(device), layout)
    wrapper.plan(qo, kv, *HEADS, DIM, DIM // 2, causal=causal, window_left=8, q_data_type=dtype)
    given = [t if layout == "NHD" else t.transpose(0, 1).contiguous() for t in (k, v)]
    out, lse = wrapper.run_return_lse(q, *given)
    requests = Requests(list(k.split(lengths)), list(v.split(lengths)), k, kv, kv, kv)
    expected, expected_lse = requests.expected(q, counts, causal=causal, window=(8, -1))
    close(out, expected)
    close(lse, expected_lse, dtype)
    assert torch.equal(wrapper.forward(q, *given, causal, window_left=8), out)


@dtypes
@layouts
def test_single(layout: str, dtype: torch.dtype, device: str) -> None:
    skip_fp32_on_gpu(device, dtype)
    q = make(7, HEADS[0], DIM, seed=1, dtype=dtype, device=device)
    k, v = (make(19, HEADS[1], DIM, seed=i, dtype=dtype, device=device) for i in (2, 3))
    given = [t if layout == "NHD" else t.transpose(0, 1).contiguous() for t in (k, v)]

    def expected(rows: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = attention(rows[None].float(), k[None].float(), v[None].float(), **options)
        return out[0], lse[0].t() / math.log(2)

    for options, wanted in (
        ({"causal": True}, {"causal": True}),
        ({"window_left": 5, "logits_soft_cap": 2.0}, {"window": (5, -1), "softcap": 2.0}),
        ({"sm_scale": 0.1, "k_scale": 2.0}, {"scale": 0.2}),
    ):
        out, lse = flashinfer.single_prefill_with_kv_cache_return_lse(q, *given, kv_layout=layout, **options)
        close(out, expected(q, **wanted)[0])
        close(lse, expected(q, **wanted)[1], dtype)
        assert torch.equal(flashinfer.single_prefill_with_kv_cache(q, *given, kv_layout=layout, **options), out)
    out, lse = flashinfer.single_decode_with_kv_cache(
        q[0], *given, layout, q_scale=0.5, v_scale=2.0, window_left=6, return_lse=True
    )
    wanted_out, wanted_lse = expected(q[:1], causal=True, window=(6, -1), scale=0.5 / math.sqrt(DIM))
    close(out, 2 * wanted_out[0])
    close(lse, wanted_lse[0], dtype)


def test_requests_without_any_key(device: str) -> None:
    dtype = torch.bfloat16
    q, cache = (make(*shape, dtype=dtype, device=device) for shape in ((2, HEADS[0], DIM), (1, 2, 4, HEADS[1], DIM)))
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(device))
    for lengths in ((0, 0), ()):
        wrapper.plan(
            ints(*[0] * (len(lengths) + 1)), ints(), ints(*lengths), *HEADS, DIM, 4, q_data_type=dtype
        )  # fmt: skip
        out, lse = wrapper.run_return_lse(q[: len(lengths)], cache)
        assert (out == 0).all() and (lse == -math.inf).all() and lse.shape == (len(lengths), HEADS[0])


def test_lse_is_base_2() -> None:
    k = torch.zeros(8, 1, 8)
    _, lse = flashinfer.single_decode_with_kv_cache(torch.zeros(1, 8), k, k, return_lse=True)
    assert lse.tolist() == pytest.approx([3.0])  # log2 of 8 keys with score 0


def test_graph_mode_keeps_its_memory(device: str) -> None:
    """Plans write where the first one did; what `run` reads stays there."""
    dtype = torch.bfloat16
    buffers = [torch.zeros(n, dtype=torch.int32, device=device) for n in (6, 40, 5)]
    decode = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(workspace(device), *buffers)
    qo_buffer = torch.zeros(6, dtype=torch.int32, device=device)
    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        workspace(device), "NHD", True, qo_buffer, *(b.clone() for b in buffers)
    )
    assert decode.is_cuda_graph_enabled and prefill.is_cuda_graph_enabled
    places = []
    for lengths, counts in ((LENGTHS, [1, 30, 2, 0, 5]), ([12, 3, 100, 1, 0], [5, 1, 20, 1, 0])):
        requests = Requests.make(lengths, 8, dtype, device)
        pages = (requests.indptr, requests.indices, requests.last_page_len)
        q = make(38, HEADS[0], DIM, seed=1, dtype=dtype, device=device)
        decode.plan(*pages, *HEADS, DIM, 8, q_data_type=dtype)
        close(decode.run(q[:5], requests.cache), requests.expected(q[:5], [1] * 5)[0])
        assert torch.equal(buffers[0].cpu(), requests.indptr)
        indptr = torch.tensor([0, *counts]).cumsum(0).int()
        prefill.plan(indptr, *pages, *HEADS, DIM, 8, causal=True, q_data_type=dtype)
        out, lse = prefill.run(q, requests.cache, return_lse=True)
        used = sum(counts)
        close(out[:used], requests.expected(q[:used], counts, causal=True)[0])
        assert (out[used:] == 0).all() and (lse[used:] == -math.inf).all()
        close(prefill.run(q[:used], requests.cache), out[:used])  # and a call of exactly these rows
        kept = (decode._pages.block_table, decode._pages.seq_lens, decode._cu_seqlens_q, prefill._rows.cu_seqlens)
        places.append([t.data_ptr() for t in (*kept, prefill._pages.block_table, prefill._pages.seq_lens)])
    assert places[0] == places[1]

    with pytest.raises(ValueError, match="the batch has 4 requests, expected 5"):
        decode.plan(
            requests.indptr[:5], requests.indices, requests.last_page_len[:4], *HEADS, DIM, 8, q_data_type=dtype
        )
    with pytest.raises(ValueError, match="there are 41 indices, expected at most 40"):
        decode.plan(
            ints(0, 41, 41, 41, 41, 41), ints(*range(41)), ints(1, 0, 0, 0, 0), *HEADS, DIM, 8, q_data_type=dtype
        )
    with pytest.raises(ValueError, match=r"q_len_per_req is 2, expected 1"):
        decode.plan(*pages, *HEADS, DIM, 8, q_data_type=dtype, q_len_per_req=2)
    with pytest.raises(ValueError, match=r"qo_indptr\[-1\] is 50, expected at most 38"):
        prefill.plan(ints(0, 50, 50, 50, 50, 50), *pages, *HEADS, DIM, 8, q_data_type=dtype)
    with pytest.raises(ValueError, match="paged_kv_indptr_buffer is None"):
        flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(device), use_cuda_graph=True)


def test_ragged_in_graph_mode(device: str) -> None:
    dtype = torch.bfloat16
    buffers = [torch.zeros(4, dtype=torch.int32, device=device) for _ in range(2)]
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(device), "NHD", True, *buffers)
    q, k = (make(n, h, DIM, seed=n, dtype=dtype, device=device) for n, h in zip((20, 30), HEADS, strict=True))
    for counts, lengths in (([9, 1, 10], [10, 5, 15]), ([2, 0, 5], [20, 1, 5])):
        qo, kv = (torch.tensor([0, *n]).cumsum(0).int() for n in (counts, lengths))
        wrapper.plan(qo, kv, *HEADS, DIM, causal=True, q_data_type=dtype)
        out = wrapper.run(q, k, k)
        used, keys = sum(counts), list(k[: sum(lengths)].split(lengths))
        expected, _ = Requests(keys, keys, k, kv, kv, kv).expected(q[:used], counts, causal=True)
        close(out[:used], expected)
        assert (out[used:] == 0).all()


@pytest.mark.gpu
def test_one_captured_graph_serves_later_plans() -> None:
    dtype = torch.bfloat16
    buffers = [torch.zeros(n, dtype=torch.int32, device="cuda") for n in (6, 40, 5)]
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(workspace("cuda"), *buffers)
    q = make(5, HEADS[0], DIM, seed=1, dtype=dtype, device="cuda")
    cache = torch.zeros((43, 2, 8, HEADS[1], DIM), dtype=dtype, device="cuda")
    graph = None
    for lengths in ([1, 1, 1, 1, 1], LENGTHS, [100, 12, 0, 3, 90]):
        requests = Requests.make(lengths, 8, dtype, "cuda")
        cache[: requests.cache.shape[0]] = requests.cache
        pages = (requests.indptr, requests.indices, requests.last_page_len)
        wrapper.plan(*pages, *HEADS, DIM, 8, q_data_type=dtype)
        if graph is None:
            wrapper.run(q, cache)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out, lse = wrapper.run_return_lse(q, cache)
        graph.replay()
        expected, expected_lse = requests.expected(q, [1] * 5)
        close(out, expected)
        close(lse, expected_lse, dtype)
