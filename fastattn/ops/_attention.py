"""The attention operators themselves: schemas, fakes and autograd. What people call is in `fastattn.ops.attention`."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from fastattn.ops._library import define, differentiable
from fastattn.ops.checks import FP8
from fastattn.reference import attention as reference
from fastattn.reference import attention_backward as reference_backward

_SCORES = "float softmax_scale, bool causal, int window_left, int window_right, float softcap"
_SEQUENCES = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k"
_OPTIONAL = "Tensor? alibi_slopes, Tensor? sinks, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale"
_PAGED = (
    "Tensor q, Tensor k_cache, Tensor v_cache, Tensor cu_seqlens_q, Tensor seqused_k, Tensor block_table, "
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? k_scale, Tensor? v_scale, Tensor? tree_mask, "
    "Tensor? out_scale, int max_seqlen_q, "
    f"{_SCORES}, bool batch_invariant"
)
_SAVED = "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse"


def _fake(q: Tensor, _k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return reference.empty_results(q, v.shape[-1])


def _fake_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    tree_mask: Tensor | None,
    out_scale: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor]:
    out, lse = reference.empty_results(q, q.shape[-1])
    return out if out_scale is None else out.to(FP8), lse


def _fake_backward(_dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


paged_attention = define(
    f"paged_attention({_PAGED}) -> (Tensor out, Tensor lse)",
    reference.paged_attention,
    _fake_paged,
)
paged_attention_out = define(
    f"paged_attention_out(Tensor(a!) out, {_PAGED}) -> Tensor lse",
    reference.paged_attention_out,
    lambda _out, q, *_: reference.empty_results(q, q.shape[-1])[1],
)
batch_attention = define(
    f"batch_attention(Tensor q, Tensor k, Tensor v, {_OPTIONAL}, {_SCORES}, bool deterministic, int kernel) "
    "-> (Tensor out, Tensor lse)",
    reference.batch_attention,
    _fake,
)
varlen_attention = define(
    f"varlen_attention(Tensor q, Tensor k, Tensor v, {_SEQUENCES}, {_OPTIONAL}, int max_seqlen_q, int max_seqlen_k, "
    f"{_SCORES}, bool deterministic, int kernel) -> (Tensor out, Tensor lse)",
    reference.varlen_attention,
    _fake,
)
batch_attention_backward = define(
    f"batch_attention_backward({_SAVED}, Tensor? alibi_slopes, {_SCORES}, bool deterministic, int kernel) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    reference_backward.batch_attention_backward,
    _fake_backward,
)
varlen_attention_backward = define(
    f"varlen_attention_backward({_SAVED}, {_SEQUENCES}, Tensor? alibi_slopes, int max_seqlen_q, int max_seqlen_k, "
    f"{_SCORES}, bool deterministic, int kernel) -> (Tensor dq, Tensor dk, Tensor dv)",
    reference_backward.varlen_attention_backward,
    _fake_backward,
)


def _given(dout: Tensor | None, dlse: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients as the operators take them: autograd leaves out what is zero, and expands what is the same everywhere."""
    dout = torch.zeros_like(out) if dout is None else dout if dout.stride(-1) == 1 else dout.contiguous()
    return dout, dlse if dlse is None or dlse.stride(-1) == 1 else dlse.contiguous()


def _sinks_gradient(dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, sinks: Tensor | None) -> Tensor | None:
    """-Σ over the rows of a head of its weight times delta: (H). In plain torch, as it is small."""
    if sinks is None:
        return None
    weights = (sinks.unsqueeze(-1) - lse).exp()
    delta = reference_backward.row_delta(dout, out, dlse)
    sums = torch.where(lse == -torch.inf, 0, weights * delta).sum(-1)  # (H) or (B, H); an unused row may hold anything
    return -sums.reshape(-1, sinks.shape[0]).sum(0)


def _save_batch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, alibi_slopes, sinks, _q_descale, _k_descale, _v_descale, *ctx.scalars = inputs
    ctx.save_for_backward(q, k, v, *output, alibi_slopes, sinks)
    ctx.set_materialize_grads(False)


def _batch_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, alibi_slopes, sinks = ctx.saved_tensors
    dout, dlse = _given(dout, dlse, out)
    gradients = batch_attention_backward(dout, q, k, v, out, lse, dlse, alibi_slopes, *ctx.scalars)
    return (*gradients, None, _sinks_gradient(dout, out, lse, dlse, sinks), *[None] * (3 + len(ctx.scalars)))


def _save_varlen(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *sequences, alibi_slopes, sinks = inputs[:9]
    ctx.scalars = inputs[12:]
    ctx.save_for_backward(q, k, v, *output, *sequences, alibi_slopes, sinks)
    ctx.set_materialize_grads(False)


def _varlen_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *sequences, alibi_slopes, sinks = ctx.saved_tensors
    dout, dlse = _given(dout, dlse, out)
    gradients = varlen_attention_backward(dout, q, k, v, out, lse, dlse, *sequences, alibi_slopes, *ctx.scalars)
    return (*gradients, *[None] * 5, _sinks_gradient(dout, out, lse, dlse, sinks), *[None] * (3 + len(ctx.scalars)))


def _no_second_derivative(ctx: Any, *_: object) -> NoReturn:
    raise NotImplementedError("fastattn: attention has no second derivative, expected backward without create_graph")


differentiable("batch_attention", _batch_backward, _save_batch)
differentiable("varlen_attention", _varlen_backward, _save_varlen)
for _name in ("batch_attention_backward", "varlen_attention_backward"):
    differentiable(_name, _no_second_derivative)
