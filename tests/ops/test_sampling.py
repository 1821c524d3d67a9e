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


_COLUMNS = ("temperature", "seed", "position")


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


def _head(device: str, rows: int, k: int, vocab: int, temperature: float) -> dict[str, torch.Tensor]:
    """Its sums are exact in any order, so that they are the same in calls of any size."""
    gen = Gen(device, seed=3)
    return {
        "x": gen.ints(-3, 4, rows, k).bfloat16(),
        "weight": gen.ints(-3, 4, vocab, k).bfloat16() / 16,
        "temperature": torch.full((rows,), temperature, device=device),
        "seed": gen.ints(-(2**62), 2**62, rows, dtype=torch.int64),
        "position": gen.ints(0, 2**40, rows, dtype=torch.int64),
    }


def test_distribution_of_a_head(device: str) -> None:
    """As above, in calls of 100 rows, which Hopper draws beside the product, and in one of all, which it does not."""
    draws, vocab = 20_000, 16
    call = _head(device, draws, 64, vocab, 0.8)
    call["x"] = call["x"][:1].expand(draws, 64).contiguous()
    for seeds, positions in (
        (torch.full((draws,), 42), torch.arange(draws)),
        (torch.arange(draws), torch.full((draws,), 7)),
    ):
        call |= {"seed": seeds.to(device), "position": positions.to(device)}
        tokens = ops.lm_head_sample(**call)[0]
        probabilities = torch.softmax(ops.linear(call["x"][:1], call["weight"]).float() / 0.8, 1)[0].cpu()
        assert _chi_square(torch.bincount(tokens.cpu(), minlength=vocab), probabilities) < 55.0
        few = [
            ops.lm_head_sample(call["x"][:100], call["weight"], *(call[c][i : i + 100] for c in _COLUMNS))[0]
            for i in range(0, 300, 100)
        ]
        assert torch.equal(torch.cat(few), tokens[:300])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_shards_of_a_head(device: str, temperature: float) -> None:
    """The best of the shards' best is the whole head's, bit by bit; greedy is what `sample` says of `linear`."""
    call = _head(device, 33, 256, 1000, temperature)
    weight = call.pop("weight")
    tokens, scores = ops.lm_head_sample(**call, weight=weight)
    shards = [ops.lm_head_sample(**call, weight=weight[i : i + 248], first_id=i) for i in range(0, 1000, 248)]
    best, where = torch.stack([shard[1] for shard in shards]).max(0)
    assert torch.equal(best, scores)
    assert torch.equal(torch.stack([shard[0] for shard in shards]).gather(0, where[None])[0], tokens)
    if temperature == 0.0:
        logits = ops.linear(call["x"], weight)
        assert torch.equal(ops.sample(**sample_call(Gen(device), logits, 0.0)), tokens)


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


@pytest.mark.parametrize("vocab", [500, 33_333])
def test_rows_are_independent_of_the_batch(device: str, vocab: int) -> None:
    """The same row alone, in a batch, and in another place of it gives the same token, however many CTAs share it."""
    call = sample_call(Gen(device, seed=2), Gen(device, seed=3).randn(40, vocab), 0.9, 20, 0.95, 0.01)
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


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 4},
        {"top_p": 0.74},
        {"min_p": 0.25},
        {"top_k": 9, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [0.0, 0.5, -1.0])
def test_drafts_do_not_change_the_distribution(device: str, scale: float, limits: dict[str, float]) -> None:
    """20,000 drafts from a q that is p, near it, or p upside down: what comes out is p.

    And it is the draft as often as can be: the sum over all tokens of min(p, q).
    """
    draws, vocab = 20_000, 12
    p_logits = torch.tensor([5, 1, 9, 2, 30, 2, 2, 3, 20, 1, 15, 10.0]).log()
    noise = Gen(seed=5).randn(vocab)
    q_logits = -p_logits if scale < 0 else p_logits + scale * noise
    values = {"temperature": 1.0, **limits}

    def call(logits: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
        return sample_call(Gen(device, seed), logits.expand(draws, vocab).contiguous().to(device), **values)

    # The same positions, other seeds, as in the engine.
    target, draft = call(p_logits, 6), call(q_logits, 7)
    draft["position"] = target["position"]
    guessed = ops.sample(**draft)
    rows = torch.arange(draws, dtype=torch.int32, device=device)
    out = ops.speculative_sample(draft_logits=draft["logits"], draft_token_ids=guessed, draft_rows=rows, **target).cpu()
    p, q = (_exact(logits, **values) for logits in (p_logits, q_logits))
    counts = torch.bincount(out.long(), minlength=vocab)
    assert int(counts[p == 0].sum()) == 0
    assert _chi_square(counts[p > 0], p[p > 0]) < 50.0
    overlap = float(torch.minimum(p, q).sum())
    accepted = float((out == guessed.cpu()).double().mean())
    assert abs(accepted - overlap) < 5 * (overlap * (1 - overlap) / draws) ** 0.5 + 1e-6
    # Each answer by what was guessed: no guess is favoured beyond p.
    assert int((out[out != guessed.cpu()] == -1).sum()) == 0


def _exact(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """The distribution that `sample` draws from, in fp64, by its definition."""
    weights = (logits.double() / temperature).softmax(0)
    if top_k:
        weights = torch.where(weights >= weights.sort(descending=True).values[top_k - 1], weights, 0.0)
    weights = weights / weights.sum()
    above = torch.stack([weights[weights > w + 1e-12].sum() for w in weights])
    weights = torch.where((above < top_p) & (weights >= min_p * weights.max() - 1e-12), weights, 0.0)
    return weights / weights.sum()


def test_rows_without_a_draft_are_those_of_sample(device: str) -> None:
    call = sample_call(Gen(device, seed=8), Gen(device, seed=9).randn(30, 200), [0.0, 0.7, 1.0] * 10, 20, 0.95, 0.01)
    rows = torch.full((30,), -1, dtype=torch.int32, device=device)
    ids = torch.full((30,), -7, dtype=torch.int32, device=device)
    none = ops.speculative_sample(draft_logits=call["logits"][:0], draft_token_ids=ids, draft_rows=rows, **call)
    assert torch.equal(none, ops.sample(**call))
