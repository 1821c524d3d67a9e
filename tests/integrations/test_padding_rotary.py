"""bert_padding and layers.rotary."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastattn import bert_padding, rotary
from tests.integrations.reference import rotate


def test_unpad_and_pad() -> None:
    x = torch.randn(3, 5, 2, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]])
    tokens, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask)
    assert torch.equal(tokens, x[mask.bool()]) and indices.tolist() == [1, 2, 4, 10, 11]
    assert cu_seqlens.tolist() == [0, 3, 3, 5] and cu_seqlens.dtype == torch.int32
    assert longest == 3 and isinstance(longest, int) and used.tolist() == [3, 0, 2]
    back = bert_padding.pad_input(tokens, indices, 3, 5)
    assert torch.equal(back, x * mask[:, :, None, None])
    torch.autograd.gradcheck(lambda x: bert_padding.unpad_input(x, mask)[0], x)
    torch.autograd.gradcheck(lambda t: bert_padding.pad_input(t, indices, 3, 5), tokens.detach().requires_grad_())


def test_unused_tokens_are_kept_and_not_counted() -> None:
    x = torch.randn(2, 3, 4)
    mask, unused = torch.tensor([[1, 0, 0], [1, 1, 0]]), torch.tensor([[0, 1, 0], [0, 0, 1]])
    tokens, _, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask.bool(), unused.bool())
    assert torch.equal(tokens, x[(mask + unused).bool()])
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 2, 5], 3, [1, 2])


def test_several_sequences_in_a_row() -> None:
    x = torch.randn(2, 6, 4)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    tokens, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert torch.equal(tokens, torch.cat((x[0, :5], x[1]))) and indices.tolist() == [0, 1, 2, 3, 4, *range(6, 12)]
    assert (cu_seqlens.tolist(), longest) == ([0, 2, 5, 11], 6)


def tables(length: int, half: int) -> tuple[Tensor, Tensor]:
    angle = torch.rand(length, half, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 6
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offsets", [0, 3, torch.tensor([4, 0])])
@pytest.mark.parametrize("packed", [False, True])
def test_rotary(interleaved: bool, inplace: bool, offsets: int | Tensor, packed: bool) -> None:
    cos, sin = (t.float() for t in tables(20, 6))
    x = torch.randn(2, 5, 3, 16)
    first = torch.tensor([offsets, offsets]) if isinstance(offsets, int) else offsets
    place = first.unsqueeze(1) + torch.arange(5)
    expected = rotate(x, cos[place], sin[place], interleaved)
    cu_seqlens = torch.tensor([0, 5, 10], dtype=torch.int32) if packed else None
    given = (x.flatten(0, 1) if packed else x).clone().requires_grad_()
    arg = given * 1.0
    found = rotary.apply_rotary_emb(arg, cos, sin, interleaved, inplace, offsets, cu_seqlens, 5)
    torch.testing.assert_close(found.view(x.shape), expected, atol=1e-5, rtol=1e-5)
    assert inplace == (found.data_ptr() == arg.data_ptr())
    # The rotation's gradient is the rotation back.
    upstream = torch.randn_like(found)
    (grad,) = torch.autograd.grad(found, given, upstream)
    back = rotate(upstream.view(x.shape), cos[place], -sin[place], interleaved)
    torch.testing.assert_close(grad.view(x.shape), back, atol=1e-5, rtol=1e-5)


def test_plain_torch_version_takes_angles_of_each_sequence() -> None:
    cos, sin = tables(20, 4)
    x, place = torch.randn(2, 5, 3, 12, dtype=torch.float64), torch.randint(0, 20, (2, 5))
    for interleaved in (False, True):
        found = rotary.apply_rotary_emb_torch(x, cos[place], sin[place], interleaved)
        torch.testing.assert_close(found, rotate(x, cos[place], sin[place], interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scale_base", [None, 512.0])
@pytest.mark.parametrize("offset", [0, torch.tensor([2, 1])])
def test_rotary_embedding_module(interleaved: bool, scale_base: float | None, offset: int | Tensor) -> None:
    module = rotary.RotaryEmbedding(8, interleaved=interleaved, scale_base=scale_base)
    qkv = torch.randn(2, 6, 3, 4, 16)
    q, k, v = (t.clone() for t in qkv.unbind(2))
    longest = None if isinstance(offset, int) else 8
    found = module(qkv.clone(), seqlen_offset=offset, max_seqlen=longest)
    also = module(torch.cat((q, k, v), 2), seqlen_offset=offset, max_seqlen=longest, num_heads_q=4)
    q_alone, kv = module(q.clone(), torch.stack((k, v), 2), seqlen_offset=offset, max_seqlen=longest)
    length = 6 if longest is None else 8
    position = torch.arange(length, dtype=torch.float64)
    angle = position.unsqueeze(1) / 10000.0 ** (torch.arange(0, 8, 2) / 8)
    scale = torch.ones_like(angle)
    if scale_base is not None:
        scale = ((torch.arange(0, 8, 2) + 3.2) / 11.2) ** ((position.unsqueeze(1) - length // 2) / scale_base)
    first = torch.zeros(2, 1, dtype=torch.long) if isinstance(offset, int) else offset.unsqueeze(1)
    cos, sin, scale = (t[first + torch.arange(6)].float() for t in (angle.cos(), angle.sin(), scale))
    expected_q = rotate(q, cos * scale, sin * scale, interleaved)
    expected_k = rotate(k, cos / scale, sin / scale, interleaved)
    for turned in (found.unbind(2), also.split(4, 2), (q_alone, *kv.unbind(2))):
        for a, b in zip(turned, (expected_q, expected_k, v), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_gradients_go_through_the_module() -> None:
    module = rotary.RotaryEmbedding(16)
    x = torch.randn(2, 6, 3, 4, 16, requires_grad=True)
    upstream = torch.randn_like(x)
    (grad,) = torch.autograd.grad(module(x * 1.0), x, upstream)
    leaf = x.detach().clone().requires_grad_()
    cos, sin, _, _ = module._tables
    q, k, v = leaf.unbind(2)
    plain = [rotary.apply_rotary_emb_torch(t, cos, sin) for t in (q, k)]
    (expected,) = torch.autograd.grad(torch.stack((*plain, v), 2), leaf, upstream)
    torch.testing.assert_close(grad, expected)
    with torch.no_grad():
        assert module(torch.randn(2, 9, 3, 4, 16)).shape[1] == 9  # the table has grown
