"""From logits to tokens: penalties and bias, the draw, the verdict on drafts, log-probabilities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastattn import ops
from fastattn.engine.batch import Batch
from fastattn.engine.grammar import Grammar, GrammarMasks
from fastattn.engine.request import Request

if TYPE_CHECKING:
    from fastattn.speculative.proposer import Drafts

TokenLogprobs = dict[int, tuple[float, int]]  # token id -> (natural log-probability, rank from 1)

_BANNED = float("-inf")


@dataclass(frozen=True)
class Sampled:
    """What requests[i] goes on with: token_ids[i], of which all but the last were its drafts (num_drafted[i] were verified);
    -1 means that its logits were not numbers. logprobs[i]: a row for each token, or None if not asked for."""

    requests: list[Request]
    token_ids: list[list[int]]
    logprobs: list[list[TokenLogprobs] | None]
    num_drafted: list[int]


@dataclass(frozen=True)
class _Row:
    """A row of logits: those of a request if the first ``num_accepted`` of its drafts are right."""

    request: Request
    drafts: list[int]
    num_accepted: int

    @property
    def num_output_tokens(self) -> int:
        return len(self.request.output_token_ids) + self.num_accepted

    @property
    def is_adjusted(self) -> bool:
        params = self.request.params
        return params.has_penalties or bool(params.logit_bias) or self.num_output_tokens < params.min_tokens


class Sampler:
    def __init__(self) -> None:
        self._masks = GrammarMasks()

    def sample(
        self, logits: torch.Tensor, batch: Batch, num_drafted: dict[Request, int], drafts: Drafts | None = None
    ) -> Sampled:
        """logits (n, vocab_size) fp32 of the requests whose next token is wanted, 1 + num_drafted rows each; may be
        overwritten. drafts: where the drafts come from, if they were drawn.

        Each row's token is drawn as if the drafts before it were right; it counts as long as they are. A draft is right if
        it is what was drawn, so the text is that of one token a step. Where a draft was itself drawn at random, its row
        says yes or draws again so that the distribution stays (`ops.speculative_sample`).
        """
        rows = [_Row(r, r.seq.drafts[:d], j) for r, d in num_drafted.items() for j in range(d + 1)]
        raw = logits
        is_adjusted = any(row.is_adjusted for row in rows)
        has_grammar = any(r.grammar is not None for r in num_drafted)
        if (is_adjusted or has_grammar) and any(r.params.logprobs is not None for r in num_drafted):
            raw = logits.clone()  # log-probabilities are the model's own, from the logits as they were
        if is_adjusted:
            self._adjust(logits, rows)
        if has_grammar:
            self._mask(logits, num_drafted)
        columns = (batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.seed, batch.sample_position)
        if drafts is None or drafts.logits is None:
            token_ids = ops.sample(logits, *columns)
        else:
            token_ids = ops.speculative_sample(
                logits, drafts.logits, *_drafts_of(rows, drafts, logits.device), *columns
            )
        accepted, at = [], 0
        drawn: list[int] = token_ids.tolist()
        for request, count in num_drafted.items():
            accepted.append(_accepted(drawn[at : at + count + 1], request.seq.drafts))
            at += count + 1
        return Sampled(
            list(num_drafted), accepted, _logprobs(raw, token_ids, num_drafted, accepted), list(num_drafted.values())
        )

    def _mask(self, logits: torch.Tensor, num_drafted: dict[Request, int]) -> None:
        """Forbids what the requests' grammars do not allow. On a GPU the host computes the masks while the model runs."""
        wanted: list[tuple[Grammar, list[int]]] = []
        rows: list[int] = []
        at = 0
        for request, count in num_drafted.items():
            if request.grammar is not None:
                wanted.append((request.grammar, request.seq.drafts[:count]))
                rows += range(at, at + count + 1)
            at += count + 1
        masks = self._masks.fill(wanted, logits.shape[1], pin=logits.is_cuda)
        row_idx = torch.tensor(rows, dtype=torch.int32).to(logits.device)
        ops.apply_token_bitmask(logits, masks.to(logits.device, non_blocking=True), row_idx)

    def _adjust(self, logits: torch.Tensor, rows: Sequence[_Row]) -> None:
        columns = [_touched_tokens(row) for row in rows]
        lengths = [len(ids) for ids, _, _ in columns]
        indptr = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(lengths, out=indptr[1:])
        params = [row.request.params for row in rows]
        device = logits.device

        def to_device(values: np.ndarray | list[float]) -> torch.Tensor:
            return torch.as_tensor(np.asarray(values, dtype=getattr(values, "dtype", np.float32))).to(device)

        token_ids, counts, bias = (to_device(np.concatenate(part)) for part in zip(*columns, strict=True))
        ops.adjust_logits(
            logits,
            token_ids,
            counts,
            bias,
            to_device(indptr),
            to_device([p.repetition_penalty for p in params]),
            to_device([p.presence_penalty for p in params]),
            to_device([p.frequency_penalty for p in params]),
        )


