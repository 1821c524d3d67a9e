"""Names, order and defaults of every argument are flash-attn 2.8's, FlashAttention-3's and FlashInfer's: who reads
signatures, as transformers does, finds what it looks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import fastattn
from fastattn import bert_padding, fa3, flashinfer, rotary

TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
CU = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
DESCALE = "q_descale=None, k_descale=None, v_descale=None"
GRAPH = "float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False"
SCALES = "q_scale=None, k_scale=None, v_scale=None"
RESULTS = "out=None, lse=None, return_lse=False, enable_pdl=None"
ITEMS = "prefix_len_ptr=None, token_pos_in_items_ptr=None, token_pos_in_items_len=0, max_item_len_ptr=None"
OLD = "causal=False, pos_encoding_mode='NONE', use_fp16_qk_reduction=False"
OLD_SCORES = "window_left=-1, logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None"
PLANNED = "pos_encoding_mode='NONE', window_left=-1, logits_soft_cap=None"
DRAWN = "deterministic=True, generator=None, check_nan=False, seed=None, offset=None"
EXPECTED: list[tuple[Callable[..., Any], str]] = [
    (fastattn.flash_attn_func, f"q, k, v, {TAIL}"),
    (fastattn.flash_attn_kvpacked_func, f"q, kv, {TAIL}"),
    (fastattn.flash_attn_qkvpacked_func, f"qkv, {TAIL}"),
    (fastattn.flash_attn_varlen_func, f"q, k, v, {CU}, {TAIL}, block_table=None"),
    (fastattn.flash_attn_varlen_kvpacked_func, f"q, kv, {CU}, {TAIL}"),
    (fastattn.flash_attn_varlen_qkvpacked_func, f"qkv, cu_seqlens, max_seqlen, {TAIL}"),
    (
        fastattn.flash_attn_with_kvcache,
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, "
        "cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False",
    ),
    (bert_padding.unpad_input, "hidden_states, attention_mask, unused_mask=None"),
    (bert_padding.unpad_input_for_concatenated_sequences, "hidden_states, attention_mask_in_length"),
    (bert_padding.pad_input, "hidden_states, indices, batch, seqlen"),
    (bert_padding.index_first_axis, "input, indices"),
    (bert_padding.index_put_first_axis, "values, indices, first_axis_dim"),
    (rotary.apply_rotary_emb_torch, "x, cos, sin, interleaved=False"),
    (
        rotary.apply_rotary_emb,
        "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None",
    ),
    (
        rotary.apply_rotary_emb_qkv_,
        "qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, num_heads_q=None",
    ),
    (rotary.apply_rotary_emb_kv_, "kv, cos, sin, interleaved=False, seqlen_offsets=0"),
    (rotary.RotaryEmbedding, "dim, base=10000.0, interleaved=False, scale_base=None, device=None"),
    (rotary.RotaryEmbedding.forward, "self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, num_heads_q=None"),
    (
        fa3.flash_attn_func,
        f"q, k, v, softmax_scale=None, causal=False, qv=None, {DESCALE}, window_size=(-1, -1), attention_chunk=0, "
        "softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False, s_aux=None",
    ),
    (
        fa3.flash_attn_qkvpacked_func,
        f"qkv, softmax_scale=None, causal=False, {DESCALE}, window_size=(-1, -1), attention_chunk=0, softcap=0.0, "
        "deterministic=False, num_heads_q=None, sm_margin=0, return_attn_probs=False",
    ),
    (
        fa3.flash_attn_varlen_func,
        f"q, k, v, {CU}, seqused_q=None, seqused_k=None, softmax_scale=None, causal=False, qv=None, {DESCALE}, "
        "window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, "
        "sm_margin=0, return_attn_probs=False, s_aux=None",
    ),
    (
        fa3.flash_attn_with_kvcache,
        "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, "
        f"max_seqlen_q=None, rotary_seqlens=None, {DESCALE}, softmax_scale=None, causal=False, window_size=(-1, -1), "
        "attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, "
        "sm_margin=0, return_softmax_lse=False, s_aux=None",
    ),
    (fa3.flash_attn_combine, "out_partial, lse_partial, out=None, out_dtype=None"),
    (
        fa3.get_scheduler_metadata,
        "batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens, "
        "qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None, cache_leftpad=None, "
        "page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1), attention_chunk=0, has_softcap=False, "
        "num_splits=0, pack_gqa=None, sm_margin=0",
    ),
    (
        flashinfer.single_decode_with_kv_cache,
        "q, k, v, kv_layout='NHD', pos_encoding_mode='NONE', use_tensor_cores=False, q_scale=None, k_scale=None, "
        "v_scale=None, window_left=-1, logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None, "
        "return_lse=False",
    ),
    (
        flashinfer.single_prefill_with_kv_cache,
        "q, k, v, scale_q=None, scale_k=None, scale_v=None, o_dtype=None, custom_mask=None, packed_custom_mask=None, "
        "causal=False, kv_layout='NHD', pos_encoding_mode='NONE', use_fp16_qk_reduction=False, sm_scale=None, "
        "window_left=-1, logits_soft_cap=None, rope_scale=None, rope_theta=None, backend='auto', return_lse=False, "
        "kv_cache_sf=None, k_scale=None, v_scale=None",
    ),
    (
        flashinfer.BatchDecodeWithPagedKVCacheWrapper.plan,
        f"self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, {PLANNED}, "
        "q_data_type='float16', kv_data_type=None, o_data_type=None, data_type=None, sm_scale=None, rope_scale=None, "
        "rope_theta=None, non_blocking=True, block_tables=None, seq_lens=None, fixed_split_size=None, "
        "disable_split_kv=False, q_len_per_req=1, window_right=0",
    ),
    (
        flashinfer.BatchDecodeWithPagedKVCacheWrapper,
        f"{GRAPH}, use_tensor_cores=False, paged_kv_indptr_buffer=None, paged_kv_indices_buffer=None, "
        "paged_kv_last_page_len_buffer=None, backend='auto', jit_args=None",
    ),
    (
        flashinfer.BatchDecodeWithPagedKVCacheWrapper.run,
        f"self, q, paged_kv_cache, *args, {SCALES}, {RESULTS}, window_left=None, sinks=None, q_len_per_req=None, "
        "skip_softmax_threshold_scale_factor=None, kv_cache_sf=None",
    ),
    *(
        (method, f"self, q, paged_kv_cache, pos_encoding_mode='NONE', {SCALES}, {OLD_SCORES}")
        for method in (
            flashinfer.BatchDecodeWithPagedKVCacheWrapper.forward,
            flashinfer.BatchDecodeWithPagedKVCacheWrapper.forward_return_lse,
        )
    ),
    (
        flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper,
        "workspace_buffer, indptr_buffer, indices_buffer, last_page_len_buffer, kv_layout='NHD', use_tensor_cores=False",
    ),
    (
        flashinfer.BatchPrefillWithPagedKVCacheWrapper,
        f"{GRAPH}, qo_indptr_buf=None, paged_kv_indptr_buf=None, paged_kv_indices_buf=None, "
        "paged_kv_last_page_len_buf=None, custom_mask_buf=None, mask_indptr_buf=None, backend='auto', jit_args=None, "
        "jit_kwargs=None",
    ),
    (
        flashinfer.BatchPrefillWithPagedKVCacheWrapper.plan,
        "self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, "
        f"head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None, {OLD}, sm_scale=None, "
        "window_left=-1, logits_soft_cap=None, rope_scale=None, rope_theta=None, q_data_type='float16', kv_data_type=None, "
        f"o_data_type=None, non_blocking=True, {ITEMS}, seq_lens=None, seq_lens_q=None, block_tables=None, "
        "max_token_per_sequence=None, max_sequence_kv=None, fixed_split_size=None, disable_split_kv=False",
    ),
    (
        flashinfer.BatchPrefillWithPagedKVCacheWrapper.run,
        f"self, q, paged_kv_cache, *args, {SCALES}, {RESULTS}, window_left=None, sinks=None, kv_cache_sf=None, "
        "skip_softmax_threshold_scale_factor=None, use_fp16_softmax=None, uses_spcompress=None",
    ),
    *(
        (method, f"self, q, paged_kv_cache, {OLD}, k_scale=None, v_scale=None, {OLD_SCORES}")
        for method in (
            flashinfer.BatchPrefillWithPagedKVCacheWrapper.forward,
            flashinfer.BatchPrefillWithPagedKVCacheWrapper.forward_return_lse,
        )
    ),
    (
        flashinfer.BatchPrefillWithRaggedKVCacheWrapper,
        f"{GRAPH}, qo_indptr_buf=None, kv_indptr_buf=None, custom_mask_buf=None, mask_indptr_buf=None, backend='auto', "
        "jit_args=None, jit_kwargs=None",
    ),
    (
        flashinfer.BatchPrefillWithRaggedKVCacheWrapper.plan,
        "self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo=None, custom_mask=None, "
        f"packed_custom_mask=None, {OLD}, {OLD_SCORES}, q_data_type='float16', kv_data_type=None, o_data_type=None, "
        f"non_blocking=True, {ITEMS}, fixed_split_size=None, disable_split_kv=False, seq_lens=None, seq_lens_q=None, "
        "max_token_per_sequence=None, max_sequence_kv=None, v_indptr=None, o_indptr=None",
    ),
    (
        flashinfer.BatchPrefillWithRaggedKVCacheWrapper.run,
        f"self, q, k, v, *args, {SCALES}, o_scale=None, {RESULTS}, kv_cache_sf=None",
    ),
    *(
        (method, f"self, q, k, v, {OLD}, {OLD_SCORES}")
        for method in (
            flashinfer.BatchPrefillWithRaggedKVCacheWrapper.forward,
            flashinfer.BatchPrefillWithRaggedKVCacheWrapper.forward_return_lse,
        )
    ),
    (flashinfer.MultiLevelCascadeAttentionWrapper.run, "self, q, paged_kv_cache"),
    (
        flashinfer.MultiLevelCascadeAttentionWrapper,
        "num_levels, float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False, qo_indptr_buf_arr=None, "
        "paged_kv_indptr_buf_arr=None, paged_kv_indices_buf_arr=None, paged_kv_last_page_len_buf_arr=None",
    ),
    (
        flashinfer.MultiLevelCascadeAttentionWrapper.plan,
        "self, qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len, num_qo_heads, num_kv_heads, "
        "head_dim, page_size, causal=False, pos_encoding_mode='NONE', use_fp16_qk_reduction=False, sm_scale=None, "
        "window_left=-1, logits_soft_cap=None, rope_scale=None, rope_theta=None, q_data_type='float16', kv_data_type=None",
    ),
    (flashinfer.merge_state, "v_a, s_a, v_b, s_b"),
    (flashinfer.merge_state_in_place, "v, s, v_other, s_other, mask=None"),
    (flashinfer.merge_states, "v, s"),
    (
        flashinfer.append_paged_kv_cache,
        "append_key, append_value, batch_indices, positions, paged_kv_cache, kv_indices, kv_indptr, kv_last_page_len, "
        "kv_layout='NHD'",
    ),
    (flashinfer.get_batch_indices_positions, "append_indptr, seq_lens, nnz, batch_indices=None, positions=None"),
    (flashinfer.get_seq_lens, "kv_indptr, kv_last_page_len, page_size"),
    (flashinfer.rmsnorm, "input, weight, eps=1e-06, out=None, enable_pdl=None"),
    (flashinfer.fused_add_rmsnorm, "input, residual, weight, eps=1e-06, enable_pdl=None"),
    (flashinfer.silu_and_mul, "input, out=None, enable_pdl=None"),
    (flashinfer.sampling_from_probs, f"probs, indices=None, {DRAWN}, return_valid=False"),
    (flashinfer.top_p_sampling_from_probs, f"probs, top_p, indices=None, {DRAWN}, return_valid=False"),
    (
        flashinfer.top_k_top_p_sampling_from_logits,
        f"logits, top_k, top_p, indices=None, filter_apply_order='top_k_first', {DRAWN}",
    ),
    (
        flashinfer.apply_rope_pos_ids,
        "q, k, pos_ids, rotary_dim=None, interleave=False, rope_scale=1, rope_theta=10000.0",
    ),
    (
        flashinfer.apply_rope_with_cos_sin_cache,
        "positions, query, key, head_size, cos_sin_cache, is_neox=True",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "expected"), EXPECTED, ids=[f"{f.__module__}.{f.__qualname__}" for f, _ in EXPECTED]
)
def test_signature(function: Callable[..., Any], expected: str) -> None:
    names = []
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.VAR_POSITIONAL:
            names.append(f"*{p.name}")
            continue
        behind_a_star = any(name.startswith("*") for name in names)
        assert p.kind is (p.KEYWORD_ONLY if behind_a_star else p.POSITIONAL_OR_KEYWORD), p
        names.append(p.name if p.default is p.empty else f"{p.name}={p.default!r}")
    assert ", ".join(names) == expected


@pytest.mark.parametrize(
    "wrapper",
    [
        flashinfer.BatchDecodeWithPagedKVCacheWrapper,
        flashinfer.BatchPrefillWithPagedKVCacheWrapper,
        flashinfer.BatchPrefillWithRaggedKVCacheWrapper,
    ],
)
def test_begin_forward_is_plan(wrapper: Any) -> None:
    assert wrapper.begin_forward is wrapper.plan
