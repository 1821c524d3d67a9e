"""A language model's head that draws tokens and writes no logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops._library import define
from fastattn.ops.checks import (
    FLOAT,
    FP32,
    INT64,
    LARGEST,
    AtLeast,
    TensorArg,
    check_numbers,
    compile_check,
    fail_value,
    values_readable,
)
from fastattn.reference import lm_head as reference


def _fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    rows = (x.shape[0],)
    return x.new_empty(rows, dtype=torch.int32), x.new_empty(rows, dtype=torch.float32)


_lm_head_sample = define(
    "lm_head_sample(Tensor x, Tensor weight, Tensor? bias, Tensor temperature, Tensor seed, Tensor position, "
    "int first_id) -> (Tensor, Tensor)",
    reference.lm_head_sample,
    _fake,
)

_check_lm_head_sample = compile_check(
    "lm_head_sample",
    TensorArg("x", "B K", FLOAT),
    TensorArg("weight", "V K", "x"),
    TensorArg("bias", "V", "x", optional=True),
    TensorArg("temperature", "B", FP32),
    TensorArg("seed", "B", INT64),
    TensorArg("position", "B", INT64),
    AtLeast("first_id", 0),
)


def lm_head_sample(
    x: Tensor,
    weight: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    *,
    bias: Tensor | None = None,
    first_id: int = 0,
) -> tuple[Tensor, Tensor]:
    """Draw one token for each row of a language model's head; logits of a few rows are never written.

    `logits = linear(x, weight, bias)`, rounded to x's dtype as `linear` rounds, then the id of the largest
    `logits + temperature · g`, the lowest among equals. With g of Gumbel's distribution that is a draw from
    softmax(logits / temperature) (https://arxiv.org/abs/1411.0030); at temperature 0 it is greedy, and the token that
    `sample` gives for these logits. Above 0 it is another draw from the same distribution than `sample`'s, which inverts the
    CDF with one number a row: here each id has its own. `g[id] = -log(-log1p(-u))` in fp32, with
    `u = Philox4x32-10(key = seed, counter = (position, id // 4, 1))[id % 4] / 2³² + 2⁻³³`, at most 1 - 2⁻²⁴. It depends on
    nothing else, so the same seed and position always draw the same from the same logits; `sample`'s numbers are others.
    There is no top-k, top-p or min-p, which need the whole row.

    On Hopper one kernel for the product and the draw, and a short one behind it, up to 32 rows (K and V multiples of 8, rows
    16-byte aligned), with `linear`'s very sums. Other calls and other GPUs take `linear` and two short kernels, and give what
    the same logits give there.

    x: (B, K), bf16 or fp16, on the CPU also fp32. weight: (V, K), V ≥ 1, bias: (V), x's dtype.
    temperature: (B) fp32 ≥ 0. seed, position: (B) int64.
    first_id: the id of the first row of weight, a multiple of 4, for a head that is one of several shards of a vocabulary:
      the shard with the largest score, the first among equals, has the token that the whole head gives, as long as no logit
      is +inf. A NaN counts as the largest, as in torch.max, and its token is -1.

    Returns token ids (B) int32, -1 for a row with a NaN or without a finite logit, and scores (B) fp32, the largest
    `logits + temperature · g`. For inference: no backward.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    Temperatures are checked on the CPU, and on the GPU only with FASTATTN_VALIDATE_INPUTS=1.
    """
    op = "lm_head_sample"
    _check_lm_head_sample(x, weight, bias, temperature, seed, position, first_id)
    vocab_size = weight.shape[0]
    if vocab_size == 0:
        fail_value(op, f"weight has shape {tuple(weight.shape)}, expected (V, K) with V ≥ 1")
    if first_id % 4 != 0 or first_id + vocab_size >= 2**31:
        fail_value(op, f"first_id is {first_id}, expected a multiple of 4 and first_id + V < 2³¹ with V = {vocab_size}")
    if values_readable(temperature):
        check_numbers(op, "temperature", temperature, 0.0, LARGEST, "a finite number ≥ 0")
    token_ids, scores = _lm_head_sample(x, weight, bias, temperature, seed, position, first_id)
    return token_ids, scores
