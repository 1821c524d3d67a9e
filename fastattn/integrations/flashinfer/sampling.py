"""FlashInfer's sampling, over probabilities, by the operators of `fastattn.ops`, which take logits.

Each row draws with a seed and a position of its own: from a generator (torch's own if None) both are new at each call; of a
seed and an offset that are given, the row's number goes into the position, unless each row has its own seed.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from fastattn.ops import sample, speculative_sample

Drawn = Tensor | tuple[Tensor, Tensor]


def _fail(op: str, message: str) -> NoReturn:
    raise ValueError(f"flashinfer.{op}: {message}")


def _column(op: str, name: str, value: Tensor | float, num_rows: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """(num_rows) out of a number for all rows or one for each."""
    if not isinstance(value, Tensor):
        return torch.full((num_rows,), value, dtype=dtype, device=like.device)
    if value.numel() not in (1, num_rows):
        _fail(op, f"{name} has shape {tuple(value.shape)}, expected ({num_rows},) or a number")
    return value.to(like.device, dtype).reshape(-1).expand(num_rows).contiguous()


def _streams(
    op: str,
    num_rows: int,
    draws: int,
    like: Tensor,
    generator: torch.Generator | None,
    seed: int | Tensor | None,
    offset: int | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Seed and position, (num_rows * draws) int64 each, of `draws` draws for each row."""
    total = num_rows * draws
    number = torch.arange(total, device=like.device) << 32  # above every offset that is counted up
    if seed is None and offset is None:
        seeds = torch.randint(2**63 - 1, (1,), generator=generator, device=like.device)
        return seeds.expand(total).contiguous(), number
    if seed is None or offset is None:
        _fail(op, f"{'seed' if seed is None else 'offset'} is None, expected seed and offset both or neither")
    if isinstance(seed, Tensor) != isinstance(offset, Tensor):
        _fail(op, "one of seed and offset is a tensor, expected both or neither to be")
    columns = []
    for name, value in (("seed", seed), ("offset", offset)):
        if isinstance(value, Tensor) and value.dtype not in (torch.int64, torch.uint64):
            _fail(op, f"{name} is {value.dtype}, expected int64 or uint64")
        wrapped = value.view(torch.int64) if isinstance(value, Tensor) else (int(value) + 2**63) % 2**64 - 2**63
        columns.append(_column(op, name, wrapped, num_rows, like, torch.int64).repeat_interleave(draws))
    if isinstance(seed, Tensor) and seed.numel() == num_rows and num_rows > 1:
        number = (torch.arange(draws, device=like.device) << 32).repeat(num_rows)
    return columns[0], columns[1] + number


def _draw(
    op: str,
    logits: Tensor,
    indices: Tensor | None,
    generator: torch.Generator | None,
    seed: int | Tensor | None,
    offset: int | Tensor | None,
    *,
    top_k: Tensor | int = 0,
    top_p: Tensor | float = 1.0,
    min_p: Tensor | float = 0.0,
) -> Tensor:
    """One token for each row of logits, or of logits[indices]; int32, or indices' dtype."""
    if logits.dim() != 2:
        _fail(op, f"the distributions have shape {tuple(logits.shape)}, expected (B, V)")
    rows = logits if indices is None else logits[indices.long()]
    n = rows.shape[0]
    tokens = sample(
        rows.contiguous(),
        _column(op, "temperature", 1.0, n, rows, torch.float32),
        _column(op, "top_k", top_k, n, rows, torch.int32),
        _column(op, "top_p", top_p, n, rows, torch.float32),
        _column(op, "min_p", min_p, n, rows, torch.float32),
        *_streams(op, n, 1, rows, generator, seed, offset),
    )
    return tokens if indices is None else tokens.to(indices.dtype)


def _logits(op: str, probs: Tensor, check_nan: bool) -> Tensor:
    if check_nan and bool(probs.isnan().any()):
        _fail(op, "probs has a NaN: Input probs contains NaN.")
    return probs.float().log()


def _result(tokens: Tensor, return_valid: bool) -> Drawn:
    return (tokens, tokens >= 0) if return_valid else tokens


def sampling_from_logits(
    logits: Tensor,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
) -> Tensor:
    """`sampling_from_probs` of softmax(logits)."""
    op = "sampling_from_logits"
    if check_nan and bool(logits.isnan().any()):
        _fail(op, "logits has a NaN: Input logits contains NaN.")
    return _draw(op, logits, indices, generator, seed, offset)


