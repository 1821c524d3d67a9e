"""From logits to tokens: penalties and bias, the draw, the verdict on drafts, log-probabilities.

All of it is queued on the device at once (`Sampler.launch`); what the host is to know comes later (`Draw.result`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastattn import ops
from fastattn.engine.batch import Batch
from fastattn.engine.grammar import Grammar, GrammarMasks
from fastattn.engine.request import Needs, Request

if TYPE_CHECKING:
    from fastattn.speculative.proposer import Drafts

TokenLogprobs = dict[int, tuple[float, int]]  # token id -> (natural log-probability, rank from 1)

_BANNED = float("-inf")


class Sampled:
    """What a step drew, on the host: drawn[row], of which each of ``requests`` has one for each of its num_drafted drafts, and
    one more; -1 means that the row's logits were not numbers."""

    def __init__(
        self, num_drafted: dict[Request, int], drawn: list[int], logprobs: Iterator[TokenLogprobs] | None
    ) -> None:
        """logprobs: of the rows of those who asked for them."""
        self.requests, self.drawn = list(num_drafted), drawn
        self.num_drafted = list(num_drafted.values())
        self.has_drafts = len(drawn) > len(self.requests)
        self._first_row = [0, *accumulate(count + 1 for count in self.num_drafted)] if self.has_drafts else None
        self._logprobs = (
            {}
            if logprobs is None
            else {
                request: [next(logprobs) for _ in range(count + 1)]
                for request, count in num_drafted.items()
                if request.params.logprobs is not None
            }
        )

    def of(self, index: int) -> tuple[list[int], list[TokenLogprobs] | None]:
        """What requests[index] goes on with: tokens, of which all but the last were its drafts, and a row for each if it asked."""
        request, count = self.requests[index], self.num_drafted[index]
        at = index if self._first_row is None else self._first_row[index]
        tokens = self.drawn[at : at + count + 1]
        if count > 0:
            tokens = _accepted(tokens, request.seq.drafts)
        logprobs = self._logprobs.get(request)
        return tokens, None if logprobs is None else logprobs[: len(tokens)]


@dataclass(frozen=True)
class _Row:
    """A row of logits: those of a request if the first ``num_accepted`` of its drafts are right."""

    request: Request
    drafts: list[int]
    num_accepted: int

    @property
    def num_output_tokens(self) -> int:
        return self.request.num_output_tokens + self.request.seq.has_unknown + self.num_accepted

    @property
    def is_adjusted(self) -> bool:
        params = self.request.params
        return params.has_penalties or bool(params.logit_bias) or self.bans_stop

    @property
    def bans_stop(self) -> bool:
        """It is too early for the tokens that end the text."""
        return bool(self.request.stop_token_ids) and self.num_output_tokens < self.request.params.min_tokens


@dataclass(frozen=True)
class _Logprobs:
    """Of some rows: `ops.token_logprobs`' four results, which rows they are, and how many tokens each row asks for."""

    columns: tuple[torch.Tensor, ...]
    index: list[int]
    num_top: list[int]


class Draw:
    """What a step drew: token_ids (n,) int32 on the device, 1 + num_drafted[r] rows for each request r; soon also on the host."""

    def __init__(self, num_drafted: dict[Request, int], token_ids: torch.Tensor, logprobs: _Logprobs | None) -> None:
        self.num_drafted, self.token_ids = num_drafted, token_ids
        self._logprobs = logprobs
        self._host = [_to_host(t) for t in (token_ids, *(logprobs.columns if logprobs else ()))]
        self._copied: torch.cuda.Event | None = None
        if token_ids.is_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def result(self) -> Sampled:
        """Waits until the step is computed. Of a request's draws those count that follow right drafts."""
        if self._copied is not None:
            self._copied.synchronize()
        drawn: list[int] = self._host[0].tolist()
        return Sampled(self.num_drafted, drawn, self._logprob_rows(drawn))

    def _logprob_rows(self, drawn: list[int]) -> Iterator[TokenLogprobs] | None:
        if self._logprobs is None:
            return None
        index, num_top = self._logprobs.index, self._logprobs.num_top
        return iter(_describe([drawn[i] for i in index], num_top, *(t.tolist() for t in self._host[1:])))


