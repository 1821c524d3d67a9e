"""Names, order and defaults of every argument are flash-attn 2.8's and FlashAttention-3's: who reads signatures, as
transformers does, finds what it looks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import fastattn
from fastattn import bert_padding, fa3, rotary

TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
CU = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
DESCALE = "q_descale=None, k_descale=None, v_descale=None"
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
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "expected"), EXPECTED, ids=[f"{f.__module__}.{f.__qualname__}" for f, _ in EXPECTED]
)
def test_signature(function: Callable[..., Any], expected: str) -> None:
    parameters = inspect.signature(function).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    found = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
    assert found == expected
