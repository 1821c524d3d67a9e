"""From logits to tokens: penalties, sampling, the verdict on drafts, log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.reference.philox import philox_first_word, philox_words

# Top-p looks among this many of the best first, and ranks the whole vocabulary only if they do not reach the mass.
_CANDIDATES = 256


def adjust_logits(
    logits: Tensor,
    token_ids: Tensor,
    counts: Tensor,
    bias: Tensor,
    indptr: Tensor,
    repetition_penalty: Tensor,
    presence_penalty: Tensor,
    frequency_penalty: Tensor,
) -> None:
    """Penalties and biases of the touched tokens, in place; row b touches token_ids[indptr[b] : indptr[b + 1]]."""
    row = torch.repeat_interleave(torch.arange(logits.shape[0]), indptr.diff().long())
    rep, presence, frequency = (repetition_penalty[row], presence_penalty[row], frequency_penalty[row])
    old = logits[row, token_ids]
    penalized = torch.where(old > 0, old / rep, old * rep) - presence * (counts > 0) - frequency * counts
    logits[row, token_ids] = torch.where(counts >= 0, penalized, old) + bias


def apply_token_bitmask(logits: Tensor, bitmask: Tensor, rows: Tensor) -> None:
    """-inf, in place, for the tokens of row rows[r] whose bit in bitmask[r] is 0; the lowest bit of a word is the first."""
    bits = (bitmask.unsqueeze(2) >> torch.arange(32, dtype=torch.int32)) & 1
    banned = bits.flatten(1)[:, : logits.shape[1]] == 0
    for row, where in zip(rows.tolist(), banned, strict=True):  # one after another: a row may be named twice
        logits[row].masked_fill_(where, -torch.inf)


def _uniform(seed: Tensor, position: Tensor) -> Tensor:
    """u in [0, 1) for each row, fp64: a 32-bit word over 2³²."""
    if seed.numel() > 16:
        return philox_first_word(seed, position).double() * 2.0**-32
    # a few rows are faster without torch's cost per operation
    words = [philox_first_word(s, p) for s, p in zip(seed.tolist(), position.tolist(), strict=True)]
    return torch.tensor(words, dtype=torch.float64) * 2.0**-32


def _top_k(x: Tensor, top_k: Tensor) -> Tensor:
    """Put out all that is below the row's k-th largest; ties with it stay. k ≤ 0 or ≥ V is off."""
    vocab_size = x.shape[1]
    limited = (top_k > 0) & (top_k < vocab_size)
    if not limited.any():
        return x
    k = torch.where(limited, top_k, vocab_size)
    best = x.topk(int(torch.where(limited, top_k, 1).max()), dim=1).values
    kth = best.gather(1, k.clamp(max=best.shape[1]).sub(1).unsqueeze(1).long())
    return x.masked_fill((x < kth) & limited.unsqueeze(1), -torch.inf)


def _top_p(weights: Tensor, top_p: Tensor) -> Tensor:
    """Put out the tail: a token stays while those strictly more probable than it sum to less than top_p."""
    limited = top_p < 1
    if not limited.any():
        return weights
    total = weights.cumsum(1, dtype=torch.float64)[:, -1:]  # in the order of ids, as a sum by threads is not
    bound = top_p.double().unsqueeze(1) * total
    for candidates in (min(_CANDIDATES, weights.shape[1]), weights.shape[1]):
        ranked = weights.topk(candidates, dim=1).values
        kept = ranked.cumsum(1, dtype=torch.float64) - ranked < bound  # mass before each: the first of a tie decides
        if not (kept[:, -1] & limited).any():  # the end of the mass is among the candidates
            break
    num_kept = kept.sum(1, keepdim=True).clamp(min=1)
    last = ranked.gather(1, num_kept - 1)
    return weights.masked_fill((weights < last) & limited.unsqueeze(1), 0.0)


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> Tensor:
    """Draw one token a row by inverse CDF; temperature 0 takes the first of the largest; no answer is -1."""
    best, tokens = logits.max(dim=1)  # the first of the largest; NaN if there is one
    tokens = tokens.int()
    if not torch.isfinite(best).all():
        tokens.masked_fill_(best.isnan() | ~torch.isfinite(logits).any(1), -1)
    drawn = ((temperature > 0) & (tokens >= 0)).nonzero().squeeze(1)
    if drawn.numel() == 0:
        return tokens
    if drawn.numel() < logits.shape[0]:
        logits, temperature, top_k, top_p, min_p, seed, position, best = (
            t.index_select(0, drawn) for t in (logits, temperature, top_k, top_p, min_p, seed, position, best)
        )
    tokens[drawn] = _draw(_weights(logits, best, temperature, top_k, top_p, min_p), _uniform(seed, position))
    return tokens


