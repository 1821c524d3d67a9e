"""From logits to tokens: penalties, sampling, the verdict on drafts, log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops._library import define
from fastattn.ops.checks import (
    FP32,
    INT32,
    INT64,
    LARGEST,
    LOGITS,
    AtLeast,
    TensorArg,
    check_numbers,
    check_offsets,
    check_range,
    compile_check,
    fail_value,
    values_readable,
)
from fastattn.reference import sampling as reference


def _fake_adjust_logits(*_: object) -> None:
    return None


def _fake_apply_token_bitmask(*_: object) -> None:
    return None


def _fake_sample(logits: Tensor, *_: Tensor) -> Tensor:
    return logits.new_empty((logits.shape[0],), dtype=torch.int32)


def _fake_token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        logits.new_empty((rows,), dtype=torch.float32),
        logits.new_empty((rows,), dtype=torch.int32),
        logits.new_empty((rows, num_top), dtype=torch.float32),
        logits.new_empty((rows, num_top), dtype=torch.int32),
    )


_adjust_logits = define(
    "adjust_logits(Tensor(a!) logits, Tensor token_ids, Tensor counts, Tensor bias, Tensor indptr, "
    "Tensor repetition_penalty, Tensor presence_penalty, Tensor frequency_penalty) -> ()",
    reference.adjust_logits,
    _fake_adjust_logits,
)
_apply_token_bitmask = define(
    "apply_token_bitmask(Tensor(a!) logits, Tensor bitmask, Tensor rows) -> ()",
    reference.apply_token_bitmask,
    _fake_apply_token_bitmask,
)
_sample = define(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, Tensor position) "
    "-> Tensor",
    reference.sample,
    _fake_sample,
)
_speculative_sample = define(
    "speculative_sample(Tensor logits, Tensor draft_logits, Tensor draft_token_ids, Tensor draft_rows, Tensor temperature, "
    "Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, Tensor position) -> Tensor",
    reference.speculative_sample,
    _fake_sample,
)
_token_logprobs = define(
    "token_logprobs(Tensor logits, Tensor token_ids, int num_top) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.token_logprobs,
    _fake_token_logprobs,
)

_check_adjust_logits = compile_check(
    "adjust_logits",
    TensorArg("logits", "B V", FP32, mutated=True),
    TensorArg("token_ids", "nnz", INT32),
    TensorArg("counts", "nnz", INT32),
    TensorArg("bias", "nnz", FP32),
    TensorArg("indptr", "B+1", INT32),
    TensorArg("repetition_penalty", "B", FP32),
    TensorArg("presence_penalty", "B", FP32),
    TensorArg("frequency_penalty", "B", FP32),
)
_check_apply_token_bitmask = compile_check(
    "apply_token_bitmask",
    TensorArg("logits", "B V", FP32, mutated=True),
    TensorArg("bitmask", "R W", INT32),
    TensorArg("rows", "R", INT32),
)
_check_sample = compile_check(
    "sample",
    TensorArg("logits", "B V", LOGITS),
    TensorArg("temperature", "B", FP32),
    TensorArg("top_k", "B", INT32),
    TensorArg("top_p", "B", FP32),
    TensorArg("min_p", "B", FP32),
    TensorArg("seed", "B", INT64),
    TensorArg("position", "B", INT64),
)
_check_speculative_sample = compile_check(
    "speculative_sample",
    TensorArg("logits", "B V", LOGITS),
    TensorArg("draft_logits", "D V", "logits"),
    TensorArg("draft_token_ids", "B", INT32),
    TensorArg("draft_rows", "B", INT32),
    TensorArg("temperature", "B", FP32),
    TensorArg("top_k", "B", INT32),
    TensorArg("top_p", "B", FP32),
    TensorArg("min_p", "B", FP32),
    TensorArg("seed", "B", INT64),
    TensorArg("position", "B", INT64),
)
_check_token_logprobs = compile_check(
    "token_logprobs", TensorArg("logits", "B V", LOGITS), TensorArg("token_ids", "B", INT32), AtLeast("num_top", 0)
)


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
    """Penalties (repetition: https://arxiv.org/abs/1909.05858; presence, frequency: OpenAI's) and biases, in place.

    `logit = (logit > 0 ? logit / rep : logit * rep) - presence·[count > 0] - frequency·max(count, 0) + bias` for the
    touched
    tokens, which are a CSR list: row b touches entries indptr[b] … indptr[b + 1] - 1, each token at most once.

    logits: (B, V) fp32, changed in place.
    token_ids: (nnz) int32. counts: (nnz) int32, occurrences in the output so far; 0: in the prompt only; -1: biased
      only, no penalty. bias: (nnz) fp32. indptr: (B + 1) int32, ascending from 0 to nnz.
    repetition_penalty (> 0; 1 is off), presence_penalty, frequency_penalty: (B) fp32.

    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    Values are checked on the CPU, and on the GPU only with FASTATTN_VALIDATE_INPUTS=1.
    """
    _check_adjust_logits(
        logits, token_ids, counts, bias, indptr, repetition_penalty, presence_penalty, frequency_penalty
    )
    if values_readable(indptr):
        op = "adjust_logits"
        offsets = indptr.tolist()
        check_offsets(op, "indptr", offsets)
        if offsets[-1] != token_ids.shape[0]:
            fail_value(
                op,
                f"indptr[-1] is {offsets[-1]}, expected nnz = {token_ids.shape[0]} from "
                f"token_ids {tuple(token_ids.shape)}",
            )
        check_range(op, "token_ids", token_ids, 0, logits.shape[1] - 1, "V - 1 from logits", logits)
        check_range(op, "counts", counts, -1, 2**31 - 1, "for logits", logits)
        check_numbers(op, "repetition_penalty", repetition_penalty, 1e-30, LARGEST, "a finite number > 0")
        for name, t in (("presence_penalty", presence_penalty), ("frequency_penalty", frequency_penalty)):
            check_numbers(op, name, t, -LARGEST, LARGEST, "a finite number")
    _adjust_logits(logits, token_ids, counts, bias, indptr, repetition_penalty, presence_penalty, frequency_penalty)


def apply_token_bitmask(logits: Tensor, bitmask: Tensor, rows: Tensor) -> None:
    """Forbid tokens, in place: logits[rows[r], t] becomes -inf where bit t of bitmask[r] is 0.

    Bit t of a row is bit t % 32, from the lowest, of its word t // 32: the layout of llguidance and xgrammar. Bits past V
    are not looked at. Rows of logits that are not named stay as they are; one that is named twice keeps what both allow.

    logits: (B, V) fp32, changed in place. bitmask: (R, W) int32 with W = ⌈V / 32⌉. rows: (R) int32, 0 to B - 1.

    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    Values are checked on the CPU, and on the GPU only with FASTATTN_VALIDATE_INPUTS=1.
    """
    _check_apply_token_bitmask(logits, bitmask, rows)
    num_words = -(-logits.shape[1] // 32)
    if bitmask.shape[1] != num_words:
        fail_value(
            "apply_token_bitmask",
            f"bitmask has shape {tuple(bitmask.shape)}, expected (R, {num_words}): a bit for each of V = "
            f"{logits.shape[1]} tokens from logits {tuple(logits.shape)}",
        )
    if values_readable(rows):
        check_range("apply_token_bitmask", "rows", rows, 0, logits.shape[0] - 1, "B - 1 from logits", logits)
    _apply_token_bitmask(logits, bitmask, rows)


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> Tensor:
    """Draw one token for each row; the same seed and position always draw the same.

    Order: temperature, top-k, softmax over what is left, top-p (https://arxiv.org/abs/1904.09751), min-p
    (https://arxiv.org/abs/2407.01082). A limit keeps every token tied with the last one kept. Then inverse CDF in
    order of token id with `u = Philox4x32-10(key = seed, counter = position).x / 2³²`: the first id whose cumulative
    probability exceeds u × total.

    logits: (B, V), fp32, bf16 or fp16. All others (B): temperature fp32 ≥ 0 (0 is greedy: the lowest id of the
    largest), top_k int32 (≤ 0 is off), top_p fp32 in 0 … 1 (1 is off), min_p fp32 in 0 … 1 (0 is off), seed and
    position int64.

    Returns (B) int32; -1 for a row with a NaN or without a finite logit.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    Values are checked on the CPU, and on the GPU only with FASTATTN_VALIDATE_INPUTS=1.
    """
    _check_sample(logits, temperature, top_k, top_p, min_p, seed, position)
    _check_limits("sample", logits, temperature, top_p, min_p)
    out: Tensor = _sample(logits, temperature, top_k, top_p, min_p, seed, position)
    return out


def _check_limits(op: str, logits: Tensor, temperature: Tensor, top_p: Tensor, min_p: Tensor) -> None:
    if logits.shape[1] == 0:
        fail_value(op, f"logits has shape {tuple(logits.shape)}, expected (B, V) with V ≥ 1")
    if values_readable(temperature):
        check_numbers(op, "temperature", temperature, 0.0, LARGEST, "a finite number ≥ 0")
        check_numbers(op, "top_p", top_p, 0.0, 1.0, "0 ≤ top_p ≤ 1")
        check_numbers(op, "min_p", min_p, 0.0, 1.0, "0 ≤ min_p ≤ 1")


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
    """Draw one token for each row, which is the draft's token as often as can be without changing the distribution.

    Rejection sampling of https://arxiv.org/abs/2211.17192 and https://arxiv.org/abs/2302.01318. p and q are what `sample`
    draws from: `logits` and `draft_logits`, both under the row's temperature, top-k, top-p and min-p. If x was drawn from
    q, it is the answer with probability min(1, p(x) / q(x)), else the answer is drawn from max(p - q, 0); either way it is
    distributed as p. So a chain of drafts is right as far as each row's answer is its draft. Philox4x32-10 of (seed,
    position) gives the first decision from its second word and the other draw from its third.

    A row without a draft, or whose draft's logits have a NaN or no finite one, is `sample`'s, and so is one at
    temperature 0.

    logits: (B, V), fp32, bf16 or fp16, the target's. draft_logits: (D, V), same dtype, the draft model's.
    draft_token_ids: (B) int32, x. draft_rows: (B) int32, the row of draft_logits that x was drawn from; -1: no draft, and x
    is not read. Rows of draft_logits that none names are not read.
    temperature, top_k, top_p, min_p, seed, position: (B), as in `sample`; the draft was drawn with another seed.

    Returns (B) int32; -1 for a row with a NaN or without a finite logit.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    Values are checked on the CPU, and on the GPU only with FASTATTN_VALIDATE_INPUTS=1; there a draft outside draft_logits
    or the vocabulary is none.
    """
    op = "speculative_sample"
    columns = (temperature, top_k, top_p, min_p, seed, position)
    _check_speculative_sample(logits, draft_logits, draft_token_ids, draft_rows, *columns)
    _check_limits(op, logits, temperature, top_p, min_p)
    if values_readable(temperature):
        check_range(
            op, "draft_rows", draft_rows, -1, draft_logits.shape[0] - 1, "D - 1 from draft_logits", draft_logits
        )
        read = torch.where(draft_rows >= 0, draft_token_ids, 0)
        check_range(op, "draft_token_ids", read, 0, logits.shape[1] - 1, "V - 1 from logits", logits)
    out: Tensor = _speculative_sample(logits, draft_logits, draft_token_ids, draft_rows, *columns)
    return out


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-softmax, in fp32, of the chosen tokens and of the best.

    logits: (B, V), fp32, bf16 or fp16. token_ids: (B) int32. num_top: 0 to V.

    Returns the chosen tokens' log-probabilities (B) fp32, their ranks (B) int32 from 1 (1 + how many are strictly
    greater), the num_top best log-probabilities (B, num_top) fp32 and their ids int32, highest first, lowest id first
    among equals. Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that
    does not fit.
    """
    _check_token_logprobs(logits, token_ids, num_top)
    if num_top > logits.shape[1]:
        fail_value(
            "token_logprobs",
            f"num_top is {num_top}, expected at most V = {logits.shape[1]} from logits {tuple(logits.shape)}",
        )
    if values_readable(token_ids):
        check_range("token_logprobs", "token_ids", token_ids, 0, logits.shape[1] - 1, "V - 1 from logits", logits)
    chosen, rank, top, top_ids = _token_logprobs(logits, token_ids, num_top)
    return chosen, rank, top, top_ids
