"""fastattn.flashinfer's sampling: draws are distributed as documented, by chi-square, and repeat with their seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn.flashinfer as flashinfer

DRAWS = 20000
V = 24


def distributions(rows: int, device: str = "cpu", sharpness: float = 1.5) -> Tensor:
    logits = torch.randn(rows, V, generator=torch.Generator().manual_seed(5)) * sharpness
    return logits.softmax(-1).to(device)


def fits(tokens: Tensor, expected: Tensor) -> None:
    """Chi-square of draws (N) against probabilities (V), at 6 standard deviations; what has none is never drawn."""
    counts = torch.bincount(tokens.long().cpu(), minlength=expected.shape[0]).double()
    expected = expected.double().cpu() / expected.double().sum().cpu()
    assert counts.shape == expected.shape and (counts[expected == 0] == 0).all()
    wanted = expected * tokens.numel()
    rare = wanted < 5
    cells = torch.cat((wanted[~rare], wanted[rare].sum(0, keepdim=True)))
    found = torch.cat((counts[~rare], counts[rare].sum(0, keepdim=True)))
    found, cells = found[cells > 0], cells[cells > 0]
    statistic, freedom = ((found - cells) ** 2 / cells).sum().item(), max(len(cells) - 1, 1)
    assert statistic <= freedom + 6 * (2 * freedom) ** 0.5 + 6


def nucleus(p: Tensor, top_p: float) -> Tensor:
    ranked, order = p.double().sort(descending=True)
    kept = torch.zeros_like(p, dtype=torch.bool)
    kept[order[ranked.cumsum(0) - ranked < top_p]] = True
    return torch.where(kept, p, 0.0)


def best(p: Tensor, top_k: int) -> Tensor:
    return torch.where(p >= p.topk(top_k).values[-1], p, 0.0)


def both(p: Tensor, top_k: int, top_p: float) -> Tensor:
    left = best(p, top_k)
    return nucleus(left / left.sum(), top_p)


CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any], Callable[[Tensor], Tensor]]] = [
    ("sampling_from_probs", (), {}, lambda p: p),
    ("top_k_sampling_from_probs", (5,), {}, lambda p: best(p, 5)),
    ("top_p_sampling_from_probs", (0.7,), {}, lambda p: nucleus(p, 0.7)),
    ("min_p_sampling_from_probs", (0.2,), {}, lambda p: torch.where(p >= 0.2 * p.max(), p, 0.0)),
    ("top_k_top_p_sampling_from_probs", (6, 0.8), {}, lambda p: both(p, 6, 0.8)),
    (
        "top_k_top_p_sampling_from_probs",
        (6, 0.8),
        {"filter_apply_order": "joint"},
        lambda p: torch.where(best(p, 6) > 0, nucleus(p, 0.8), 0.0),
    ),
]


@pytest.mark.parametrize(
    ("name", "limits", "options", "expected"), CALLS, ids=[f"{name} {options}" for name, _, options, _ in CALLS]
)
def test_distributions(
    name: str,
    limits: tuple[Any, ...],
    options: dict[str, Any],
    expected: Callable[[Tensor], Tensor],
    device: str,
) -> None:
    probs = distributions(2, device)
    indices = torch.arange(2, device=device).repeat_interleave(DRAWS)
    generator = torch.Generator(device).manual_seed(1)
    call = getattr(flashinfer, name)
    tokens, valid = call(probs, *limits, indices=indices, generator=generator, return_valid=True, **options)
    assert tokens.dtype == indices.dtype and valid.all()
    for row, drawn in enumerate(tokens.chunk(2)):
        fits(drawn, expected(probs[row]))
    columns = [torch.full((2,), limit, device=device) for limit in limits]
    one = call(probs, *columns, seed=3, offset=4, **options)
    assert one.dtype == torch.int32 and torch.equal(one, call(probs, *limits, seed=3, offset=4, **options))


@pytest.mark.parametrize("order", ["top_k_first", "joint"])
def test_from_logits(order: str) -> None:
    logits = distributions(3).log() + 2.0
    call = flashinfer.top_k_top_p_sampling_from_logits
    indices = torch.tensor([0, 2, 1, 1], dtype=torch.int32)
    for seed in range(20):
        arguments: dict[str, Any] = {"indices": indices, "filter_apply_order": order, "seed": seed, "offset": 0}
        found = call(logits, 6, 0.8, **arguments)
        assert torch.equal(found, flashinfer.top_k_top_p_sampling_from_probs(logits.softmax(-1), 6, 0.8, **arguments))
    same = {"seed": 1, "offset": 2}
    expected = flashinfer.sampling_from_probs(logits.softmax(-1), **same)
    assert torch.equal(flashinfer.sampling_from_logits(logits, **same), expected)


def test_seeds_and_generators(device: str) -> None:
    probs = distributions(1, device, 0.3).expand(64, -1).contiguous()
    call = flashinfer.sampling_from_probs
    first, second = (call(probs, generator=torch.Generator(device).manual_seed(s)) for s in (0, 1))
    assert not torch.equal(first, second) and first.unique().numel() > 5  # rows differ, and calls
    assert torch.equal(first, call(probs, generator=torch.Generator(device).manual_seed(0)))
    torch.manual_seed(3)
    kept = [call(probs) for _ in range(2)]
    torch.manual_seed(3)
    assert torch.equal(kept[0], call(probs)) and not torch.equal(*kept)
    found = call(probs, seed=5, offset=7)
    tensors = [torch.tensor([n], dtype=torch.int64, device=device) for n in (5, 7)]
    assert torch.equal(found, call(probs, seed=tensors[0], offset=tensors[1]))
    assert not torch.equal(found, call(probs, seed=5, offset=8)) and not torch.equal(
        found, call(probs, seed=6, offset=7)
    )
    # A row with a seed of its own draws the same in any batch.
    seeds, offsets = torch.arange(64, device=device), torch.arange(64, device=device) * 3
    found = call(probs, seed=seeds, offset=offsets)
    assert torch.equal(found[10:20], call(probs[10:20], seed=seeds[10:20], offset=offsets[10:20]))
    large = torch.tensor([2**64 - 1], dtype=torch.uint64, device=device)
    assert torch.equal(call(probs, seed=large, offset=large), call(probs, seed=2**64 - 1, offset=2**64 - 1))


def test_rows_without_a_distribution() -> None:
    probs = distributions(3)
    probs[1] = 0.0
    probs[2, 4] = torch.nan
    tokens, valid = flashinfer.top_p_sampling_from_probs(probs, 0.9, return_valid=True)
    assert valid.tolist() == [True, False, False] and tokens[1:].tolist() == [-1, -1]
    with pytest.raises(ValueError, match="Input probs contains NaN"):
        flashinfer.sampling_from_probs(probs, check_nan=True)
    with pytest.raises(ValueError, match="Input logits contains NaN"):
        flashinfer.sampling_from_logits(probs, check_nan=True)


@pytest.mark.parametrize(
    ("name", "arguments", "options", "message"),
    [
        ("top_k_sampling_from_probs", (0,), {}, "top_k is 0, expected an int ≥ 1"),
        ("top_k_renorm_probs", (-1,), {}, "top_k is -1"),
        ("top_p_sampling_from_probs", (1.5,), {}, "top_p.* is 1.5, expected 0 ≤ top_p ≤ 1"),
        ("top_p_sampling_from_probs", (torch.ones(3),), {}, r"top_p has shape \(3,\), expected \(2,\)"),
        ("top_k_top_p_sampling_from_probs", (3, 0.5), {"filter_apply_order": "p"}, "filter_apply_order is 'p'"),
        ("sampling_from_probs", (), {"seed": 1}, "offset is None, expected seed and offset both or neither"),
        ("sampling_from_probs", (), {"seed": torch.ones(1).long(), "offset": 1}, "one of seed and offset is a tensor"),
        ("sampling_from_probs", (), {"seed": torch.ones(1), "offset": torch.ones(1)}, "seed is torch.float32"),
    ],
    ids=str,
)
def test_refused(name: str, arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(flashinfer, name)(distributions(2), *arguments, **options)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_renormalization(as_tensor: bool, device: str) -> None:
    probs = distributions(3, device)
    ks, ps = [4, 4, 4] if not as_tensor else [1, 4, V], [0.6] * 3 if not as_tensor else [0.0, 0.6, 1.0]
    k = torch.tensor(ks, dtype=torch.int32, device=device) if as_tensor else ks[0]
    p = torch.tensor(ps, device=device) if as_tensor else ps[0]
    by_k, by_p = flashinfer.top_k_renorm_probs(probs, k), flashinfer.top_p_renorm_probs(probs, p)
    for row in range(3):
        left = best(probs[row], ks[row])
        torch.testing.assert_close(by_k[row], left / left.sum())
        left = nucleus(probs[row], ps[row]) if ps[row] > 0 else best(probs[row], 1)
        torch.testing.assert_close(by_p[row], left / left.sum())
    masked = flashinfer.top_k_mask_logits(probs.log(), k)
    torch.testing.assert_close(masked.softmax(-1), by_k)
    half = probs.to(torch.bfloat16)
    assert flashinfer.top_k_renorm_probs(half, k).dtype == torch.bfloat16


def test_chain_is_distributed_as_the_target(device: str) -> None:
    """Two drafts, from another distribution: the first token is the target's, and so is the second where the first draft
    was accepted."""
    n, batch = 2, 20000
    draft, target = distributions(5, device)[:n], distributions(5, device, 0.8).roll(1, 0)[: n + 1]
    generator = torch.Generator(device).manual_seed(2)
    drafts = torch.stack([torch.multinomial(p, batch, True, generator=generator) for p in draft], 1).int()
    every = [p.expand(batch, -1, -1).contiguous() for p in (draft, target)]
    tokens, accepted, emitted = flashinfer.chain_speculative_sampling(every[0], drafts, every[1], generator=generator)
    assert tokens.dtype == accepted.dtype == emitted.dtype == torch.int32 and tokens.shape == (batch, n + 1)
    fits(tokens[:, 0], target[0])
    for i in range(n):
        fits(tokens[emitted > i, i + 1], target[i + 1])
    length = torch.arange(n + 1, device=device)
    assert ((tokens == -1) == (length > emitted.unsqueeze(1))).all()
    drawn = length[:n] < emitted.unsqueeze(1)
    assert torch.equal(tokens[:, :n][drawn], drafts[drawn]) and (accepted >= emitted).all()
    rate = torch.minimum(draft, target[:n]).sum(-1)  # of a draft that is looked at for itself
    assert abs(accepted.double().mean().item() - rate.sum().item()) < 0.03
    assert abs(emitted.double().mean().item() - (rate[0] + rate.prod()).item()) < 0.03


def test_chain_details() -> None:
    p = distributions(4, sharpness=0.5).view(2, 2, V)
    target = torch.cat((p, distributions(2).unsqueeze(1)), 1)
    drafts = torch.tensor([[1, 2], [3, 4]])
    counts = [torch.full((2,), 10, dtype=torch.int32) for _ in range(2)]
    call = flashinfer.chain_speculative_sampling
    tokens, accepted, emitted = call(p, drafts, target, *counts, seed=1, offset=0)
    assert torch.equal(tokens[:, :2], drafts.int()) and (tokens[:, 2] >= 0).all()  # the same distribution
    assert accepted is counts[0] and emitted is counts[1] and (accepted == 12).all() and (emitted == 12).all()
    impossible = target.clone()
    impossible[:, 0] = 0.0
    impossible[:, 0, 7] = 1.0
    seeds, offsets = torch.tensor([4, 5]), torch.tensor([0, 9])
    tokens, accepted, emitted = call(p, drafts, impossible, seed=seeds, offset=offsets)
    assert tokens.tolist() == [[7, -1, -1]] * 2 and (emitted == 0).all() and (accepted == 1).all()
    again = call(p[1:], drafts[1:], impossible[1:], seed=seeds[1:], offset=offsets[1:])
    assert torch.equal(again[0], tokens[1:])
    with pytest.raises(ValueError, match=r"expected \(2, 2\) and \(2, 3, 24\) from draft_probs \(2, 2, 24\)"):
        call(p, drafts, p)