def _weights(logits: Tensor, best: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Probabilities up to a factor, fp32: the largest weighs exactly 1, also when it is +inf or the temperature is tiny."""
    x = _top_k(logits.float(), top_k)
    peak = best.float().unsqueeze(1)
    weights = ((x - peak) / temperature.unsqueeze(1)).exp_().masked_fill_(x == peak, 1.0)
    weights = _top_p(weights, top_p)
    return weights.masked_fill(weights < min_p.unsqueeze(1), 0.0)


def _draw(weights: Tensor, u: Tensor) -> Tensor:
    """The first id whose cumulative weight exceeds u of the total."""
    cdf = weights.cumsum(1, dtype=torch.float64)
    return torch.searchsorted(cdf, (u * cdf[:, -1]).unsqueeze(1), right=True).squeeze(1).int()


def speculative_sample(
    logits: Tensor,
    draft_logits: Tensor,
    draft_token_ids: Tensor,
    draft_rows: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    """x ~ q becomes a draw from p: x itself with probability min(1, p(x) / q(x)), else one from max(p - q, 0)."""
    tokens = sample(logits, temperature, top_k, top_p, min_p, seed, position)
    rows = ((draft_rows >= 0) & (temperature > 0) & (tokens >= 0)).nonzero().squeeze(1)
    q_logits = draft_logits[draft_rows[rows].long()]
    # A row with a NaN or without a finite logit says nothing about the draft, which is then no draw from it.
    says = (q_logits.isfinite().any(1) & ~q_logits.isnan().any(1)).nonzero().squeeze(1)
    rows, q_logits = rows[says], q_logits[says]
    if rows.numel() == 0:
        return tokens
    limits = (temperature[rows], top_k[rows], top_p[rows], min_p[rows])
    p, q = (_weights(x, x.max(1).values, *limits).double() for x in (logits[rows], q_logits))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    _, accept, again, _ = (word.double() * 2.0**-32 for word in philox_words(seed[rows], position[rows]))
    draft = draft_token_ids[rows]
    p_draft, q_draft = (t.gather(1, draft.long().unsqueeze(1)).squeeze(1) for t in (p, q))
    left = (p - q).clamp_(min=0.0)
    # Nothing is left where p is q but for rounding, and then a rejection is rounding too.
    left = torch.where(left.sum(1, keepdim=True) > 0, left, p)
    tokens[rows] = torch.where(accept * q_draft < p_draft, draft, _draw(left, again))
    return tokens


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-softmax of the chosen tokens, their ranks, and the num_top best with their ids."""
    x = logits.float()
    # One by one: a single row's sum would be shared out among threads, and have other bits than beside others.
    lse = torch.cat([row.logsumexp(1, keepdim=True) for row in torch.split(x, 1)])
    chosen = x.gather(1, token_ids.long().unsqueeze(1))
    rank = (x > chosen).sum(1, dtype=torch.int32) + 1
    ids = _best_ids(x, num_top)
    return (chosen - lse).squeeze(1), rank, x.gather(1, ids) - lse, ids.int()


def _best_ids(x: Tensor, num_top: int) -> Tensor:
    """Ids of the num_top largest of each row, highest first, lowest id first among equals."""
    values, ids = x.topk(min(num_top + 1, x.shape[1]), dim=1)
    if (values[:, 1:] == values[:, :-1]).any():  # topk leaves the order of equals open, and which of them it takes
        ids = torch.sort(x, dim=1, descending=True, stable=True).indices
    return ids[:, :num_top]