class Sampler:
    def __init__(self) -> None:
        self._masks = GrammarMasks()

    def launch(
        self,
        logits: torch.Tensor,
        batch: Batch,
        num_drafted: dict[Request, int],
        needs: int,
        drafts: Drafts | None = None,
    ) -> Draw:
        """logits (n, vocab_size) of the requests whose next token is wanted, 1 + num_drafted rows each; may be overwritten.
        needs: `Needs` of all of them together. drafts: where the drafts come from, if they were drawn.

        Each row's token is drawn as if the drafts before it were right; it counts as long as they are. A draft is right if
        it is what was drawn, so the text is that of one token a step. Where a draft was itself drawn at random, its row
        says yes or draws again so that the distribution stays (`ops.speculative_sample`).
        """
        columns = batch.sampling
        if drafts is None and not needs & Needs.OWN_LOGITS:
            return Draw(num_drafted, ops.sample(logits, *columns), None)
        rows = [_Row(r, r.seq.drafts[:d], j) for r, d in num_drafted.items() for j in range(d + 1)]
        raw = logits
        is_adjusted = any(row.is_adjusted for row in rows)
        has_grammar = any(r.grammar is not None for r in num_drafted)
        if is_adjusted or has_grammar:
            # Log-probabilities are the model's own, from the logits as they were; sums with penalties are not for 16 bits.
            asked = any(r.params.logprobs is not None for r in num_drafted)
            logits = logits.clone() if asked and logits.dtype == torch.float32 else logits.float()
        if is_adjusted:
            self._adjust(logits, rows)
        if has_grammar:
            self._mask(logits, num_drafted)
        if drafts is None or drafts.logits is None:
            token_ids = ops.sample(logits, *columns)
        else:
            draft_logits = drafts.logits.to(logits.dtype)
            token_ids = ops.speculative_sample(logits, draft_logits, *_drafts_of(rows, drafts, logits.device), *columns)
        return Draw(num_drafted, token_ids, _launch_logprobs(raw, token_ids, num_drafted))

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
        row_idx = _to_device(np.array(rows, dtype=np.int32), logits.device)
        ops.apply_token_bitmask(logits, masks.to(logits.device, non_blocking=True), row_idx)

    def _adjust(self, logits: torch.Tensor, rows: Sequence[_Row]) -> None:
        columns = [_touched_tokens(row) for row in rows]
        lengths = [len(ids) for ids, _, _ in columns]
        indptr = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(lengths, out=indptr[1:])
        params = [row.request.params for row in rows]
        penalties = [
            [getattr(p, f"{kind}_penalty") for p in params] for kind in ("repetition", "presence", "frequency")
        ]
        parts = [np.concatenate(part) for part in zip(*columns, strict=True)]
        parts += [indptr, *(np.array(values, dtype=np.float32) for values in penalties)]
        # All are of four bytes an element, so that they go over as one.
        both = _to_device(np.concatenate([part.view(np.int32) for part in parts]), logits.device)
        pieces = torch.split(both, [len(part) for part in parts])
        ops.adjust_logits(
            logits,
            *(
                t.view(torch.float32 if part.dtype == np.float32 else torch.int32)
                for t, part in zip(pieces, parts, strict=True)
            ),
        )


def _drafts_of(rows: Sequence[_Row], drafts: Drafts, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row the draft that it decides about and the row of `drafts.logits` that it was drawn from, both (n) int32; -1
    for the last row of a request, which decides about none."""
    ids, places = [], []
    for row in rows:
        is_draft = row.num_accepted < len(row.drafts)
        ids.append(row.drafts[row.num_accepted] if is_draft else -1)
        places.append(drafts.rows[row.request][row.num_accepted] if is_draft else -1)
    both = _to_device(np.array([ids, places], dtype=np.int32), device)
    return both[0], both[1]


def _accepted(drawn: list[int], drafts: list[int]) -> list[int]:
    """The tokens up to the first that is not the draft in its place, that one too."""
    count = next((i for i, (a, b) in enumerate(zip(drawn, drafts, strict=False)) if a != b), len(drawn) - 1)
    return drawn[: count + 1]


def _launch_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_drafted: dict[Request, int]
) -> _Logprobs | None:
    """logits (n, vocab_size) before penalties, token_ids (n,) int32; of all rows of the requests that ask."""
    index: list[int] = []
    num_top: list[int] = []
    at = 0
    for request, num_drafts in num_drafted.items():
        if (wanted := request.params.logprobs) is not None:
            index += range(at, at + num_drafts + 1)
            num_top += [wanted] * (num_drafts + 1)
        at += num_drafts + 1
    if not index:
        return None
    rows = _to_device(np.array(index, dtype=np.int64), logits.device)
    return _Logprobs(_logprob_columns(logits[rows], token_ids[rows], num_top), index, num_top)


def _logprob_columns(logits: torch.Tensor, token_ids: torch.Tensor, num_top: list[int]) -> tuple[torch.Tensor, ...]:
    # A row that could not be sampled has id -1; it is reported as an error elsewhere.
    return ops.token_logprobs(logits, token_ids.clamp(min=0), min(max(num_top), logits.shape[1]))


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
    if row.bans_stop:
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
    columns = _logprob_columns(logits, token_ids, num_top)
    return _describe(token_ids.tolist(), num_top, *(t.tolist() for t in columns))


def _describe(token_ids: list[int], num_top: list[int], *columns: list[Any]) -> list[TokenLogprobs]:
    found = []
    for token, count, logprob, rank, top, top_ids in zip(token_ids, num_top, *columns, strict=True):
        row = {max(token, 0): (logprob, rank)}
        for place, (other, value) in enumerate(zip(top_ids[:count], top[:count], strict=True)):
            row.setdefault(other, (value, place + 1))
        found.append(row)
    return found


def _to_host(t: torch.Tensor) -> torch.Tensor:
    """A copy that is there once what was queued before is done."""
    if not t.is_cuda:
        return t
    return torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device, without waiting for what runs there."""
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
