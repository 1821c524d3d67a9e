"""Attention and its gradients on drawn calls with every option, on each kernel: the 2× rule for every result, poison where
nothing may come from, and the same bits where they were asked for. A few of the same calls run on the CPU."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import ops
from tests.harness import formulas
from tests.harness.compare import assert_as_accurate, assert_within

HEAD_DIMS = (8, 40, 64, 72, 80, 96, 104, 128, 160, 192, 200, 256)
LENGTHS = (0, 1, 2, 31, 63, 64, 65, 113, 127, 128, 129, 191, 193, 257, 389, 512, 601)
MANY_HEADS = (
    16,
    31,
    32,
    64,
    71,
    128,
)  # to a KV head; drawn rarely, with short sequences: formulas repeat keys for each
SEEDS, PER_SEED = 16, 100


def places() -> list[Any]:
    """A device and a kernel."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    on_gpu = [("cuda", "sm80"), ("cuda", "sm90")] if hopper else [("cuda", "sm80")]
    return [("cpu", "auto"), *(pytest.param(*place, marks=pytest.mark.gpu) for place in on_gpu)]


class Drawn:
    """One call: tensors with gaps between their rows, on a device, from a seed."""

    def __init__(self, device: str, seed: int) -> None:
        self.device, self.rng = device, random.Random(seed)
        self.gen = torch.Generator(device).manual_seed(seed)
        rng = self.rng
        self.dtype = rng.choice((torch.bfloat16, torch.float16))
        self.dim = self.v_dim = rng.choice(HEAD_DIMS)
        if rng.random() < 0.3:
            self.v_dim = rng.choice(HEAD_DIMS)
        self.kv_heads, group, lengths = rng.choice((1, 2, 3)), rng.choice((1, 1, 2, 3, 4, 7)), LENGTHS
        if rng.random() < 0.08:
            self.kv_heads, group, lengths = rng.choice((1, 1, 2)), rng.choice(MANY_HEADS), LENGTHS[:8]
        self.heads = self.kv_heads * group
        self.packed = rng.random() < 0.6
        batch = rng.choice((1, 2, 4)) if self.packed else rng.choice((1, 2))
        self.runs = [rng.choice(lengths) for _ in range(batch)]
        self.lengths = [n if rng.random() < 0.6 else rng.choice(lengths) for n in self.runs]
        if not self.packed:
            self.runs, self.lengths = self.runs[:1] * batch, self.lengths[:1] * batch
        self.call = self._tensors() | self._options()

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.gen, device=self.device, dtype=dtype or self.dtype)

    def _gapped(self, *shape: int) -> Tensor:
        *rows, heads, dim = shape
        memory = torch.full((*rows, heads, dim + 8 * self.rng.randint(0, 1)), math.nan, dtype=self.dtype)
        return memory.to(self.device)[..., :dim].copy_(self.randn(*shape))

    def _tensors(self) -> dict[str, Any]:
        if not self.packed:
            (batch, rows, keys) = len(self.runs), self.runs[0], self.lengths[0]
            q, k = self._gapped(batch, rows, self.heads, self.dim), self._gapped(batch, keys, self.kv_heads, self.dim)
            return {"q": q, "k": k, "v": self._gapped(batch, keys, self.kv_heads, self.v_dim)}
        starts, key_starts = (
            torch.tensor([0, *n], device=self.device).cumsum(0).to(torch.int32) for n in (self.runs, self.lengths)
        )
        q = self._gapped(sum(self.runs), self.heads, self.dim)
        k, v = (self._gapped(sum(self.lengths) + 3, self.kv_heads, dim) for dim in (self.dim, self.v_dim))
        for t in (k, v):
            t[sum(self.lengths) :] = math.nan
        call: dict[str, Any] = {"q": q, "k": k, "v": v, "cu_seqlens_q": starts, "cu_seqlens_k": key_starts}
        for side, counts, whole in (("q", self.runs, (q,)), ("k", self.lengths, (k, v))):
            call[f"max_seqlen_{side}"] = max(counts)
            if self.rng.random() < 0.3:
                used = [self.rng.randint(0, n) for n in counts]
                call[f"seqused_{side}"] = torch.tensor(used, device=self.device, dtype=torch.int32)
                start = 0
                for n, count in zip(counts, used, strict=True):
                    for t in whole:
                        t[start + count : start + n] = math.nan
                    start += n
        return call

    def _options(self) -> dict[str, Any]:
        rng = self.rng
        options: dict[str, Any] = {"causal": rng.random() < 0.5, "deterministic": rng.random() < 0.3}
        if rng.random() < 0.4:
            options["window_size"] = tuple(rng.choice((-1, 0, 1, 17, 64, 127, 300)) for _ in range(2))
        if rng.random() < 0.2:
            options["softcap"] = rng.choice((5.0, 30.0))
        if rng.random() < 0.2:
            options["softmax_scale"] = rng.choice((0.02, 0.3))
        if rng.random() < 0.3:
            shape = (self.heads,) if rng.random() < 0.5 else (len(self.runs), self.heads)
            options["alibi_slopes"] = self.randn(*shape, dtype=torch.float32).abs()
        if rng.random() < 0.3:
            options["sinks"] = self.randn(self.heads, dtype=rng.choice((torch.float32, self.dtype)))
        return options

    def __str__(self) -> str:
        values = {name: value for name, value in self.call.items() if not isinstance(value, Tensor)}
        given = [name for name in self.call if name not in ("q", "k", "v", *values)]
        heads = f"heads {self.heads}/{self.kv_heads} of {self.dim}, {self.v_dim}"
        return f"{self.dtype}, {heads}, {self.runs} to {self.lengths}, {values}, {', '.join(given)}"


