"""Errors, compilation and CUDA graphs of flash-attn's functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastattn
from tests.integrations.reference import attention


def make(*shape: int, **options: Any) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), **options)


Q, KV = make(2, 4, 4, 16), make(2, 6, 2, 16)
CACHE = make(2, 8, 2, 16)
NEW = make(2, 1, 2, 16)
LENGTHS = torch.tensor([3, 8], dtype=torch.int32)
COS = make(8, 8)

# What is called, and what the error says; all are RuntimeErrors unless said otherwise, as in flash-attn.
ERRORS: list[tuple[Callable[[], Any], str, type[Exception]]] = [
    (lambda: fastattn.flash_attn_func(Q, KV, KV, 0.1), r"dropout_p is 0\.1, expected 0", NotImplementedError),
    (lambda: fastattn.flash_attn_func(Q.double(), KV, KV), "q is torch.float64, expected fp16 or bf16", RuntimeError),
    (lambda: fastattn.flash_attn_func(Q, KV.half(), KV), "k is torch.float16 and q is torch.float32", RuntimeError),
    (lambda: fastattn.flash_attn_func(*[make(1, 1, 1, 264)] * 3), "head dimension at most 256", RuntimeError),
    (lambda: fastattn.flash_attn_func(make(2, 4, 3, 16), KV, KV), "must divide number of heads in query", RuntimeError),
    (lambda: fastattn.flash_attn_func(Q, KV[:1], KV[:1]), "batch_attention: .*shape", ValueError),
    (lambda: fastattn.flash_attn_func(None, KV, KV), "q is a NoneType", TypeError),
    (lambda: fastattn.flash_attn_qkvpacked_func(KV), r"qkv has shape .* expected \(B, S, 3, H, D\)", ValueError),
    (lambda: fastattn.flash_attn_with_kvcache(Q, CACHE, CACHE, NEW), "value must also be passed in", RuntimeError),
    (lambda: fastattn.flash_attn_with_kvcache(Q, CACHE, CACHE, NEW, NEW), "cache_seqlens must also", RuntimeError),
    (
        lambda: fastattn.flash_attn_with_kvcache(Q, CACHE, CACHE, NEW, NEW, cache_seqlens=LENGTHS),
        r"cache_seqlens\[1\] is 8, expected 0 ≤ cache_seqlens ≤ 7",
        ValueError,
    ),
    (
        lambda: fastattn.flash_attn_with_kvcache(
            Q, CACHE.clone(), CACHE.clone(), NEW, NEW, cache_seqlens=4, cache_batch_idx=torch.tensor([1, 1])
        ),
        r"cache_batch_idx\[0\] and \[1\] are both 1, and k is written to its places 4 to 4 for the one and 4 to 4 for the other",
        ValueError,
    ),
    (
        lambda: fastattn.flash_attn_with_kvcache(Q, CACHE, CACHE, rotary_cos=COS, rotary_sin=COS),
        "rotary needs the new key and value",
        RuntimeError,
    ),
    (
        lambda: fastattn.flash_attn_with_kvcache(Q, CACHE, CACHE, NEW, NEW, COS, None, 3),
        "rotary sin must also be provided",
        RuntimeError,
    ),
    (
        lambda: fastattn.flash_attn_with_kvcache(
            Q, CACHE, CACHE, cache_batch_idx=LENGTHS, block_table=torch.zeros(2, 1, dtype=torch.int32)
        ),
        "Paged KVcache does not support cache_batch_idx",
        RuntimeError,
    ),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(ERRORS)))
def test_errors(index: int) -> None:
    call, message, kind = ERRORS[index]
    with pytest.raises(kind, match=message):
        call()


def test_sequences_of_one_row_of_the_cache() -> None:
    """Two may read a row, and append to it at different places; what both see is there."""
    keys, values, row = CACHE.clone(), 2 * CACHE, torch.tensor([1, 1])
    lengths = torch.tensor([4, 3], dtype=torch.int32)
    read = fastattn.flash_attn_with_kvcache(Q, keys, values, cache_seqlens=lengths, cache_batch_idx=row)
    for b in (0, 1):
        own = slice(0, int(lengths[b]))
        torch.testing.assert_close(read[b : b + 1], attention(Q[b : b + 1], keys[1:, own], values[1:, own])[0])
    out = fastattn.flash_attn_with_kvcache(Q, keys, values, NEW, 3 * NEW, cache_seqlens=lengths, cache_batch_idx=row)
    assert torch.equal(keys[0], CACHE[0]) and torch.equal(keys[1, [4, 3]], NEW[:, 0])
    for b in (0, 1):
        own = slice(0, int(lengths[b]) + 1)
        torch.testing.assert_close(out[b : b + 1], attention(Q[b : b + 1], keys[1:, own], values[1:, own])[0])


def test_defaults_of_the_cache() -> None:
    """The whole cache without cache_seqlens; an int for all; a window as a tensor; no gradient, whatever comes in."""
    q = Q.clone().requires_grad_()
    out = fastattn.flash_attn_with_kvcache(q, CACHE, CACHE)
    assert not out.requires_grad
    torch.testing.assert_close(out, attention(Q, CACHE, CACHE)[0], atol=1e-5, rtol=1e-5)
    out = fastattn.flash_attn_with_kvcache(q, CACHE, CACHE, cache_seqlens=5, window_size=torch.tensor([2, 1]))
    expected, _ = attention(Q, CACHE[:, :5], CACHE[:, :5], window=(2, 1))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    view = torch.cat((CACHE, CACHE), 1)[:, :8]  # rows of a longer cache
    leftpad = torch.tensor([1, 0], dtype=torch.int32)
    out = fastattn.flash_attn_with_kvcache(q, view, CACHE, cache_seqlens=LENGTHS, cache_leftpad=leftpad, causal=True)
    expected, _ = attention(Q, CACHE, CACHE, lengths_k=LENGTHS, leftpad=leftpad, causal=True)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_a_window_that_holds_the_whole_cache_is_none() -> None:
    """As in flash-attn: then all queries are rotated to one position, as without a window and a causal mask."""
    new, lengths = make(2, 4, 2, 16), torch.tensor([1, 3], dtype=torch.int32)
    out = [
        fastattn.flash_attn_with_kvcache(
            Q, CACHE.clone(), CACHE.clone(), new, new, COS, COS, lengths, window_size=window
        )
        for window in ((-1, -1), (8, 9), (7, 9))
    ]
    assert torch.equal(out[0], out[1]) and not torch.equal(out[0], out[2])


def test_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fastattn.flash_attn_func(Q, KV.half(), KV)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attention(Q, KV, KV)[0], atol=2e-2, rtol=2e-2)


def test_lengths_may_be_tensors() -> None:
    cu = torch.tensor([0, 3, 8], dtype=torch.int32)
    q = make(8, 2, 16)
    found = fastattn.flash_attn_varlen_func(q, q, q, cu, cu, torch.tensor(5), torch.tensor(5), causal=True)
    assert torch.equal(found, fastattn.flash_attn_varlen_func(q, q, q, cu, cu, 5, 5, causal=True))


def calls(device: str, dtype: torch.dtype) -> dict[str, tuple[Callable[..., Any], list[torch.Tensor]]]:
    def on(*shape: int) -> torch.Tensor:
        return make(*shape).to(device, dtype)

    cu = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
    longest, lengths = torch.tensor(5, device=device), torch.tensor([3, 5], dtype=torch.int32, device=device)
    cos, sin = on(16, 8), on(16, 8)
    cache = [on(2, 16, 2, 32), on(2, 16, 2, 32)]
    return {
        "qkvpacked": (lambda x: fastattn.flash_attn_qkvpacked_func(x, causal=True), [on(2, 9, 3, 4, 40)]),
        "kvpacked": (
            lambda q, kv: fastattn.flash_attn_kvpacked_func(q, kv, softcap=5.0),
            [on(2, 9, 4, 32), on(2, 7, 2, 2, 32)],
        ),
        "varlen": (
            lambda q, k, v: fastattn.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True),
            [on(8, 4, 32), on(8, 2, 32), on(8, 2, 32)],
        ),
        "kvcache": (
            lambda q, k, v: fastattn.flash_attn_with_kvcache(
                q, *cache, k, v, cos, sin, lengths, cache_leftpad=lengths - 2, causal=True, window_size=(4, 0)
            ),
            [on(2, 2, 4, 32), on(2, 2, 2, 32), on(2, 2, 2, 32)],
        ),
    }


@pytest.mark.parametrize("name", calls("cpu", torch.float32))
def test_compiles_without_a_graph_break(name: str) -> None:
    function, inputs = calls("cpu", torch.float32)[name]
    expected = function(*inputs)
    leaves = [x.clone().requires_grad_(name != "kvcache") for x in inputs]
    found = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(found, expected)
    if name != "kvcache":
        found.sum().backward()
        others = [x.clone().requires_grad_() for x in inputs]
        function(*others).sum().backward()
        for a, b in zip(leaves, others, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qkvpacked", "kvpacked", "varlen", "kvcache"])
def test_cuda_graph(name: str) -> None:
    function, inputs = calls("cuda", torch.bfloat16)[name]
    expected = function(*inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function(*inputs)
    found.zero_()
    graph.replay()
    torch.testing.assert_close(found, expected)


def test_packed_views_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.integrations import flash_attn

    seen: list[torch.Tensor] = []
    real = flash_attn.batch_attention

    def spy(*qkv: torch.Tensor, **options: Any) -> Any:
        seen.extend(qkv)
        return real(*qkv, **options)

    monkeypatch.setattr(flash_attn, "batch_attention", spy)
    qkv = make(2, 5, 3, 4, 32)
    fastattn.flash_attn_qkvpacked_func(qkv)
    assert [t.untyped_storage().data_ptr() for t in seen] == [qkv.untyped_storage().data_ptr()] * 3


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, lambda f: lambda q: torch.func.vjp(f, q)])
def test_torch_refuses_transforms_for_gradients(transform: Callable[..., Any]) -> None:
    """Never a wrong gradient: it is torch's own error for whatever has a registered backward, as the documentation says."""
    with pytest.raises(RuntimeError, match="setup_context"):
        transform(lambda q: fastattn.flash_attn_func(q, KV, KV).sum())(Q)


def test_the_transforms_that_there_are() -> None:
    many = torch.stack([Q, 2 * Q])
    found = torch.func.vmap(lambda q: fastattn.flash_attn_func(q, KV, KV))(many)
    assert torch.equal(found, torch.stack([fastattn.flash_attn_func(q, KV, KV) for q in many]))
    with pytest.raises(ValueError, match=r"q has a tangent.* no forward mode"):
        torch.func.jvp(lambda q: fastattn.flash_attn_func(q, KV, KV), (Q,), (Q,))
