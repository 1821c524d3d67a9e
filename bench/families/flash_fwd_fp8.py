"""Attention forward on fp8 (e4m3) inputs, 16k tokens a call, beside FlashAttention-3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench.families.flash_fwd import HEADS, TOKENS, first
from bench.harness import accuracy, formulas
from bench.harness.case import Case, CaseSpec, Checked, Context, Family, op_case
from bench.harness.ceilings import Work
from bench.harness.peers import require
from fastattn import ops

_QUICK = {(64, 1024, True), (128, 8192, False), (256, 1024, True)}


def _rounded(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Plain torch in fp32 on what the inputs hold, with P, at most 1, rounded to e4m3 before it is multiplied by V."""
    out = torch.empty(q.shape, device=q.device)
    group, num_keys = q.shape[2] // k.shape[2], k.shape[1]
    key = torch.arange(num_keys, device=q.device)
    for b, head in product(range(q.shape[0]), range(q.shape[2])):
        keys, values = (t[b, :, head // group].float() for t in (k, v))
        for start in range(0, q.shape[1], 4096):
            rows = q[b, start : start + 4096, head].float()
            scores = rows @ keys.t() * q.shape[3] ** -0.5
            if causal:
                last = torch.arange(start, start + len(rows), device=q.device) + num_keys - q.shape[1]
                scores.masked_fill_(key > last[:, None], -torch.inf)
            probs = (scores - scores.amax(-1, keepdim=True)).exp_()
            total = probs.sum(-1, keepdim=True)
            out[b, start : start + 4096, head] = probs.to(torch.float8_e4m3fn).float() @ values / total
    return out


def _judge(call: dict[str, Any], results: list[Tensor]) -> Checked:
    q, k, v, causal = (call[name] for name in ("q", "k", "v", "causal"))
    exact, exact_lse = formulas.batch_attention(torch.float32, q, k, v, causal)
    allowed = accuracy.allowed_error(torch.bfloat16, exact, _rounded(q, k, v, causal))
    out, lse = results
    share = accuracy.compare(out, exact, allowed, "batch_attention, result 0")
    # Hopper adds up products of fp8 with 13 bits behind the leading one.
    allowed = 1e-3 * max(20.0, float(exact_lse.abs().max()))
    return Checked(max(share, accuracy.compare(lse, exact_lse, allowed, "batch_attention, result 1")), exact)


def attention(context: Context, dim: int, length: int, causal: bool, heads: int, kv_heads: int) -> Case:
    rng = context.generator(dim + length)
    batch = TOKENS // length

    def randn(num_heads: int) -> Tensor:
        t = torch.randn(batch, length, num_heads, dim, generator=rng, device=context.device)
        return t.to(torch.float8_e4m3fn)

    q, k, v = randn(heads), randn(kv_heads), randn(kv_heads)
    scales = [torch.ones(batch, kv_heads, device=context.device) for _ in range(3)]

    def fa3() -> Callable[[], Tensor]:
        attend = require("fa3_fwd_interface").flash_attn_func
        names = ("q_descale", "k_descale", "v_descale")
        given = dict(zip(names, scales, strict=True))
        return lambda: first(attend(q, k, v, causal=causal, **given))

    pairs = batch * (length * (length + 1) // 2 if causal else length * length)
    return op_case(
        ops.batch_attention,
        {
            "q": q,
            "k": k,
            "v": v,
            "causal": causal,
            "q_descale": scales[0],
            "k_descale": scales[1],
            "v_descale": scales[2],
        },
        formulas.batch_attention,
        peers={"fa3": fa3},
        work=Work(num_bytes=3 * q.nbytes + k.nbytes + v.nbytes, num_ops=4 * pairs * heads * dim, rate="fp8_tflop_s"),
        config=f"{batch} × {length} tokens, {heads} heads{f' to {kv_heads}' if kv_heads != heads else ''} of {dim}, e4m3, "
        f"{'causal' if causal else 'full'}",
        judge=_judge,
    )


def _cases() -> Iterator[CaseSpec]:
    for dim, length, causal in product((64, 128, 256), (1024, 4096, 8192, 16384), (False, True)):
        build = partial(attention, dim=dim, length=length, causal=causal, heads=HEADS[dim], kv_heads=HEADS[dim])
        name = f"d{dim}_s{length}_{'causal' if causal else 'full'}_fp8"
        yield CaseSpec(name, build, quick=(dim, length, causal) in _QUICK)
    build = partial(attention, dim=128, length=8192, causal=True, heads=32, kv_heads=8)
    yield CaseSpec("d128_gqa32to8_s8192_causal_fp8", build)


FAMILY = Family("flash_fwd_fp8", "cuda", "batch_attention on e4m3 inputs beside FlashAttention-3", tuple(_cases()))