def _drafts_of(rows: Sequence[_Row], drafts: Drafts, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row the draft that it decides about and the row of `drafts.logits` that it was drawn from, both (n) int32; -1
    for the last row of a request, which decides about none."""
    ids, places = [], []
    for row in rows:
        is_draft = row.num_accepted < len(row.drafts)
        ids.append(row.drafts[row.num_accepted] if is_draft else -1)
        places.append(drafts.rows[row.request][row.num_accepted] if is_draft else -1)
    both = torch.tensor([ids, places], dtype=torch.int32).to(device)
    return both[0], both[1]


def _accepted(drawn: list[int], drafts: list[int]) -> list[int]:
    """The tokens up to the first that is not the draft in its place, that one too."""
    count = next((i for i, (a, b) in enumerate(zip(drawn, drafts, strict=False)) if a != b), len(drawn) - 1)
    return drawn[: count + 1]


def _logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_drafted: dict[Request, int], accepted: list[list[int]]
) -> list[list[TokenLogprobs] | None]:
    """logits (n, vocab_size) before penalties, token_ids (n,) int32; of the rows that count, of the requests that ask."""
    index: list[int] = []
    counts: list[int] = []
    at = 0
    for (request, num_drafts), tokens in zip(num_drafted.items(), accepted, strict=True):
        if (wanted := request.params.logprobs) is not None:
            index += range(at, at + len(tokens))
            counts += [wanted] * len(tokens)
        at += num_drafts + 1
    if not index:
        return [None] * len(accepted)
    rows = torch.tensor(index, device=logits.device)
    found = iter(token_logprobs(logits[rows], token_ids[rows], counts))
    return [
        None if request.params.logprobs is None else [next(found) for _ in tokens]
        for request, tokens in zip(num_drafted, accepted, strict=True)
    ]


def _touched_tokens(row: _Row) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(token ids int32, counts int32, bias fp32): the sparse row that `ops.adjust_logits` takes."""
    request, params = row.request, row.request.params
    counts: dict[int, int] = {}
    if params.repetition_penalty != 1.0:
        counts = dict.fromkeys(request.seq.tokens(0, request.num_prompt_tokens), 0)
    counts.update(request.output_counts)
    if params.has_penalties:
        for token, count in Counter(row.drafts[: row.num_accepted]).items():
            counts[token] = counts.get(token, 0) + count
    bias = dict(params.logit_bias or {})
    if row.num_output_tokens < params.min_tokens:
        bias.update(dict.fromkeys(request.stop_token_ids, _BANNED))
    for token in bias:
        counts.setdefault(token, -1)
    ids = np.fromiter(counts, dtype=np.int32, count=len(counts))
    return (
        ids,
        np.fromiter(counts.values(), dtype=np.int32, count=len(counts)),
        np.fromiter((bias.get(t, 0.0) for t in counts), dtype=np.float32, count=len(counts)),
    )


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: list[int]) -> list[TokenLogprobs]:
    """For each row the chosen token and its ``num_top[i]`` most likely ones. logits (n, vocab_size), token_ids (n,) int32."""
    # A row that could not be sampled has id -1; it is reported as an error elsewhere.
    chosen = token_ids.clamp(min=0)
    logprob, rank, top, top_ids = (
        t.tolist() for t in ops.token_logprobs(logits, chosen, min(max(num_top), logits.shape[1]))
    )
    found = []
    for i, token in enumerate(chosen.tolist()):
        row = {token: (logprob[i], rank[i])}
        for place in range(min(num_top[i], len(top_ids[i]))):
            row.setdefault(top_ids[i][place], (top[i][place], place + 1))
        found.append(row)
    return found
