"""Forms of attention that take different ways through the kernels, small enough for a thousand runs: all must have the same
bits, whichever CTA takes which tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn import ops
from tests.harness.generators import Gen, offsets, pages
from tests.harness.opspec import Call

E4M3 = torch.float8_e4m3fn
LENGTHS = [700, 3, 1000, 64, 130]  # of packed sequences


@dataclass
class Form:
    op: Callable[..., tuple[Tensor, ...]]
    call: Call

    def run(self) -> list[Tensor]:
        return [bits(t) for t in self.op(**self.call)]


def bits(t: Tensor) -> Tensor:
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])


def differing_runs(form: Form, runs: int) -> int:
    """Of so many runs, those whose results differ from the first one's in a bit."""
    first = form.run()
    differ = torch.zeros((), dtype=torch.int64, device=first[0].device)
    for _ in range(runs):
        again = form.run()
        differ += torch.stack([(a != b).any() for a, b in zip(again, first, strict=True)]).any()
    return int(differ)


def batch(gen: Gen, q: tuple[int, ...], k: tuple[int, ...], **options: Any) -> Form:
    """q (B, Sq, H, D), k (B, Sk, Hk, D)."""
    tensors = (gen.randn(*shape, dtype=torch.bfloat16) for shape in (q, k, k))
    return Form(ops.batch_attention, dict(zip("qkv", tensors, strict=True)) | options)


def batch_fp8(gen: Gen, q: tuple[int, ...], k: tuple[int, ...], **options: Any) -> Form:
    call = batch(gen, q, k, **options).call
    scales = {f"{name}_descale": gen.rand(q[0], k[2]) + 0.5 for name in "qkv"}
    return Form(ops.batch_attention, call | {name: call[name].to(E4M3) for name in "qkv"} | scales)


def packed(gen: Gen, heads: int, kv_heads: int, dim: int, **options: Any) -> Form:
    q, k, v = (gen.randn(sum(LENGTHS), n, dim, dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads))
    starts = gen.tensor(offsets(LENGTHS))
    call: Call = {"q": q, "k": k, "v": v, "cu_seqlens_q": starts, "cu_seqlens_k": starts}
    longest = {"max_seqlen_q": max(LENGTHS), "max_seqlen_k": max(LENGTHS)}
    return Form(ops.varlen_attention, call | longest | options)


def backward(form: Form) -> Form:
    """Deterministic, of what the same kernel's forward gives."""
    out, lse = form.op(**form.call)
    of = ops.varlen_attention_backward if form.op is ops.varlen_attention else ops.batch_attention_backward
    return Form(of, form.call | {"dout": form.call["q"], "out": out, "lse": lse, "deterministic": True})


def paged(
    gen: Gen,
    runs: list[int],
    lengths: list[int],
    shape: tuple[int, int, int],
    kind: torch.dtype = torch.bfloat16,
    of_tokens: bool = False,
    **options: Any,
) -> Form:
    """shape: heads, KV heads, head dim; kind: of the cache, with scales of tokens or of heads where it has 8 bits."""
    heads, kv_heads, dim = shape
    cache = pages(gen, lengths, 16, kv_heads, dim, torch.bfloat16)
    pools: Call = {"k_cache": cache.k_cache, "v_cache": cache.v_cache}
    if kind is not torch.bfloat16:
        pools["k_cache"], pools["v_cache"], scales = cache.in_8_bits(gen, kind, of_tokens)
        pools |= scales
    q = gen.randn(sum(runs), heads, dim, dtype=torch.bfloat16)
    rows = {"cu_seqlens_q": gen.tensor(offsets(runs)), "seqused_k": gen.tensor(lengths), "max_seqlen_q": max(runs)}
    return Form(ops.paged_attention, {"q": q, "block_table": cache.block_table} | pools | rows | options)


def chain(gen: Gen, runs: list[int]) -> Tensor:
    """A tree mask in which each token sees all before it but its neighbour."""
    return gen.tensor([(1 << i + 1) - 1 & ~(1 << i >> 1) for run in runs for i in range(run)], torch.int64)