def sampling_from_probs(
    probs: Tensor,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Drawn:
    """Draw one token from each row.

    probs: (B, V), fp32, bf16 or fp16; what it sums to does not matter.
    indices: (N) int32 or int64: draw from rows probs[indices] instead.
    deterministic: they always are. generator: of probs' device. check_nan: refuse a NaN; waits for the GPU.
    seed, offset: both or neither; ints, or int64 or uint64 tensors of 1 or of a value for each row, as CUDA graphs need.

    Returns (B) int32, or (N) of indices' dtype, -1 for a row with a NaN or without a probability above 0; with return_valid
    also which rows are not.
    """
    op = "sampling_from_probs"
    return _result(_draw(op, _logits(op, probs, check_nan), indices, generator, seed, offset), return_valid)


def top_p_sampling_from_probs(
    probs: Tensor,
    top_p: Tensor | float,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Drawn:
    """`sampling_from_probs` from the smallest set of the most probable tokens that has top_p of the mass.

    top_p: a number or one for each row, 0 to 1. Tokens tied with the last one stay.
    """
    op = "top_p_sampling_from_probs"
    logits = _logits(op, probs, check_nan)
    return _result(_draw(op, logits, indices, generator, seed, offset, top_p=top_p), return_valid)


def top_k_sampling_from_probs(
    probs: Tensor,
    top_k: Tensor | int,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Drawn:
    """`sampling_from_probs` from the top_k most probable tokens.

    top_k: an int or one for each row, ≥ 1. Tokens tied with the last one stay.
    """
    op = "top_k_sampling_from_probs"
    _check_k(op, top_k)
    logits = _logits(op, probs, check_nan)
    return _result(_draw(op, logits, indices, generator, seed, offset, top_k=top_k), return_valid)


def min_p_sampling_from_probs(
    probs: Tensor,
    min_p: Tensor | float,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Drawn:
    """`sampling_from_probs` from the tokens with at least min_p of the best one's probability.

    min_p: a number or one for each row, 0 to 1.
    """
    op = "min_p_sampling_from_probs"
    logits = _logits(op, probs, check_nan)
    return _result(_draw(op, logits, indices, generator, seed, offset, min_p=min_p), return_valid)


def _draw_top_k_top_p(
    op: str, logits: Tensor, top_k: Tensor | int, top_p: Tensor | float, indices: Tensor | None, order: str, *rest: Any
) -> Tensor:
    _check_k(op, top_k)
    if order == "top_k_first":
        return _draw(op, logits, indices, *rest, top_k=top_k, top_p=top_p)
    if order != "joint":
        _fail(op, f"filter_apply_order is {order!r}, expected 'top_k_first' or 'joint'")
    # Both sets are of the most probable tokens, so top-k of the nucleus is what both have.
    rows = logits if indices is None else logits[indices.long()]
    rows = rows.masked_fill(~_nucleus(op, rows.softmax(-1, torch.float32), top_p), -torch.inf)
    tokens = _draw(op, rows, None, *rest, top_k=top_k)
    return tokens if indices is None else tokens.to(indices.dtype)


def top_k_top_p_sampling_from_probs(
    probs: Tensor,
    top_k: Tensor | int,
    top_p: Tensor | float,
    indices: Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
    return_valid: bool = False,
) -> Drawn:
    """`sampling_from_probs` under both limits.

    filter_apply_order: "top_k_first": top_p is of the mass that top_k leaves; "joint": of the whole mass.
    """
    op = "top_k_top_p_sampling_from_probs"
    logits = _logits(op, probs, check_nan)
    tokens = _draw_top_k_top_p(op, logits, top_k, top_p, indices, filter_apply_order, generator, seed, offset)
    return _result(tokens, return_valid)


def top_k_top_p_sampling_from_logits(
    logits: Tensor,
    top_k: Tensor | int,
    top_p: Tensor | float,
    indices: Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
) -> Tensor:
    """`top_k_top_p_sampling_from_probs` of softmax(logits); the way to call that costs least here."""
    op = "top_k_top_p_sampling_from_logits"
    if check_nan and bool(logits.isnan().any()):
        _fail(op, "logits has a NaN: Input probs contains NaN.")
    return _draw_top_k_top_p(op, logits, top_k, top_p, indices, filter_apply_order, generator, seed, offset)


def _check_k(op: str, top_k: Tensor | int) -> None:
    if not isinstance(top_k, Tensor) and top_k < 1:
        _fail(op, f"top_k is {top_k}, expected an int ≥ 1")


def _nucleus(op: str, probs: Tensor, top_p: Tensor | float) -> Tensor:
    """(B, V) bool: a token stays while those strictly more probable than it sum to less than top_p."""
    bound = _column(op, "top_p", top_p, probs.shape[0], probs, torch.float32).unsqueeze(1)
    ranked = probs.sort(-1, descending=True).values
    kept = ranked.cumsum(-1, dtype=torch.float64) - ranked < bound
    last = ranked.gather(1, kept.sum(1, keepdim=True).clamp(min=1) - 1)
    return (probs >= last) | (bound >= 1)


def _best_k(op: str, x: Tensor, top_k: Tensor | int) -> Tensor:
    """(B, V) bool: what is not below the row's top_k-th largest."""
    _check_k(op, top_k)
    if not isinstance(top_k, Tensor):
        return x >= x.topk(min(top_k, x.shape[1])).values[:, -1:]
    k = _column(op, "top_k", top_k, x.shape[0], x, torch.int64).clamp(1, x.shape[1])
    return x >= x.sort(-1, descending=True).values.gather(1, k.unsqueeze(1) - 1)


def _renormalized(probs: Tensor, kept: Tensor) -> Tensor:
    left = probs.float().masked_fill(~kept, 0.0)
    return (left / left.sum(-1, keepdim=True)).to(probs.dtype)


def top_p_renorm_probs(probs: Tensor, top_p: Tensor | float, is_deterministic: bool = False) -> Tensor:
    """0 for all but the smallest set of the most probable tokens that has top_p of the mass; the rest sums to 1 again.

    probs: (B, V). top_p: a number or one for each row. Tokens tied with the last one stay. is_deterministic: it always is.
    """
    return _renormalized(probs, _nucleus("top_p_renorm_probs", probs.float(), top_p))


def top_k_renorm_probs(probs: Tensor, top_k: Tensor | int) -> Tensor:
    """0 for all but the top_k most probable tokens; the rest sums to 1 again.

    probs: (B, V). top_k: an int ≥ 1 or one for each row. Tokens tied with the last one stay.
    """
    return _renormalized(probs, _best_k("top_k_renorm_probs", probs, top_k))


def top_k_mask_logits(logits: Tensor, top_k: Tensor | int) -> Tensor:
    """−∞ for all but the top_k largest.

    logits: (B, V). top_k: an int ≥ 1 or one for each row. Logits tied with the last one stay.
    """
    return logits.masked_fill(~_best_k("top_k_mask_logits", logits, top_k), -torch.inf)


def chain_speculative_sampling(
    draft_probs: Tensor,
    draft_token_ids: Tensor,
    target_probs: Tensor,
    maybe_output_accepted_token_num: Tensor | None = None,
    maybe_output_emitted_draft_token_num: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Verify a chain of drafts: the tokens are distributed as the target's (https://arxiv.org/abs/2302.01318).

    draft_probs: (B, n, V), what each draft was drawn from. draft_token_ids: (B, n). target_probs: (B, n + 1, V).
    maybe_output_accepted_token_num, maybe_output_emitted_draft_token_num: (B), to which the counts are added.
    deterministic, generator, seed, offset: as in `sampling_from_probs`.

    Returns tokens (B, n + 1) int32, the accepted drafts and one token more, then -1; how many drafts would be accepted each
    for itself (B) int32; how many were (B) int32.
    """
    op = "chain_speculative_sampling"
    batch, n, vocab = draft_probs.shape
    if target_probs.shape != (batch, n + 1, vocab) or draft_token_ids.shape != (batch, n):
        _fail(
            op,
            f"draft_token_ids has shape {tuple(draft_token_ids.shape)} and target_probs {tuple(target_probs.shape)}, "
            f"expected {(batch, n)} and {(batch, n + 1, vocab)} from draft_probs {tuple(draft_probs.shape)}",
        )
    device, total = target_probs.device, batch * (n + 1)
    drafts = torch.nn.functional.pad(draft_token_ids.to(torch.int32), (0, 1))
    rows = torch.arange(batch * n, dtype=torch.int32, device=device).view(batch, n)
    rows = torch.nn.functional.pad(rows, (0, 1), value=-1)  # the last token has no draft
    target = target_probs.float().log().view(total, vocab)
    column = target.new_zeros(total)
    tokens = speculative_sample(
        target, draft_probs.float().log().view(batch * n, vocab), drafts.view(-1), rows.view(-1), column + 1.0,
        column.to(torch.int32), column + 1.0, column, *_streams(op, batch, n + 1, target, generator, seed, offset),
    ).view(batch, n + 1)  # fmt: skip
    agrees = tokens[:, :n] == draft_token_ids  # a rejected draft is not drawn again
    accepted = agrees.sum(1, dtype=torch.int32)
    emitted = agrees.long().cumprod(1).sum(1, dtype=torch.int32)
    past = torch.arange(n + 1, device=device) > emitted.unsqueeze(1)
    counts = []
    for kept, found in (
        (maybe_output_accepted_token_num, accepted),
        (maybe_output_emitted_draft_token_num, emitted),
    ):
        counts.append(found if kept is None else kept.add_(found))
    return tokens.masked_fill(past, -1), counts[0], counts[1]
