"""fastattn.sdpa is torch's scaled_dot_product_attention."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fastattn


def make(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def same(inputs: list[torch.Tensor], **options: Any) -> None:
    found, expected = fastattn.sdpa(*inputs, **options), F.scaled_dot_product_attention(*inputs, **options)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    tolerance = 1e-5 if found.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    upstream = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(x, inputs, upstream) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


OURS: list[tuple[list[tuple[int, ...]], dict[str, Any]]] = [
    ([(2, 4, 7, 32)] * 3, {}),
    ([(2, 4, 7, 32)] * 3, {"is_causal": True}),
    ([(2, 4, 5, 32), (2, 4, 9, 32), (2, 4, 9, 32)], {"is_causal": True}),  # top-left
    ([(2, 4, 9, 32), (2, 4, 5, 32), (2, 4, 5, 32)], {"is_causal": True}),
    ([(2, 6, 7, 40), (2, 2, 8, 40), (2, 2, 8, 40)], {"enable_gqa": True, "scale": 0.3}),
    ([(2, 4, 7, 32), (2, 4, 8, 32), (2, 4, 8, 16)], {}),  # V's own head dim
    ([(3, 7, 20), (3, 8, 20), (3, 8, 12)], {}),  # no batch; head dims that are filled up
    ([(2, 3, 4, 7, 16)] * 3, {"is_causal": True}),
    ([(2, 2, 5, 16), (2, 2, 8, 16), (2, 2, 8, 16)], {"attn_mask": causal_lower_right(5, 8)}),
    ([(2, 2, 5, 16), (2, 2, 8, 16), (2, 2, 8, 16)], {"attn_mask": causal_upper_left(5, 8)}),
]


@pytest.mark.parametrize("case", range(len(OURS)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours(case: int, dtype: torch.dtype) -> None:
    shapes, options = OURS[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(make(shapes, dtype), **options)


THEIRS: list[tuple[list[tuple[int, ...]], dict[str, Any], str]] = [
    ([(2, 4, 7, 16)] * 3, {"attn_mask": torch.ones(7, 7).tril().bool()}, "attn_mask is given"),
    ([(2, 4, 7, 16)] * 3, {"attn_mask": torch.randn(1, 4, 7, 7)}, "attn_mask is given"),
    ([(2, 4, 7, 264)] * 3, {}, "has shape"),
    ([(2, 4, 7, 16), (1, 4, 7, 16), (1, 4, 7, 16)], {}, "the shapes broadcast"),
]


@pytest.mark.parametrize("case", range(len(THEIRS)))
def test_what_goes_to_torch_says_so(case: int) -> None:
    shapes, options, reason = THEIRS[case]
    with pytest.warns(UserWarning, match=f"sdpa: .*{reason}.*torch's own"):
        same(make(shapes), **options)


def test_dropout_is_torchs() -> None:
    inputs = make([(1, 1, 64, 16)] * 3)
    with pytest.warns(UserWarning, match=r"dropout_p is 0\.5"):
        out = fastattn.sdpa(*inputs, dropout_p=0.5)
    assert not torch.allclose(out, F.scaled_dot_product_attention(*inputs))


def test_a_query_without_keys_gives_zero() -> None:
    q, k, v = make([(1, 2, 3, 16)] * 3)
    assert (fastattn.sdpa(q, k[:, :, :0], v[:, :, :0]) == 0).all()
    mask = torch.tensor([[True] * 3, [False] * 3, [True] * 3])
    with pytest.warns(UserWarning, match="attn_mask"):
        out = fastattn.sdpa(q, k, v, mask)
    assert (out[:, :, 1] == 0).all() and not out.isnan().any()


def test_replaced_in_a_block_and_in_this_thread_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.integrations import sdpa as module

    calls = []
    batch_attention = module.batch_attention
    monkeypatch.setattr(module, "batch_attention", lambda *a, **kw: (calls.append(1), batch_attention(*a, **kw))[1])
    q, k, v = make([(1, 2, 3, 16)] * 3)
    expected = F.scaled_dot_product_attention(q, k, v)
    with fastattn.replace_sdpa():
        torch.testing.assert_close(torch.nn.functional.scaled_dot_product_attention(q, k, v), expected)
        assert len(calls) == 1
        thread = threading.Thread(target=F.scaled_dot_product_attention, args=(q, k, v))
        thread.start()
        thread.join()
        assert len(calls) == 1
        with pytest.warns(UserWarning, match="attn_mask"):  # torch's own from inside is not replaced again
            F.scaled_dot_product_attention(q, k, v, torch.ones(3, 3, dtype=torch.bool))
    F.scaled_dot_product_attention(q, k, v)
    assert len(calls) == 1


def test_compiles() -> None:
    inputs = make([(2, 4, 7, 32), (2, 4, 5, 32), (2, 4, 5, 32)])
    compiled = torch.compile(lambda *qkv: fastattn.sdpa(*qkv, is_causal=True), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), fastattn.sdpa(*inputs, is_causal=True))
