"""The LSE that peers' own kernels return for the same inputs: base, layout, what a row without keys has, and sinks. Ours under
their names are equal to rounding; a peer that is not there is skipped, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from bench.harness.peers import PeerAbsentError, require
from fastattn import fa3, ops

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
Lse = Callable[..., Tensor]


def torchs_fa2(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """FlashAttention-2 inside torch."""
    attend = torch.ops.aten._flash_attention_forward
    return attend(q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False)[1]


def flash_attn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return require("flash_attn").flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)[1]


def fa3s_wheel(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return require("fa3_fwd_interface").flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)[1]


def ours_as_fa2(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return fastattn.flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)[1]


def ours_as_fa3(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return fa3.flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)[1]


# A peer, and ours under its name.
BATCH: list[tuple[Lse, Lse]] = [(torchs_fa2, ours_as_fa2), (flash_attn, ours_as_fa2), (fa3s_wheel, ours_as_fa3)]
SIZES = [(200, 200, True), (1, 3001, False), (65, 257, True), (200, 77, True)]  # of the last one 123 rows see no key


def drawn(*shape: int) -> Tensor:
    gen = torch.Generator(DEVICE).manual_seed(sum(shape))
    return torch.randn(shape, generator=gen, device=DEVICE, dtype=torch.bfloat16)


def of_peer(peer: Lse, *args: Any, **options: Any) -> Tensor:
    try:
        return peer(*args, **options)
    except PeerAbsentError as absent:
        pytest.skip(str(absent))


def assert_same_lse(ours: Tensor, theirs: Tensor) -> None:
    """Sums of as many exponentials in fp32, in another order, of products that the tensor cores add up in another one."""
    assert ours.shape == theirs.shape, f"ours {tuple(ours.shape)}, the peer's {tuple(theirs.shape)}"
    assert theirs.dtype is torch.float32
    seen = theirs.isfinite()
    assert torch.equal(ours[~seen], theirs[~seen]), "rows without keys"
    assert torch.equal(seen, ours.isfinite()), "rows without keys"
    if seen.any():
        error, largest = (ours - theirs)[seen].abs().max(), theirs[seen].abs().max()
        assert float(error) <= 1e-5 * max(20.0, float(largest)), f"differ by {float(error):.2e}"


@pytest.mark.parametrize(("queries", "keys", "causal"), SIZES)
@pytest.mark.parametrize(("peer", "ours"), BATCH, ids=lambda of: of.__name__)
def test_batch(peer: Lse, ours: Lse, queries: int, keys: int, causal: bool) -> None:
    q, k, v = drawn(2, queries, 8, 128), drawn(2, keys, 2, 128), drawn(2, keys, 2, 128)
    assert_same_lse(ours(q, k, v, causal), of_peer(peer, q, k, v, causal))


@pytest.mark.parametrize(("peer", "ours"), BATCH, ids=lambda of: of.__name__)
def test_without_any_key(peer: Lse, ours: Lse) -> None:
    q, k = drawn(2, 5, 8, 128), drawn(2, 0, 2, 128)
    theirs = of_peer(peer, q, k, k, False)
    assert (theirs == torch.inf).all()
    assert_same_lse(ours(q, k, k, False), theirs)


def test_cudnn() -> None:
    """Natural, one row after the other; of masks it has top-left ones, so there is no row without keys."""
    q, k, v = (drawn(2, 200, 8, 64).transpose(1, 2) for _ in range(3))
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    try:
        theirs = attend(q, k, v, None, True, 0.0, True, False)[1]
    except RuntimeError as error:
        pytest.skip(f"torch's cuDNN has no such attention here: {error}"[:200])
    _, ours = ops.batch_attention(*(t.transpose(1, 2) for t in (q, k, v)), causal=True)
    assert_same_lse(ours, theirs.reshape(ours.shape))


# Packed: the second sequence has no keys, the third more queries than keys.
LENGTHS, KEY_LENGTHS = [65, 7, 40, 130], [65, 0, 9, 300]


def torchs_fa2_varlen(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, key_starts: Tensor) -> Tensor:
    attend = torch.ops.aten._flash_attention_forward
    return attend(q, k, v, starts, key_starts, max(LENGTHS), max(KEY_LENGTHS), 0.0, True, False)[1]


def _varlen(attend: Callable[..., Any], *packed: Tensor) -> Tensor:
    return attend(*packed, max(LENGTHS), max(KEY_LENGTHS), causal=True, return_attn_probs=True)[1]


def flash_attn_varlen(*packed: Tensor) -> Tensor:
    return _varlen(require("flash_attn").flash_attn_varlen_func, *packed)


def fa3s_wheel_varlen(*packed: Tensor) -> Tensor:
    return _varlen(require("fa3_fwd_interface").flash_attn_varlen_func, *packed)


def ours_as_fa2_varlen(*packed: Tensor) -> Tensor:
    return _varlen(fastattn.flash_attn_varlen_func, *packed)


def ours_as_fa3_varlen(*packed: Tensor) -> Tensor:
    return _varlen(fa3.flash_attn_varlen_func, *packed)


VARLEN: list[tuple[Lse, Lse]] = [
    (torchs_fa2_varlen, ours_as_fa2_varlen),
    (flash_attn_varlen, ours_as_fa2_varlen),
    (fa3s_wheel_varlen, ours_as_fa3_varlen),
]


def starts_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


@pytest.mark.parametrize(("peer", "ours"), VARLEN, ids=lambda of: of.__name__)
def test_packed(peer: Lse, ours: Lse) -> None:
    q, k, v = drawn(sum(LENGTHS), 8, 128), drawn(sum(KEY_LENGTHS), 2, 128), drawn(sum(KEY_LENGTHS), 2, 128)
    packed = (q, k, v, starts_of(LENGTHS), starts_of(KEY_LENGTHS))
    assert_same_lse(ours(*packed), of_peer(peer, *packed))


@pytest.mark.parametrize("with_sinks", [False, True])
def test_pages_of_vllms_fa3(with_sinks: bool) -> None:
    """vLLM's build of FlashAttention-3, which has sinks, over pages of 16: what its cascades merge by."""
    lengths, runs = torch.tensor([300, 40], device=DEVICE).int(), [3, 2]
    q, pools = drawn(5, 8, 128), [drawn(25, 16, 2, 128) for _ in range(2)]
    table = torch.arange(2 * 19, device=DEVICE).int().view(2, 19) % 25
    sinks = {"s_aux": torch.linspace(-2, 3, 8, device=DEVICE).bfloat16()} if with_sinks else {}

    def peer() -> Tensor:
        return require("vllm.vllm_flash_attn").flash_attn_varlen_func(
            q, *pools, max_seqlen_q=3, cu_seqlens_q=starts_of(runs), max_seqlen_k=300, seqused_k=lengths, causal=True,
            block_table=table, fa_version=3, return_softmax_lse=True, **sinks,
        )[1]  # fmt: skip

    theirs = of_peer(peer)
    _, ours = ops.paged_attention(q, *pools, starts_of(runs), lengths, table, 3, sinks=sinks.get("s_aux"))
    assert_same_lse(ours, theirs)
