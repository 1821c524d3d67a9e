"""fastattn.flashinfer: attention, pages, merges, layers. Sampling is in test_flashinfer_sampling.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn.flashinfer as flashinfer
from tests.integrations.reference import attention

HEADS, DIM = (4, 2), 32
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
layouts = pytest.mark.parametrize("layout", ["NHD", "HND"])


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def ints(*values: int, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def skip_fp32_on_gpu(device: str, dtype: torch.dtype) -> None:
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("the kernels take bf16 and fp16")


def close(found: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    tolerance = TOLERANCE[found.dtype if dtype is None else dtype]
    torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=tolerance)


@dataclass
class Requests:
    """Keys of each request in a row, and the same in shuffled pages, NaN in all that is not used."""

    keys: list[Tensor]
    values: list[Tensor]
    cache: Tensor  # (pages, 2, page_size, Hk, D)
    indptr: Tensor
    indices: Tensor
    last_page_len: Tensor

    @staticmethod
    def make(
        lengths: list[int],
        page_size: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        heads: int = HEADS[1],
        seed: int = 7,
    ) -> Requests:
        counts = [-(-n // page_size) for n in lengths]
        indptr = torch.tensor([0, *counts]).cumsum(0)
        indices = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(seed))[: sum(counts)]
        cache = torch.full((sum(counts) + 3, 2, page_size, heads, DIM), math.nan).to(device, dtype)
        keys, values = [], []
        for b, n in enumerate(lengths):
            k, v = (make(n, heads, DIM, seed=seed + 2 * b + i, dtype=dtype, device=device) for i in (0, 1))
            for t in range(n):
                page = int(indices[indptr[b] + t // page_size])
                cache[page, 0, t % page_size], cache[page, 1, t % page_size] = k[t], v[t]
            keys.append(k)
            values.append(v)
        last = [(n - 1) % page_size + 1 if n else 0 for n in lengths]
        return Requests(keys, values, cache, indptr.int(), indices.int(), ints(*last))

    def given(self, layout: str, form: str) -> Tensor | tuple[Tensor, Tensor]:
        cache = self.cache if layout == "NHD" else self.cache.transpose(2, 3).contiguous()
        return cache if form == "one" else tuple(cache[:, i].contiguous() for i in (0, 1))  # type: ignore[return-value]

    def expected(self, q: Tensor, counts: list[int], **options: Any) -> tuple[Tensor, Tensor]:
        """out (T, H, D) and lse (T, H) to base 2 of packed queries."""
        outs, lses = [], []
        for rows, k, v in zip(q.float().split(counts), self.keys, self.values, strict=True):
            out, lse = attention(rows[None], k.float()[None], v.float()[None], **options)
            outs.append(out[0])
            lses.append(lse[0].t())
        return torch.cat(outs), torch.cat(lses) / math.log(2)


def workspace(device: str = "cpu") -> Tensor:
    return torch.empty(1024, dtype=torch.uint8, device=device)


LENGTHS = [1, 37, 0, 64, 5]


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


@layouts
@pytest.mark.parametrize("form", ["one", "pair"])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_append(page_size: int, form: str, layout: str, device: str) -> None:
    """What is appended in two ragged batches is what was in the pages from the start."""
    dtype = torch.bfloat16
    requests = Requests.make([7, 20, 1, 5], page_size, dtype, device)
    cache = requests.given(layout, form)
    empty = torch.full_like(cache, math.nan) if isinstance(cache, Tensor) else tuple(map(torch.zeros_like, cache))
    pages = [t.to(device) for t in (requests.indices, requests.indptr, requests.last_page_len)]
    lengths = flashinfer.get_seq_lens(pages[1], pages[2], page_size)
    assert lengths.tolist() == [7, 20, 1, 5]
    before = [0, 0, 0, 0]
    for after in ([4, 20, 0, 2], [7, 20, 1, 5]):
        parts = [slice(a, b) for a, b in zip(before, after, strict=True)]
        k, v = (torch.cat([t[p] for t, p in zip(ts, parts, strict=True)]) for ts in (requests.keys, requests.values))
        new = torch.tensor([0, *(b - a for a, b in zip(before, after, strict=True))]).cumsum(0).int().to(device)
        nnz = k.shape[0] + 2  # the last two are padding
        k, v = (torch.cat((t, torch.full_like(t[:1], math.nan).expand(2, -1, -1))) for t in (k, v))
        batch, position = flashinfer.get_batch_indices_positions(new, ints(*after, device=device), nnz)
        assert batch.dtype == position.dtype == torch.int32
        wanted = [(b, p) for b, part in enumerate(parts) for p in range(part.start, part.stop)]
        assert list(zip(batch.tolist(), position.tolist(), strict=True)) == [*wanted, (-1, 0), (-1, 0)]
        flashinfer.append_paged_kv_cache(k, v, batch, position, empty, *pages, kv_layout=layout)
        before = after
    for found, expected in zip(*((t,) if isinstance(t, Tensor) else t for t in (empty, cache)), strict=True):
        used = ~expected.isnan()
        assert torch.equal(found[used], expected[used])
        assert (found[~used].isnan() | (found[~used] == 0)).all()
    kept = [torch.empty(nnz, dtype=torch.int32, device=device) for _ in range(2)]
    again = flashinfer.get_batch_indices_positions(new, ints(*after, device=device), nnz, *kept)
    assert again[0] is kept[0] and torch.equal(again[0], batch) and torch.equal(again[1], position)


@dtypes
def test_merges(dtype: torch.dtype, device: str) -> None:
    skip_fp32_on_gpu(device, dtype)
    q = make(6, HEADS[0], DIM, dtype=dtype, device=device)
    k, v = (make(24, HEADS[1], DIM, seed=i, dtype=dtype, device=device) for i in (1, 2))
    call = flashinfer.single_prefill_with_kv_cache_return_lse
    parts = [call(q, k[a:b], v[a:b]) for a, b in ((0, 3), (3, 17), (17, 24))]
    whole, whole_lse = call(q, k, v)
    first = flashinfer.merge_state(*parts[0], *parts[1])
    out, lse = flashinfer.merge_state(*first, *parts[2])
    close(out, whole)
    close(lse, whole_lse, dtype)
    empty = torch.full_like(out, math.nan), torch.full_like(lse, -math.inf)
    states = [torch.stack(t, 1) for t in zip(*parts, empty, strict=True)]
    out, lse = flashinfer.merge_states(*states)
    assert out.dtype == dtype and lse.dtype == torch.float32
    close(out, whole)
    close(lse, whole_lse, dtype)
    assert flashinfer.merge_states(*(t[:, 3:] for t in states))[0].eq(0).all()

    mask = torch.tensor([True, False, True, True, False, True], device=device)
    v_own, s_own = (t.clone() for t in parts[0])
    flashinfer.merge_state_in_place(v_own, s_own, *parts[1], mask=mask)
    for found, old, merged in zip((v_own, s_own), parts[0], first, strict=True):
        assert torch.equal(found[mask], merged[mask]) and torch.equal(found[~mask], old[~mask])
    v_own, s_own = (t.clone() for t in parts[0])
    flashinfer.merge_state_in_place(v_own, s_own, *parts[1])
    assert torch.equal(v_own, first[0]) and torch.equal(s_own, first[1])
    with pytest.raises(TypeError, match=r"s is torch.float16"):
        flashinfer.merge_state_in_place(v_own, s_own.half(), *parts[1])
    with pytest.raises(ValueError, match=r"\(T, parts, H\)"):
        flashinfer.merge_states(v_own, s_own)


@dtypes
def test_norms_and_activations(dtype: torch.dtype, device: str) -> None:
    skip_fp32_on_gpu(device, dtype)
    x, residual = make(5, 48, dtype=dtype, device=device), make(5, 48, seed=1, dtype=dtype, device=device)
    weight = make(48, seed=2, dtype=dtype, device=device)
    normed = torch.nn.functional.rms_norm
    out = torch.empty_like(x)
    assert flashinfer.rmsnorm(x, weight, 1e-5, out=out) is out
    close(out, normed(x.float(), (48,), weight.float(), 1e-5))
    total = x.float() + residual.float()
    flashinfer.fused_add_rmsnorm(x, residual, weight)
    close(residual, total)
    close(x, normed(total, (48,), weight.float(), 1e-6))
    gate, up = residual.float().chunk(2, -1)
    gelu = torch.nn.functional.gelu
    for function, expected in (
        (flashinfer.silu_and_mul, torch.nn.functional.silu(gate)),
        (flashinfer.gelu_and_mul, gelu(gate)),
        (flashinfer.gelu_tanh_and_mul, gelu(gate, approximate="tanh")),
    ):
        out = torch.empty(5, 24, dtype=dtype, device=device)
        close(function(residual), expected * up)
        assert function(residual, out) is out
        close(out, expected * up)


def turned(x: Tensor, positions: Tensor, frequencies: Tensor, interleave: bool) -> Tensor:
    """As complex numbers, in fp64."""
    half = frequencies.shape[0]
    x, rest = x[..., : 2 * half].double(), x[..., 2 * half :].double()
    a, b = (x[..., 0::2], x[..., 1::2]) if interleave else x.chunk(2, -1)
    angle = positions.double()[:, None, None] * frequencies
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    parts = torch.view_as_real(z)
    both = parts.flatten(-2) if interleave else torch.cat((parts[..., 0], parts[..., 1]), -1)
    return torch.cat((both, rest), -1)


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 16])
def test_rope(rotary_dim: int | None, interleave: bool, device: str) -> None:
    dtype = torch.bfloat16
    qkv = make(7, 8, DIM, dtype=dtype, device=device)
    q, k = qkv[:, :4], qkv[:, 4:6]  # not contiguous
    indptr, offsets = ints(0, 3, 3, 7, device=device), ints(5, 9, 100, device=device)
    positions = ints(5, 6, 7, 100, 101, 102, 103, device=device)
    width = DIM if rotary_dim is None else rotary_dim
    base = 1e4 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    llama = 5e5 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    waves = 2 * math.pi / llama
    smooth = (8192 / waves - 1) / (4 - 1)
    blended = (1 - smooth) * llama / 8 + smooth * llama
    llama = torch.where(waves < 8192 / 4, llama, torch.where(waves > 8192, llama / 8, blended))
    for name, frequencies, options in (("rope", base / 2, {"rope_scale": 2.0}), ("llama31_rope", llama, {})):
        places = (rotary_dim, interleave)
        wanted = [turned(x, positions, frequencies, interleave) for x in (q, k)]
        for suffix, where in (("", (indptr, offsets)), ("_pos_ids", (positions,))):
            found = getattr(flashinfer, f"apply_{name}{suffix}")(q, k, *where, *places, **options)
            both = qkv.clone()
            assert (
                getattr(flashinfer, f"apply_{name}{suffix}_inplace")(
                    both[:, :4], both[:, 4:6], *where, *places, **options
                )
                is None
            )
            for out, own, expected in zip(found, (both[:, :4], both[:, 4:6]), wanted, strict=True):
                close(out, expected)
                assert torch.equal(out, own)
            assert torch.equal(both[:, 6:], qkv[:, 6:])


def test_rope_with_a_table(device: str) -> None:
    q, k = (make(6, h * DIM, seed=h, dtype=torch.float16, device=device) for h in HEADS)
    frequencies = 1e4 ** (-torch.arange(0, DIM, 2, dtype=torch.float64, device=device) / DIM)
    angles = torch.arange(50, device=device)[:, None] * frequencies
    table = torch.cat((angles.cos(), angles.sin()), -1).float()
    positions = torch.tensor([3, 49, 0, 7, 7, 1], device=device)
    for is_neox in (True, False):
        found = flashinfer.apply_rope_with_cos_sin_cache(positions, q, k, DIM, table, is_neox)
        for out, x in zip(found, (q, k), strict=True):
            close(out, turned(x.view(6, -1, DIM), positions, frequencies, not is_neox).flatten(1))
    with pytest.raises(ValueError, match=r"cos_sin_cache is torch.float16"):
        flashinfer.apply_rope_with_cos_sin_cache_inplace(positions, q, k, DIM, table.half())


def planned(**options: Any) -> flashinfer.BatchDecodeWithPagedKVCacheWrapper:
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace())
    wrapper.plan(ints(0, 1), ints(0), ints(3), *HEADS, DIM, 4, **{"q_data_type": torch.float32, **options})
    return wrapper


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pos_encoding_mode": "ROPE_LLAMA"}, NotImplementedError, "pos_encoding_mode is 'ROPE_LLAMA', expected 'NONE'"),
        ({"pos_encoding_mode": "ALIBI"}, NotImplementedError, "pos_encoding_mode is 'ALIBI'"),
        ({"pos_encoding_mode": "YARN"}, ValueError, "pos_encoding_mode is 'YARN'"),
        ({"window_right": 3}, NotImplementedError, "window_right is 3, expected 0"),
        ({"window_left": -2}, ValueError, "window_left is -2"),
        ({"logits_soft_cap": -1.0}, ValueError, "logits_soft_cap is -1.0"),
        ({"kv_data_type": torch.float8_e4m3fn}, NotImplementedError, "kv_data_type is torch.float8_e4m3fn"),
        ({"data_type": torch.float16}, NotImplementedError, "kv_data_type is torch.float16, expected q_data_type"),
        ({"o_data_type": "float16"}, NotImplementedError, "o_data_type is float16"),
        ({"q_data_type": "float17"}, ValueError, "q_data_type is 'float17'"),
        ({"fixed_split_size": 64}, NotImplementedError, "fixed_split_size is 64"),
        ({"disable_split_kv": True}, NotImplementedError, "disable_split_kv is True"),
        ({"q_len_per_req": 0}, ValueError, "q_len_per_req is 0"),
    ],
    ids=str,
)  # fmt: skip
def test_plans_that_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"flashinfer.BatchDecodeWithPagedKVCacheWrapper.plan: {message}"):
        planned(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q_scale": torch.ones(1)}, "q_scale is a tensor, expected a float"),
        ({"kv_cache_sf": (torch.ones(1), torch.ones(1))}, "kv_cache_sf is "),
        ({"skip_softmax_threshold_scale_factor": 0.5}, "skip_softmax_threshold_scale_factor is 0.5, expected None"),
    ],
    ids=str,
)
def test_runs_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        planned().run(make(1, HEADS[0], DIM), make(1, 2, 4, HEADS[1], DIM), **options)


def test_tensors_that_were_not_planned_for() -> None:
    q, cache, wrapper = make(1, HEADS[0], DIM), make(1, 2, 4, HEADS[1], DIM), planned()
    with pytest.raises(RuntimeError, match="there is no plan yet"):
        flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace()).run(q, cache)
    for arguments, message in (
        ((q.half(), cache), r"q is torch.float16, expected torch.float32, as planned"),
        ((q, cache.half()), r"k is torch.float16, expected torch.float32, as planned"),
        ((q[:, :2], cache), r"q has shape \(1, 2, 32\), expected heads and head dim \(4, 32\)"),
        ((q.expand(2, -1, -1), cache), r"q has shape \(2, 4, 32\), expected \(1, H, D\)"),
        ((q, cache.expand(-1, 2, -1, -1, -1)[:, :1]), r"expected \(pages, 2, page_size, Hk, D\)"),
        ((q, (cache, cache)), "expected 4 dimensions"),
        ((q, make(1, 2, 8, HEADS[1], DIM)), "pages of 8 tokens, expected page_size 4"),
    ):
        with pytest.raises(ValueError, match=message):
            wrapper.run(*arguments)
    with pytest.raises(ValueError, match="q_len_per_req is 2, expected 1"):
        wrapper.run(q, cache, q_len_per_req=2)


def test_pages_that_do_not_fit() -> None:
    wrapper = planned()
    for pages, message in (
        ((ints(0, 1), ints(0), ints(5)), r"last_page_len\[0\] is 5, expected 1 ≤ last_page_len ≤ page_size 4"),
        ((ints(0, 2), ints(0), ints(1)), "indptr is .*, expected it ascending from 0 to at most 1"),
        ((ints(0, 1, 0), ints(0), ints(1, 1)), "expected it ascending"),
        ((ints(0, 1, 1), ints(0), ints(1)), "indptr has 3 entries and last_page_len 1"),
    ):
        with pytest.raises(ValueError, match=message):
            wrapper.plan(*pages, *HEADS, DIM, 4)
    wrapper.plan(ints(0, 1), ints(9), ints(1), *HEADS, DIM, 4, q_data_type=torch.float32)
    with pytest.raises(ValueError, match=r"block_table\[0, 0\] is 9"):
        wrapper.run(make(1, HEADS[0], DIM), make(1, 2, 4, HEADS[1], DIM))


def test_other_things_that_are_refused() -> None:
    q, k = make(3, HEADS[0], DIM), make(5, HEADS[1], DIM)
    call = flashinfer.single_prefill_with_kv_cache
    mask = torch.ones(3, 5, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match=r"custom_mask is a tensor of shape \(3, 5\), expected None"):
        call(q, k, k, custom_mask=mask)
    with pytest.raises(NotImplementedError, match="scale_q is a tensor"):
        call(q, k, k, torch.ones(1))
    with pytest.raises(NotImplementedError, match=r"o_dtype is torch.float16, expected q's"):
        call(q, k, k, o_dtype=torch.float16)
    with pytest.raises(ValueError, match="kv_layout is 'DHN', expected 'NHD' or 'HND'"):
        call(q, k, k, kv_layout="DHN")
    with pytest.raises(ValueError, match=r"q has shape \(3, 4, 32\), expected \(H, D\)"):
        flashinfer.single_decode_with_kv_cache(q, k, k)
    with pytest.raises(NotImplementedError, match="jit_args is"):
        flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), jit_args=["x"])
    with pytest.raises(NotImplementedError, match="custom_mask_buf is"):
        flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), custom_mask_buf=mask)
    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace())
    ragged = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace())
    pages = (ints(0, 1), ints(0, 1), ints(0), ints(1), *HEADS, DIM, 4)
    with pytest.raises(NotImplementedError, match=r"plan: custom_mask is a tensor"):
        prefill.plan(*pages, custom_mask=mask)
    with pytest.raises(NotImplementedError, match="head_dim_vo is 64, expected head_dim_qk, 32"):
        prefill.plan(*pages, head_dim_vo=64)
    with pytest.raises(NotImplementedError, match="token_pos_in_items_len is 3, expected 0"):
        prefill.plan(*pages, token_pos_in_items_len=3)
    with pytest.raises(ValueError, match="qo_indptr has 3 entries, expected 2"):
        prefill.plan(ints(0, 1, 1), *pages[1:])
    with pytest.raises(NotImplementedError, match="v_indptr is a tensor"):
        ragged.plan(ints(0, 1), ints(0, 1), *HEADS, DIM, v_indptr=ints(0, 1))
    with pytest.raises(
        ValueError, match=r"append_key has shape \(5, 2, 32\), expected \(nnz, Hk, D\) with Hk, D = \(4, 32\)"
    ):
        flashinfer.append_paged_kv_cache(k, k, *[ints(0)] * 2, make(1, 2, 4, 4, DIM), *[ints(0)] * 3)
