"""From logits to tokens: penalties and bias, the draw, log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fastattn import ops
from fastattn.engine.batch import Batch
from fastattn.engine.request import Request

TokenLogprobs = dict[int, tuple[float, int]]  # token id -> (natural log-probability, rank from 1)

_BANNED = float("-inf")


@dataclass(frozen=True)
class Sampled:
    """token_ids[i] belongs to requests[i]; -1 means that its logits were not numbers."""

    requests: list[Request]
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


class Sampler:
    def sample(self, logits: torch.Tensor, batch: Batch, requests: list[Request]) -> Sampled:
        """logits (n, vocab_size) fp32 of the n requests whose next token is wanted; may be overwritten."""
        wanted = [r.params.logprobs for r in requests]
        raw = logits
        if any(_is_adjusted(r) for r in requests):
            # Log-probabilities are the model's own, so they are taken from the logits as they were.
            raw = logits.clone() if any(w is not None for w in wanted) else logits
            self._adjust(logits, requests)
        token_ids = ops.sample(
            logits, batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.seed, batch.sample_position
        )
        logprobs: list[TokenLogprobs | None] = [None] * len(requests)
        if rows := [i for i, w in enumerate(wanted) if w is not None]:
            index = torch.tensor(rows, device=logits.device)
            counts = [wanted[i] or 0 for i in rows]
            for i, found in zip(rows, token_logprobs(raw[index], token_ids[index], counts), strict=True):
                logprobs[i] = found
        return Sampled(requests, token_ids.tolist(), logprobs)

    def _adjust(self, logits: torch.Tensor, requests: list[Request]) -> None:
        columns = [_touched_tokens(request) for request in requests]
        lengths = [len(ids) for ids, _, _ in columns]
        indptr = np.zeros(len(requests) + 1, dtype=np.int32)
        np.cumsum(lengths, out=indptr[1:])
        params = [r.params for r in requests]
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


def _is_adjusted(request: Request) -> bool:
    params = request.params
    return params.has_penalties or bool(params.logit_bias) or len(request.output_token_ids) < params.min_tokens


def _touched_tokens(request: Request) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(token ids int32, counts int32, bias fp32): the sparse row that `ops.adjust_logits` takes."""
    params = request.params
    counts: dict[int, int] = {}
    if params.repetition_penalty != 1.0:
        counts = dict.fromkeys(request.seq.tokens(0, request.num_prompt_tokens), 0)
    counts.update(request.output_counts)
    bias = dict(params.logit_bias or {})
    if len(request.output_token_ids) < params.min_tokens:
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
