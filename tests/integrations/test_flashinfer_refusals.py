"""fastattn.flashinfer refuses, by name and value, what it cannot do and what was not planned for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastattn.flashinfer as flashinfer
from tests.integrations.flashinfer_requests import (
    DIM,
    HEADS,
    ints,
    make,
    workspace,
)


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
        (
            {"kv_data_type": "float8_e5m2"},
            NotImplementedError,
            "kv_data_type is float8_e5m2, expected q_data_type, torch.float32, or torch.float8_e4m3fn",
        ),
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
        ({"k_scale": torch.ones(1)}, "k_scale is a tensor, expected a float"),
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
    eight, wrapper = cache.to(torch.float8_e4m3fn), planned(kv_data_type=torch.float8_e4m3fn)
    with pytest.raises(
        ValueError, match=r"k is torch.float32, expected torch.float8_e4m3fn, as planned: give plan kv_data"
    ):
        wrapper.run(q, cache)
    with pytest.raises(ValueError, match=r"v_scale has shape \(3,\), expected one number or \(Hk\) = \(2,\)"):
        wrapper.run(q, eight, v_scale=torch.ones(3))
    with pytest.raises(
        ValueError, match=r"k is torch.float8_e4m3fn, expected torch.float32, as planned: give plan q_data"
    ):
        planned().run(q, eight)


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


def test_custom_masks_that_are_no_trees() -> None:
    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace())
    pages = (ints(0, 2), ints(0, 2), ints(0, 1), ints(1), *HEADS, DIM, 4)  # 2 queries and 5 keys
    chain = torch.ones(2, 5, dtype=torch.bool).tril(3)
    for at, value, says in (
        ((1, 0), False, "custom_mask of request 0 hides keys before the queries' own"),
        ((0, 4), True, "custom_mask of request 0 shows keys behind"),
        ((1, 4), False, "custom_mask of request 0 shows keys behind a query's own or hides that"),
    ):
        mask = chain.clone()
        mask[at] = value
        with pytest.raises(NotImplementedError, match=says):
            prefill.plan(*pages, custom_mask=mask)
    with pytest.raises(ValueError, match="custom_mask has 9 elements, expected 10"):
        prefill.plan(*pages, custom_mask=chain.flatten()[:9])
    with pytest.raises(ValueError, match="packed_custom_mask has 1 elements, expected 2"):
        prefill.plan(*pages, packed_custom_mask=torch.zeros(1, dtype=torch.uint8))
    many = (ints(0, 65), ints(0, 17), torch.arange(17), ints(1), *HEADS, DIM, 4)
    mask = torch.ones(65, 65, dtype=torch.bool).tril()
    prefill.plan(*many, custom_mask=mask)
    mask[9, 3] = False
    with pytest.raises(NotImplementedError, match="request 0 has 65 queries and is no chain, expected at most 64"):
        prefill.plan(*many, custom_mask=mask)
    prefill.plan(*pages, custom_mask=chain, window_left=3, q_data_type=torch.float32)
    with pytest.raises(NotImplementedError, match="window_left is 3 with a custom mask, expected -1"):
        prefill.run(make(2, HEADS[0], DIM), make(2, 2, 4, HEADS[1], DIM))


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
        ragged.plan(ints(0, 1), ints(0, 1), *HEADS, DIM, custom_mask=mask)
    with pytest.raises(NotImplementedError, match="head_dim_vo is 64, expected head_dim_qk, 32"):
        prefill.plan(*pages, head_dim_vo=64)
    with pytest.raises(NotImplementedError, match="token_pos_in_items_len is 3, expected 0"):
        prefill.plan(*pages, token_pos_in_items_len=3)
    with pytest.raises(ValueError, match="qo_indptr has 3 entries, expected 2"):
        prefill.plan(ints(0, 1, 1), *pages[1:])
    with pytest.raises(
        NotImplementedError, match=r"kv_data_type is torch.float8_e4m3fn, expected q_data_type, torch.float16$"
    ):
        ragged.plan(ints(0, 1), ints(0, 1), *HEADS, DIM, kv_data_type=torch.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="v_indptr is a tensor"):
        ragged.plan(ints(0, 1), ints(0, 1), *HEADS, DIM, v_indptr=ints(0, 1))
    with pytest.raises(
        ValueError, match=r"append_key has shape \(5, 2, 32\), expected \(nnz, Hk, D\) with Hk, D = \(4, 32\)"
    ):
        flashinfer.append_paged_kv_cache(k, k, *[ints(0)] * 2, make(1, 2, 4, 4, DIM), *[ints(0)] * 3)
