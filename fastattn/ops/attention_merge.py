"""Attention over two disjoint sets of keys, from the attention over each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.ops._library import define, differentiable
from fastattn.ops.checks import FP32, LOGITS, TensorArg, compile_check, fail_type, fail_value
from fastattn.reference import attention_merge as reference
from fastattn.reference.attention_backward import row_delta
from fastattn.reference.attention_scores import wide

_merge_attention_states = define(
    "merge_attention_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)",
    reference.merge_attention_states,
    lambda out_a, lse_a, *_: (out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)),
)
_CHECKS = {
    len(rows.split()) + 2: compile_check(
        "merge_attention_states",
        TensorArg("out_a", f"{rows} H D", LOGITS, grad=True),
        TensorArg("lse_a", lse, FP32, grad=True),
        TensorArg("out_b", "like out_a", "out_a", grad=True),
        TensorArg("lse_b", "like lse_a", FP32, grad=True),
    )
    for rows, lse in (("T", "H T"), ("B S", "B H S"))
}


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor, ...]:
    """With w = exp(lse_a - lse): dout_a = w dout, dlse_a = w (rowsum(dout · (out_a - out)) + dlse), and so for b."""
    out_a, lse_a, out_b, lse_b, lse = ctx.saved_tensors
    dout = torch.zeros_like(out_a) if dout is None else dout
    out = reference.merge_attention_states(wide(out_a), lse_a, wide(out_b), lse_b)[0]
    gradients = []
    for own, own_lse in ((out_a, lse_a), (out_b, lse_b)):
        weight = torch.where(own_lse.isinf(), 0, (own_lse - lse).exp())  # (…, H, S)
        each_row = weight.transpose(-1, -2).unsqueeze(-1)
        own = torch.where(each_row == 0, 0, wide(own))  # an empty side may hold anything
        gradients += [
            (each_row * dout).to(dout.dtype),
            weight * row_delta(dout, own - out, None if dlse is None else -dlse),
        ]
    return tuple(gradients)


differentiable("merge_attention_states", _backward, _save)


def merge_attention_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of the same queries to two disjoint sets of keys, merged (https://arxiv.org/abs/2501.01005, section 2.2).

    out_a, out_b: (T, H, D) or (B, S, H, D), bf16, fp16 or fp32. lse_a, lse_b: (H, T) or (B, H, S) fp32, natural logarithm,
    as the attention operators give them.
    A row that saw no key on one side has an LSE of -inf there, or flash-attn 2's +inf; its out may then hold anything.
    A sink must be in one of them only.

    Returns out in out_a's dtype and lse, as attention over all the keys gives them: 0 and -inf for a row that saw none.
    Both are differentiable.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    op = "merge_attention_states"
    if not isinstance(out_a, Tensor):
        fail_type(op, f"out_a is a {type(out_a).__name__}, expected a torch.Tensor")
    check = _CHECKS.get(out_a.dim())
    if check is None:
        fail_value(
            op, f"out_a has {out_a.dim()} dimensions, shape {tuple(out_a.shape)}, expected (T, H, D) or (B, S, H, D)"
        )
    check(out_a, lse_a, out_b, lse_b)
    out, lse = _merge_attention_states(out_a, lse_a, out_b, lse_b)
    return out, lse
