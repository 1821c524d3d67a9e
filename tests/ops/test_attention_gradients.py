"""Gradients of attention: against numbers and plain torch, through autograd, torch.compile and autocast."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastattn import ops
from fastattn.ops import _attention_checks
from tests.harness import formulas
from tests.harness.attention_calls import batch_calls, varlen_calls
from tests.harness.compare import assert_as_accurate
from tests.harness.generators import Gen
from tests.harness.opspec import HALVES, Call, to_device

OPS = {
    "batch_attention": (ops.batch_attention, batch_calls, formulas.batch_attention),
    "varlen_attention": (ops.varlen_attention, varlen_calls, formulas.varlen_attention),
}
each_op = pytest.mark.parametrize("name", OPS)
FP8 = torch.float8_e4m3fn


def leaves_of(call: Call) -> tuple[Call, list[Tensor]]:
    """The call with what is differentiable requiring grad, and those tensors."""
    leaves = {name: call[name].clone().requires_grad_() for name in ("q", "k", "v", "sinks") if name in call}
    return call | leaves, list(leaves.values())


@each_op
def test_autograd_is_as_accurate_as_plain_torch(name: str, device: str) -> None:
    """Every option of the table, dlse or not; what the forward keeps for the backward is the operator's own."""
    op, calls, formula = OPS[name]
    gen = Gen(device, seed=11)
    for dtype in HALVES if device == "cuda" else (torch.float32, *HALVES):
        for index, (label, call) in enumerate(calls(Gen(device, seed=12), dtype)):
            if call["q"].dtype is FP8:
                continue
            differentiable, leaves = leaves_of(call)
            out, lse = op(**differentiable)
            dout, dlse = gen.randn(*out.shape, dtype=out.dtype), gen.randn(*lse.shape)
            upstream = (dout, dlse) if index % 2 else (dout,)
            found = torch.autograd.grad((out, lse)[: len(upstream)], leaves, upstream)
            host, host_dlse = to_device(call, "cpu"), dlse.cpu() if index % 2 else None
            exact = formulas.gradients(formula, torch.float64, dout.cpu(), host, host_dlse)
            plain = formulas.gradients(formula, dtype, dout.cpu(), host, host_dlse)
            exact_out = formula(torch.float64, **host, attend=formulas.attention_matrix)[0].detach()
            kept = formulas.errors_from_rounded_out(formula, dout.cpu(), out.detach().cpu(), exact_out, host)
            for i, (a, e, p, noise) in enumerate(zip(found, exact, plain, kept, strict=True)):
                assert_as_accurate(a, e, p, f"{name} {dtype} {label}, gradient {i}", noise=1e-4 + noise)


def small_call(rng: random.Random, packed: bool) -> tuple[Callable[..., Any], list[Tensor]]:
    """An operator in fp64 on a few numbers, with options at random, and what it is differentiable in."""

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    kv_heads, rows, keys = rng.choice((1, 2)), rng.choice((1, 3, 5)), rng.choice((0, 2, 5))
    heads, dim, v_dim = kv_heads * rng.choice((1, 2)), rng.choice((2, 3)), rng.choice((2, 4))
    leading = ((2 * rows,), (2 * keys + 1,)) if packed else ((2, rows), (2, keys))
    q, k, v = tensor(*leading[0], heads, dim), tensor(*leading[1], kv_heads, dim), tensor(*leading[1], kv_heads, v_dim)
    slopes = rng.choice((None, torch.rand(heads), torch.rand(2, heads)))
    sinks = rng.choice((None, tensor(heads)))
    sequences: tuple[Any, ...] = ()
    longest: tuple[Any, ...] = ()
    if packed:
        offsets = [torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (rows, keys)]
        used = [rng.choice((None, torch.tensor([max(n - 1, 0), n], dtype=torch.int32))) for n in (rows, keys)]
        sequences, longest = (*offsets, *used), (rows, keys)
    window = rng.choice(((-1, -1), (1, 0), (0, 2), (-1, 1)))
    scores = (0.7, rng.random() < 0.5, *window, rng.choice((0.0, 2.0)), False, 0)
    op = torch.ops.fastattn.varlen_attention if packed else torch.ops.fastattn.batch_attention

    def call(q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> list[Tensor]:
        results = op(q, k, v, *sequences, slopes, sinks[0] if sinks else None, None, None, None, *longest, *scores)
        return [t.masked_fill(t == -torch.inf, 0) for t in results]

    return call, [q, k, v] if sinks is None else [q, k, v, sinks]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_gradcheck(seed: int, packed: bool) -> None:
    torch.manual_seed(seed)
    call, inputs = small_call(random.Random(seed), packed)
    assert torch.autograd.gradcheck(call, inputs)


@each_op
def test_compiles_in_one_graph_with_its_backward(name: str, device: str) -> None:
    """And no recompilation for each length."""
    torch._dynamo.reset()
    op, calls, _ = OPS[name]
    label, call = next(iter(calls(Gen(device, seed=13), torch.float16)))
    _, inputs = leaves_of(call)
    rest = {key: value for key, value in call.items() if key not in ("q", "k", "v", "sinks")}

    def loss(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        out, lse = op(q, k, v, sinks=sinks, **rest)
        return out.float().square().sum() + lse.masked_fill(lse.isinf(), 0).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*inputs), inputs)
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, msg=lambda m: f"{label}: {m}")


