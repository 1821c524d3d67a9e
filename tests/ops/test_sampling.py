"""What the table of operators does not say about sampling: the generator's known answers and the distribution."""

from __future__ import annotations

import pytest
import torch

from fastattn import ops
from fastattn.reference.philox import philox4x32, philox_first_word
from tests.harness.generators import Gen
from tests.harness.sampling_calls import sample_call

# kat_vectors of Random123: counter, key, answer.
KNOWN = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_known_answers(counter: str, key: str, answer: str) -> None:
    (c0, c1, c2, c3), (k0, k1) = _words(counter), _words(key)
    assert list(philox4x32((c0, c1, c2, c3), (k0, k1))) == _words(answer)
    tensors = [torch.tensor([w, 0]) for w in (c0, c1, c2, c3, k0, k1)]
    t0, t1, t2, t3, s0, s1 = tensors
    assert [int(w[0]) for w in philox4x32((t0, t1, t2, t3), (s0, s1))] == _words(answer)


def test_philox_takes_any_int64() -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 2**32, 123456789012345]
    positions = [0, -1, 2**32, 7, 2**63 - 1, 3, 2**40 + 1]
    alone = [philox_first_word(s, p) for s, p in zip(seeds, positions, strict=True)]
    assert philox_first_word(torch.tensor(seeds), torch.tensor(positions)).tolist() == alone
    assert all(0 <= word < 2**32 for word in alone)
    assert len(set(alone)) == len(alone)


def _chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities.double() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_distribution(device: str) -> None:
    """20,000 draws of 16 tokens: chi-square with 15 degrees of freedom stays under its 1 - 1e-6 quantile, 55.0.

    One seed with ascending positions, and one position with ascending seeds: both must look independent.
    """
    draws, vocab = 20_000, 16
    logits = Gen(seed=0).randn(1, vocab)
    for seeds, positions in (
        (torch.full((draws,), 42), torch.arange(draws)),
        (torch.arange(draws), torch.full((draws,), 7)),
    ):
        call = sample_call(Gen(device), logits.expand(draws, vocab).contiguous().to(device), 0.8)
        call |= {"seed": seeds.to(device), "position": positions.to(device)}
        counts = torch.bincount(ops.sample(**call).cpu().long(), minlength=vocab)
        assert _chi_square(counts, torch.softmax(logits[0].double() / 0.8, 0)) < 55.0


def test_distribution_of_limits(device: str) -> None:
    """What the limits leave is drawn in proportion, and nothing else is drawn."""
    draws, vocab = 20_000, 12
    weights = torch.tensor([5, 1, 9, 2, 30, 2, 2, 3, 20, 1, 15, 10.0])  # 100 in all
    for limits, kept in (
        ({"top_k": 4}, [4, 8, 10, 11]),
        ({"top_p": 0.74}, [4, 8, 10, 11]),  # 30 + 20 + 15 = 65 < 74 < 65 + 10
        ({"min_p": 0.25}, [2, 4, 8, 10, 11]),  # at least a quarter of 30
        ({"top_k": 9}, [0, 2, 3, 4, 5, 6, 7, 8, 10, 11]),  # the ninth is one of three equals: all stay
        ({"top_k": 4, "top_p": 0.6}, [4, 8]),  # of the 75 that are left: 30 + 20 = 50 ≥ 45
        ({"top_p": 0.35, "min_p": 0.7}, [4]),
    ):
        call = sample_call(
            Gen(device, seed=1), weights.log().expand(draws, vocab).contiguous().to(device), 1.0, **limits
        )
        tokens = ops.sample(**call).cpu().long()
        assert sorted(set(tokens.tolist())) == kept, limits
        left = weights[torch.tensor(kept)]
        counts = torch.bincount(tokens, minlength=vocab)[torch.tensor(kept)]
        assert _chi_square(counts, left / left.sum()) < 50.0, limits


def test_rows_are_independent_of_the_batch(device: str) -> None:
    """The same row alone, in a batch, and in another place of it gives the same token."""
    call = sample_call(Gen(device, seed=2), Gen(device, seed=3).randn(40, 500), 0.9, 20, 0.95, 0.01)
    together = ops.sample(**call)
    for row in (0, 7, 39):
        assert ops.sample(**{k: v[row : row + 1].clone() for k, v in call.items()}).item() == together[row].item()
    assert torch.equal(ops.sample(**{k: v.flip(0) for k, v in call.items()}), together.flip(0))


def test_first_id_whose_cumulative_probability_exceeds() -> None:
    """Exact by enumeration: with 2 equal tokens, u < 1/2 gives the first."""
    rows = 500
    call = sample_call(Gen(seed=4), torch.zeros(rows, 2), 1.0)
    u = [philox_first_word(s, p) / 2**32 for s, p in zip(call["seed"].tolist(), call["position"].tolist(), strict=True)]
    assert ops.sample(**call).tolist() == [0 if x < 0.5 else 1 for x in u]