# Of the kernels that batch_attention and varlen_attention have a name for.
FORWARD: dict[str, Callable[[Gen], Form]] = {
    "head dim 64": lambda gen: batch(gen, (3, 777, 12, 64), (3, 777, 12, 64)),
    "head dim 96, window, softcap": lambda gen: batch(
        gen, (2, 600, 4, 96), (2, 600, 4, 96), window_size=(100, 0), softcap=20.0
    ),
    "head dim 128, GQA, causal": lambda gen: batch(gen, (2, 600, 16, 128), (2, 600, 4, 128), causal=True),
    "head dim 256, causal": lambda gen: batch(gen, (2, 400, 8, 256), (2, 400, 2, 256), causal=True),
    "sinks and slopes": lambda gen: batch(
        gen, (2, 300, 8, 64), (2, 300, 8, 64), sinks=gen.randn(8), alibi_slopes=gen.rand(8)
    ),
    "packed sequences": lambda gen: packed(gen, 24, 8, 128, causal=True),
    "split keys": lambda gen: batch(gen, (1, 128, 4, 128), (1, 4000, 4, 128)),
    "packed groups": lambda gen: batch(gen, (4, 17, 32, 128), (4, 900, 4, 128), causal=True),
}  # fmt: skip
FORWARD_FP8: dict[str, Callable[[Gen], Form]] = {
    f"fp8, head dim {dim}": lambda gen, dim=dim: batch_fp8(gen, (2, 500, 8, dim), (2, 500, 2, dim), causal=True)
    for dim in (64, 128, 256)
}
BACKWARD: dict[str, Callable[[Gen, str], Form]] = {
    "head dim 64": lambda gen, kernel: backward(batch(gen, (2, 400, 8, 64), (2, 400, 8, 64), kernel=kernel)),
    "head dim 128, GQA, causal": lambda gen, kernel: backward(
        batch(gen, (2, 600, 8, 128), (2, 600, 2, 128), causal=True, kernel=kernel)
    ),
    "head dim 256, window": lambda gen, kernel: backward(
        batch(gen, (1, 300, 4, 256), (1, 300, 4, 256), window_size=(90, 10), kernel=kernel)
    ),
    "packed sequences": lambda gen, kernel: backward(packed(gen, 8, 2, 64, causal=True, kernel=kernel)),
}  # fmt: skip
# Which of the kernels over pages takes a form, follows from its sizes.
PAGED: dict[str, Callable[[Gen], Form]] = {
    "few keys": lambda gen: paged(gen, [1, 2], [900, 70], (8, 2, 128)),
    "clusters": lambda gen: paged(gen, [1, 2], [900, 70], (8, 2, 128), softcap=20.0),
    "clusters, fp8": lambda gen: paged(gen, [1, 1], [900, 70], (16, 2, 128), E4M3),
    "clusters, int8": lambda gen: paged(gen, [1, 1], [900, 70], (16, 2, 64), torch.int8, True),
    "split keys": lambda gen: paged(gen, [1, 2, 1], [2500, 70, 1800], (32, 8, 128)),
    "split keys, head dim 64": lambda gen: paged(gen, [1] * 9, [2100, *range(200, 1000, 100)], (9, 3, 64)),
    "split keys, head dim 256": lambda gen: paged(gen, [1, 2, 1], [2500, 70, 1800], (16, 8, 256)),
    "split keys, fp8": lambda gen: paged(gen, [1, 2, 1], [2500, 70, 1800], (32, 8, 128), E4M3),
    "split keys, int8": lambda gen: paged(gen, [1, 2, 1], [2500, 70, 1800], (32, 8, 128), torch.int8, True),
    "split keys, batch-invariant": lambda gen: paged(
        gen, [1, 2, 1], [2500, 70, 1800], (32, 8, 128), batch_invariant=True
    ),
    "trees": lambda gen: paged(gen, [7, 5], [1500, 600], (8, 2, 128), tree_mask=chain(gen, [7, 5])),
    "few keys, out in e4m3": lambda gen: paged(
        gen, [1, 2], [900, 70], (8, 2, 128), out_scale=gen.tensor([0.01], torch.float32)
    ),
    "packed groups": lambda gen: paged(gen, [17, 9], [1500, 600], (32, 4, 128)),
    "prompts": lambda gen: paged(gen, [500, 130], [700, 900], (8, 2, 128)),
    "prompts, fp8": lambda gen: paged(gen, [500, 130], [700, 900], (8, 2, 128), E4M3),
    "prompts, int8": lambda gen: paged(gen, [500, 130], [700, 900], (8, 2, 128), torch.int8, True),
    "prompts among tokens": lambda gen: paged(
        gen, [500, *[1] * 19], [700, *range(100, 2000, 100)], (32, 8, 128)
    ),
}  # fmt: skip


def all_forms(gen: Gen, kernels: tuple[str, ...]) -> dict[str, Form]:
    """By name; kernels: those of attention that the device has."""
    found: dict[str, Form] = {}
    for kernel in kernels:
        for name, make in FORWARD.items():
            form = make(gen)
            found[f"forward, {name}, {kernel}"] = Form(form.op, form.call | {"kernel": kernel})
        for name, make_backward in BACKWARD.items():
            found[f"backward, {name}, {kernel}"] = make_backward(gen, kernel)
    if kernels != ("sm80",):  # which has no fp8
        found |= {f"forward, {name}": make(gen) for name, make in FORWARD_FP8.items()}
    return found | {f"pages, {name}": make(gen) for name, make in PAGED.items()}