def test_dynamic_shapes_are_one_graph() -> None:
    torch._dynamo.reset()

    def loss(q: Tensor) -> Tensor:
        return ops.batch_attention(q, q, q, causal=True)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5, 9):
        q = Gen(seed=rows).randn(2, rows, 2, 16).requires_grad_()
        torch.testing.assert_close(*(torch.autograd.grad(f(q), q) for f in (compiled, loss)))


@each_op
def test_opcheck_with_gradients(name: str, device: str) -> None:
    _, calls, _ = OPS[name]
    _, call = next(iter(calls(Gen(device, seed=14), torch.float16)))
    call = {key: t.nan_to_num() if isinstance(t, Tensor) else t for key, t in call.items()}
    differentiable, _ = leaves_of(call)
    window, scale = (-1, -1), call["q"].shape[-1] ** -0.5
    fixed = (scale, call["causal"], *window, 0.0, False, _attention_checks.KERNELS[call["kernel"]])
    q, k, v, sinks = (differentiable[n] for n in ("q", "k", "v", "sinks"))
    options = (call["alibi_slopes"], sinks.detach().float().requires_grad_(), None, None, None)
    if name == "batch_attention":
        torch.library.opcheck(torch.ops.fastattn.batch_attention.default, (q, k, v, *options, *fixed))
        return
    sequences = [call[n] for n in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")]
    longest = (call["max_seqlen_q"], call["max_seqlen_k"])
    torch.library.opcheck(
        torch.ops.fastattn.varlen_attention.default, (q, k, v, *sequences, *options, *longest, *fixed)
    )


def test_autocast_is_torchs(device: str) -> None:
    """fp32 becomes the dtype of autocast, gradients are fp32 again."""
    gen = Gen(device, seed=15)
    inputs = [gen.randn(2, 17, 4, 32).requires_grad_() for _ in range(3)]
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    offsets = gen.tensor([0, 17, 34])
    with torch.autocast(device, dtype):
        out, lse = ops.batch_attention(*inputs, causal=True)
        packed, _ = ops.varlen_attention(*(t.flatten(0, 1) for t in inputs), offsets, offsets, 17, 17, causal=True)
    assert (out.dtype, packed.dtype, lse.dtype) == (dtype, dtype, torch.float32)
    expected, _ = ops.batch_attention(*(t.to(dtype) for t in inputs), causal=True)
    assert torch.equal(out, expected)
    assert torch.equal(packed, expected.flatten(0, 1))
    for a, b in zip(*(torch.autograd.grad(o.float().sum(), inputs) for o in (out, expected)), strict=True):
        assert a.dtype is torch.float32
        assert torch.equal(a, b)


def test_gradients_in_all_the_shapes_that_autograd_gives_them(device: str) -> None:
    """The same number everywhere, of lse alone, of a transposed result, recomputed."""
    gen = Gen(device, seed=16)
    q, k, v = (gen.randn(2, 9, 2, 16, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    ones = torch.ones_like(q)

    def gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(*ops.batch_attention(q, k, v)), (q, k, v))

    expected = gradient(lambda out, _: (out * ones).sum())
    again = torch.autograd.grad(
        checkpoint(lambda q: ops.batch_attention(q, k, v)[0], q, use_reentrant=False).sum(), (q, k, v)
    )
    for other in (gradient(lambda out, _: out.sum()), gradient(lambda out, _: (out.mT * ones.mT).sum()), again):
        for a, b in zip(other, expected, strict=True):
            assert torch.equal(a, b)
    *_, dv = gradient(lambda _, lse: lse.sum())
    assert torch.equal(dv, torch.zeros_like(v))


def test_a_frozen_side_needs_none(device: str) -> None:
    gen = Gen(device, seed=17)
    q, k = (gen.randn(1, 5, 2, 16, dtype=torch.bfloat16) for _ in range(2))
    out, _ = ops.batch_attention(q, k.requires_grad_(), q)
    out.sum().backward()
    assert k.grad is not None
    assert q.grad is None
    with torch.no_grad():
        assert not ops.batch_attention(q, k, q)[0].requires_grad


def test_what_is_not_there_is_said() -> None:
    q = Gen(seed=18).randn(1, 5, 2, 16).requires_grad_()
    (first,) = torch.autograd.grad(ops.batch_attention(q, q, q)[0].square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first.sum().backward()
    with pytest.raises(ValueError, match=r"q has a tangent.* no forward mode"):
        torch.func.jvp(lambda t: ops.batch_attention(t, q.detach(), q.detach())[0], (q.detach(),), (q.detach(),))
    with pytest.raises(ValueError, match=r"alibi_slopes requires grad.* has no backward for it; use .detach\(\)"):
        ops.batch_attention(q, q, q, alibi_slopes=torch.ones(2, requires_grad=True))
    many = torch.func.vmap(lambda t: ops.batch_attention(t, t, t)[0])(torch.stack([q.detach()] * 2))
    assert torch.equal(many[0], ops.batch_attention(q, q, q)[0])


def test_cuda_without_the_backward_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the forward runs, and only where a gradient is asked for."""
    monkeypatch.setattr(_attention_checks, "has_cuda_kernel", lambda name: not name.endswith("_backward"))
    with FakeTensorMode():
        q = torch.empty(1, 5, 2, 16, device="cuda", dtype=torch.bfloat16)
        _attention_checks.check_gradient("batch_attention", q, q, q, None)
        with pytest.raises(RuntimeError, match=r"k requires grad and is on cuda.* no CUDA kernel of its backward"):
            _attention_checks.check_gradient("batch_attention", q, q.clone().requires_grad_(), q, None)


@pytest.mark.parametrize("packed", [False, True])
def test_merged_halves_are_the_whole(packed: bool, device: str) -> None:
    """Keys in two parts, and their gradients through the merge; the second half is empty for some rows."""
    gen = Gen(device, seed=19)
    q, k, v = (gen.randn(1, 33, 2, 16, dtype=torch.float16).requires_grad_() for _ in range(3))

    def halves() -> tuple[Tensor, Tensor]:
        # Row i sees the keys up to i: all of the first 20 from row 20 on, of the other 13 none before it.
        early, early_lse = ops.batch_attention(q[:, :20], k[:, :20], v[:, :20], causal=True)
        late, late_lse = ops.batch_attention(q[:, 20:], k[:, :20], v[:, :20])
        first, first_lse = torch.cat([early, late], 1), torch.cat([early_lse, late_lse], 2)
        second, second_lse = ops.batch_attention(q, k[:, 20:], v[:, 20:], causal=True)
        if packed:
            out, lse = ops.merge_attention_states(first[0], first_lse[0], second[0], second_lse[0])
            return out[None], lse[None]
        return ops.merge_attention_states(first, first_lse, second, second_lse)

    whole = ops.batch_attention(q, k, v, causal=True)
    merged = halves()
    torch.testing.assert_close(merged[0], whole[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(merged[1], whole[1], rtol=1e-5, atol=1e-5)
    dout, dlse = gen.randn(*whole[0].shape, dtype=torch.float16), gen.randn(*whole[1].shape)
    for a, b in zip(*(torch.autograd.grad(o, (q, k, v), (dout, dlse)) for o in (merged, whole)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_merge_gradcheck() -> None:
    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    for shape, lse_shape in (((3, 2, 4), (2, 3)), ((2, 3, 2, 4), (2, 2, 3))):
        inputs = [tensor(*shape), tensor(*lse_shape), tensor(*shape), tensor(*lse_shape)]
        assert torch.autograd.gradcheck(torch.ops.fastattn.merge_attention_states, inputs)
