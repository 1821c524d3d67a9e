"""fastattn.fa3: what is not flash-attn 2's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastattn import fa3
from tests.integrations.reference import attention


def make(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_fourth_argument_is_the_scale_and_lse_is_minus_infinity() -> None:
    q, k, v = make(2, 7, 4, 32), make(2, 4, 2, 32, seed=1), make(2, 4, 2, 32, seed=2)
    out, lse = fa3.flash_attn_func(q, k, v, 0.3, True, return_attn_probs=True)
    expected, expected_lse = attention(q, k, v, scale=0.3, causal=True)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)
    assert (lse[:, :, :3] == -math.inf).all() and isinstance(fa3.flash_attn_func(q, k, v), torch.Tensor)
    out, lse = fa3.flash_attn_func(q, k[:, :0], v[:, :0], return_attn_probs=True)
    assert (out == 0).all() and (lse == math.inf).all()


@pytest.mark.parametrize("packing", ["3", "heads"])
def test_packed(packing: str) -> None:
    num_kv_heads = 4 if packing == "3" else 2
    q, k, v = make(2, 9, 4, 24), make(2, 9, num_kv_heads, 24, seed=1), make(2, 9, num_kv_heads, 24, seed=2)
    qkv = torch.stack((q, k, v), 2) if packing == "3" else torch.cat((q, k, v), 2)
    qkv = qkv.requires_grad_()
    out = fa3.flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=None if packing == "3" else 4)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    expected, _ = attention(*leaves, causal=True)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    grads = torch.autograd.grad(expected, leaves, torch.ones_like(out))
    together = torch.stack(grads, 2) if packing == "3" else torch.cat(grads, 2)
    torch.testing.assert_close(grad, together, atol=1e-5, rtol=1e-5)


def test_varlen_with_used_lengths_other_value_dim_and_sinks() -> None:
    q, k, v, sinks = make(10, 4, 32), make(12, 2, 32, seed=1), make(12, 2, 16, seed=2), make(4, seed=3)
    sinks.requires_grad_()
    cu_q, cu_k = torch.tensor([0, 4, 10], dtype=torch.int32), torch.tensor([0, 7, 12], dtype=torch.int32)
    used_q, used_k = torch.tensor([3, 6], dtype=torch.int32), torch.tensor([5, 0], dtype=torch.int32)
    out = fa3.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 6, 7, used_q, used_k, causal=True, s_aux=sinks)
    assert out.shape == (10, 4, 16)
    expected, _ = attention(q[None, :3], k[None, :5], v[None, :5], causal=True, sinks=sinks)
    torch.testing.assert_close(out[:3], expected[0], atol=1e-5, rtol=1e-5)
    assert (out[3:] == 0).all()
    found, wanted = (torch.autograd.grad(x.sum(), sinks)[0] for x in (out, expected))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_fp8() -> None:
    q, k, v = (make(2, 8, h, 32, seed=h).to(torch.float8_e4m3fn) for h in (4, 2, 2))
    scales = {f"{n}_descale": torch.full((2, 2), s) for n, s in (("q", 0.5), ("k", 2.0), ("v", 3.0))}
    out = fa3.flash_attn_func(q, k, v, causal=True, **scales)
    expected, _ = attention(q.float() * 0.5, k.float() * 2, v.float() * 3, causal=True)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("paged", [False, True])
def test_kvcache_with_packed_queries_and_new_keys(paged: bool) -> None:
    k_cache, v_cache = make(2, 12, 2, 32), make(2, 12, 2, 32, seed=1)
    q, k, v = make(4, 4, 32, seed=2), make(3, 2, 32, seed=3), make(3, 2, 32, seed=4)
    before = [4, 6]
    cu_q, cu_new = torch.tensor([0, 1, 4], dtype=torch.int32), torch.tensor([0, 1, 3], dtype=torch.int32)
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    for b, (start, end) in enumerate(((0, 1), (1, 3))):
        places = slice(before[b], before[b] + end - start)
        expected_k[b, places], expected_v[b, places] = k[start:end], v[start:end]
    arguments: dict[str, Any] = {"cache_seqlens": torch.tensor(before, dtype=torch.int32), "causal": True}
    pool_k, pool_v = k_cache.clone(), v_cache.clone()
    if paged:
        pool_k, pool_v = pool_k.view(8, 3, 2, 32), pool_v.view(8, 3, 2, 32)
        arguments["page_table"] = torch.arange(8, dtype=torch.int32).view(2, 4)
    out, lse, *rest = fa3.flash_attn_with_kvcache(
        q, pool_k, pool_v, k, v, cu_seqlens_q=cu_q, cu_seqlens_k_new=cu_new, max_seqlen_q=3, return_softmax_lse=True,
        scheduler_metadata=fa3.get_scheduler_metadata(2, 3, 12, 4, 2, 32, arguments["cache_seqlens"]), **arguments,
    )  # fmt: skip
    assert lse.shape == (4, 4) and len(rest) == 2
    assert torch.equal(pool_k.view(k_cache.shape), expected_k) and torch.equal(pool_v.view(k_cache.shape), expected_v)
    for b, (start, end, total) in enumerate(((0, 1, 5), (1, 4, 8))):
        one, one_lse = attention(
            q[None, start:end], expected_k[b : b + 1, :total], expected_v[b : b + 1, :total], causal=True
        )
        torch.testing.assert_close(out[start:end], one[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[:, start:end], one_lse[0], atol=1e-5, rtol=1e-5)


def test_rotation_from_a_position_of_its_own() -> None:
    cache, q, k = make(1, 8, 2, 32), make(1, 1, 2, 32, seed=1), make(1, 1, 2, 32, seed=2)
    cos, sin = make(8, 8, seed=3).cos(), make(8, 8, seed=3).sin()
    found = []
    for start in (5, 2):
        k_cache, lengths = cache.clone(), torch.tensor([3], dtype=torch.int32)
        fa3.flash_attn_with_kvcache(
            q, k_cache, cache.clone(), k, k, rotary_cos=cos, rotary_sin=sin, cache_seqlens=lengths, causal=True,
            rotary_seqlens=torch.tensor([start], dtype=torch.int32),
        )  # fmt: skip
        found.append(k_cache[0, 3])
    assert not torch.equal(*found)


def test_combine() -> None:
    q, k, v = make(2, 5, 4, 16), make(2, 12, 4, 16, seed=1), make(2, 12, 4, 16, seed=2)
    parts = [attention(q, k[:, a:b], v[:, a:b]) for a, b in ((0, 3), (3, 10), (10, 12))]
    outs, lses = torch.stack([o for o, _ in parts]), torch.stack([lse.transpose(1, 2) for _, lse in parts])
    empty = torch.full_like(outs[:1], math.nan), torch.full_like(lses[:1], -math.inf)
    out, lse = fa3.flash_attn_combine(
        torch.cat((outs, empty[0])), torch.cat((lses, empty[1])), out_dtype=torch.bfloat16
    )
    expected, expected_lse = attention(q, k, v)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, expected_lse.transpose(1, 2))
    given = torch.empty(2, 5, 4, 16)
    assert fa3.flash_attn_combine(outs, lses, given)[0] is given
    nothing, lse = fa3.flash_attn_combine(*empty)
    assert (nothing == 0).all() and (lse == -math.inf).all()


def test_what_is_not_there_says_so() -> None:
    q = make(1, 4, 2, 16)
    with pytest.raises(NotImplementedError, match="attention_chunk is 8, expected 0"):
        fa3.flash_attn_func(q, q, q, attention_chunk=8)
    with pytest.raises(NotImplementedError, match="qv is given"):
        fa3.flash_attn_func(q, q, q, qv=q)
    with pytest.raises(NotImplementedError, match="no descale"):
        fa3.flash_attn_with_kvcache(q, q, q, q_descale=torch.ones(1, 2))
    with pytest.raises(RuntimeError, match=r"out_partial is torch\.float16.*only support fp32"):
        fa3.flash_attn_combine(q.half(), q[..., 0])