def check(drawn: Drawn, kernel: str) -> None:
    call = drawn.call
    op, formula = (
        (ops.varlen_attention, formulas.varlen_attention)
        if drawn.packed
        else (ops.batch_attention, formulas.batch_attention)
    )
    names = [name for name in ("q", "k", "v", "sinks") if name in call]
    leaves = [call[name].detach().requires_grad_() for name in names]
    out, lse = op(**call | dict(zip(names, leaves, strict=True)), kernel=kernel)
    dout, dlse = drawn.randn(*out.shape), drawn.randn(*lse.shape, dtype=torch.float32)
    upstream = (dout, dlse) if drawn.rng.random() < 0.4 else (dout,)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad((out, lse)[: len(upstream)], leaves, upstream, retain_graph=True)

    found = gradients()
    exact, plain = (
        [t.detach() for t in formula(c, **call, attend=formulas.attention_matrix)] for c in (torch.float64, drawn.dtype)
    )
    assert_as_accurate(out, exact[0], plain[0], "out")
    largest = float(exact[1][exact[1].isfinite()].abs().max()) if exact[1].isfinite().any() else 0.0
    assert_within(lse, exact[1], 1e-5 * max(20.0, largest), "lse")
    rest = (dout, call, dlse if len(upstream) == 2 else None)
    right, rounded = (formulas.gradients(formula, c, *rest) for c in (torch.float64, drawn.dtype))
    kept = formulas.errors_from_rounded_out(formula, dout, out.detach(), exact[0], call)
    for name, a, e, p, noise in zip(names, found, right, rounded, kept, strict=True):
        assert_as_accurate(a, e, p, f"gradient of {name}", noise=1e-4 + noise)
    if call["deterministic"]:
        for first, second in zip(found, gradients(), strict=True):
            assert torch.equal(first, second), "another run gives other bits"


@pytest.mark.parametrize(("device", "kernel"), places())
@pytest.mark.parametrize("seed", range(SEEDS))
def test_drawn_calls(device: str, kernel: str, seed: int) -> None:
    for index in range(2 if device == "cpu" else PER_SEED):
        drawn = Drawn(device, 1000 * seed + index)
        try:
            check(drawn, kernel)
        except (AssertionError, RuntimeError) as error:
            raise AssertionError(f"case {index}: {drawn}: {error}") from error


@pytest.mark.parametrize(("device", "kernel"), places())
def test_another_sequences_gradients_are_not_touched_by_a_neighbours_nan(device: str, kernel: str) -> None:
    lengths = [5, 300, 0, 1, 177, 64, 129]
    drawn = Drawn(device, 3)
    starts = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    q, k, v, dout = (drawn.randn(sum(lengths), n, 64, dtype=torch.bfloat16) for n in (4, 2, 2, 4))

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.requires_grad_() for t in tensors[:3]]
        options: dict[str, Any] = {"causal": True, "deterministic": True, "kernel": kernel}
        out, _ = ops.varlen_attention(*leaves, starts, starts, 300, 300, **options)
        return torch.autograd.grad(out, leaves, tensors[3])

    clean = gradients(q, k, v, dout)
    for bad in range(len(lengths)):
        own = slice(int(starts[bad]), int(starts[bad + 1]))
        poisoned = [t.detach().clone() for t in (q, k, v, dout)]
        for t in poisoned:
            t[own] = math.nan
        for found, expected in zip(gradients(*poisoned), clean, strict=True):
            found[own] = expected[own]
            assert torch.equal(found, expected), f"sequence {bad}"
