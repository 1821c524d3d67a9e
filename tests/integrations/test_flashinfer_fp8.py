"""fastattn.flashinfer over pages in fp8: the same results as of the numbers that the codes stand for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn.flashinfer as flashinfer
from tests.integrations.flashinfer_requests import DIM, HEADS, LENGTHS, Requests, close, ints, layouts, make, workspace

FP8, DTYPE = torch.float8_e4m3fn, torch.bfloat16
# As a call has them: nothing, numbers, tensors that the host cannot read, one a head, and one of each.
SCALES: dict[str, tuple[Any, Any]] = {
    "none": (None, None),
    "numbers": (0.5, 3.0),
    "tensors": (torch.tensor(0.5), torch.tensor([3.0])),
    "heads": (torch.tensor([0.5, 0.25]), torch.tensor([3.0, 7.0])),
    "k of heads": (torch.tensor([0.5, 0.25]), 3.0),
    "v of heads": (0.5, torch.tensor([3.0, 7.0])),
}


def of_heads(scale: float | Tensor | None) -> Tensor:
    return torch.as_tensor(1.0 if scale is None else scale).flatten().expand(HEADS[1])


def quantized(page_size: int, scales: tuple[Any, Any], device: str) -> Requests:
    """Pages in e4m3, and keys and values that are their codes times the scales."""
    requests = Requests.make(LENGTHS, page_size, torch.float32, device)
    k_scale, v_scale = (of_heads(scale).to(device)[:, None] for scale in scales)
    keys = [k.to(FP8).float() * k_scale for k in requests.keys]
    values = [v.to(FP8).float() * v_scale for v in requests.values]
    return replace(requests, keys=keys, values=values, cache=requests.cache.to(FP8))


@layouts
@pytest.mark.parametrize("scales", SCALES)
def test_decode(scales: str, layout: str, device: str) -> None:
    k_scale, v_scale = (s.to(device) if isinstance(s, Tensor) else s for s in SCALES[scales])
    requests = quantized(16, SCALES[scales], device)
    q = make(5, HEADS[0], DIM, seed=1, dtype=DTYPE, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(device), layout)
    pages = (requests.indptr, requests.indices, requests.last_page_len)
    wrapper.plan(*pages, *HEADS, DIM, 16, q_data_type=DTYPE, kv_data_type="float8_e4m3fn")
    expected, expected_lse = requests.expected(q, [1] * 5)
    for form in ("one", "pair"):
        out, lse = wrapper.run_return_lse(q, requests.given(layout, form), k_scale=k_scale, v_scale=v_scale)
        assert out.dtype is DTYPE and out.isfinite().all()
        close(out, expected)
        close(lse, expected_lse, DTYPE)
    old, old_lse = wrapper.forward_return_lse(q, requests.given(layout, "one"), k_scale=k_scale, v_scale=v_scale)
    assert torch.equal(old, out) and torch.equal(old_lse, lse)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("scales", ["numbers", "heads"])
def test_prefill(scales: str, page_size: int, device: str) -> None:
    k_scale, v_scale = (s.to(device) if isinstance(s, Tensor) else s for s in SCALES[scales])
    requests, counts = quantized(page_size, SCALES[scales], device), [1, 30, 2, 0, 5]
    q = make(38, HEADS[0], DIM, seed=1, dtype=DTYPE, device=device)
    indptr = torch.tensor([0, *counts]).cumsum(0).int()
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(device))
    pages = (requests.indptr, requests.indices, requests.last_page_len)
    options = {"window_left": 4, "logits_soft_cap": 3.0}
    wrapper.plan(
        indptr,
        *pages,
        *HEADS,
        DIM,
        page_size,
        causal=True,
        q_data_type=DTYPE,
        kv_data_type=FP8,
        sm_scale=0.2,
        **options,
    )
    out, lse = wrapper.run(q, requests.cache, q_scale=2.0, k_scale=k_scale, v_scale=v_scale, return_lse=True)
    expected, expected_lse = requests.expected(q, counts, causal=True, window=(4, -1), softcap=3.0, scale=0.4)
    close(out, expected)
    close(lse, expected_lse, DTYPE)


@pytest.mark.parametrize("given", [FP8, DTYPE], ids=str)
def test_append(given: torch.dtype, device: str) -> None:
    """Codes come to the pages as they are, NaN too; 16 bits rounded to nearest even, no larger than 448."""
    rows = torch.arange(256, dtype=torch.uint8).view(4, 2, DIM).view(FP8)  # every code
    new = rows if given is FP8 else torch.linspace(-500, 500, 256).view(4, 2, DIM).to(given)
    cache = torch.zeros(3, 2, 4, 2, DIM, device=device).to(FP8)
    place = (ints(0, 0, -1, 1, device=device), ints(2, 3, 0, 0, device=device))
    lists = (ints(2, 0, device=device), ints(0, 1, 2, device=device), ints(4, 1, device=device))
    flashinfer.append_paged_kv_cache(new.to(device), new.flip(0).to(device), *place, cache, *lists)
    wanted = torch.zeros(3, 2, 4, 2, DIM)
    codes = new.float().clamp(-448, 448).to(FP8).float()
    for token, (page, at) in {0: (2, 2), 1: (2, 3), 3: (0, 0)}.items():
        wanted[page, 0, at], wanted[page, 1, at] = codes[token], codes[3 - token]
    torch.testing.assert_close(cache.float().cpu(), wanted, rtol=0, atol=0, equal_nan=True)


def test_cascade(device: str) -> None:
    """Two levels of pages in e4m3, of which one is shared."""
    k, v = (make(12, *reversed((DIM, HEADS[1])), seed=s).to(FP8) for s in (1, 2))
    cache = torch.stack((k, v), 1).view(3, 4, 2, HEADS[1], DIM).transpose(1, 2).contiguous().to(device)
    q = make(2, HEADS[0], DIM, seed=3, dtype=DTYPE, device=device)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace(device))
    wrapper.plan(
        [ints(0, 2), ints(0, 1, 2)], [ints(0, 1), ints(0, 1, 2)], [ints(0), ints(1, 2)], [ints(4), ints(4, 3)],
        *HEADS, DIM, 4, q_data_type=DTYPE, kv_data_type=FP8,
    )  # fmt: skip
    runs = [torch.cat((t[:4], own)).float().to(device) for own in (k[4:8], k[8:11]) for t in (k,)]
    values = [torch.cat((v[:4], own)).float().to(device) for own in (v[4:8], v[8:11])]
    none = torch.empty(0)
    requests = Requests(runs, values, none, none, none, none)
    close(wrapper.run(q, cache), requests.expected(q, [1, 1])[0])
