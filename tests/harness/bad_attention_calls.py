"""Bad calls of the attention operators."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from tests.harness.generators import Gen
from tests.harness.opspec import Bad, Call


def _bad_windows() -> Bad:
    for window in ((-2, 0), (0, -2), (2**31, 0)):
        yield (
            f"window {window}",
            {"window_size": window},
            ValueError,
            ("window", str(min(window) if min(window) < -1 else 2**31)),
        )
    for odd in ((1.5, 0), (1,), 5, None, ("a", 1)):
        yield f"window {odd}", {"window_size": odd}, TypeError, ("window", "expected")


def _bad_options(gen: Gen, base: Call, op: str) -> Bad:
    """Of the arguments that attention over contiguous keys alone has."""
    q, k = base["q"], base["k"]
    heads, kv_heads = q.shape[-2], k.shape[-2]
    batch = base["alibi_slopes"].shape[0]
    yield "another kernel", {"kernel": "sm70"}, ValueError, ("kernel is 'sm70'", "'auto', 'sm80', 'sm90'")
    of_v = [name for name in ("v", "dout", "out") if name in base]
    for dim in (12, 0):
        narrow = {name: base[name][..., :dim].contiguous() for name in of_v}
        yield f"head dim {dim} of v", narrow, ValueError, ("v has shape", "Dv a multiple of 8")
    wide = {name: torch.cat([base[name]] * 12, -1)[..., :264].contiguous() for name in of_v}
    yield "head dim 264 of v", wide, ValueError, ("v has shape", "multiple of 8 from 8 to 256")
    if op.endswith("backward"):
        fp8 = q.to(torch.float8_e4m3fn)
        yield "fp8", {"q": fp8}, TypeError, ("q is torch.float8_e4m3fn",)
        yield "no slope", {"alibi_slopes": gen.rand(heads - 1)}, ValueError, ("alibi_slopes has shape", "H = ")
        return
    scale = gen.rand(batch, kv_heads)
    for name in "qkv":
        says = (f"{name}_descale is given and q is", "only with torch.float8_e4m3fn")
        yield f"{name}_descale without fp8", {f"{name}_descale": scale}, ValueError, says
    eight = {name: base[name].to(torch.float8_e4m3fn) for name in "qkv"}
    yield "only q in fp8", {"q": eight["q"]}, TypeError, ("k is", "expected torch.float8_e4m3fn as q")
    other = {n: t.to(torch.float8_e5m2) for n, t in eight.items()}
    yield "e5m2", other, TypeError, ("q is torch.float8_e5m2",)
    narrow = {n: t[..., :24].contiguous() for n, t in eight.items()}
    if q.shape[-1] >= 24:
        yield "fp8 of 24", narrow, ValueError, ("q has shape", "multiple of 16 from 16 to 256 in fp8")
    yield (
        "fp8, v of 8",
        eight | {"v": eight["v"][..., :8].contiguous()},
        ValueError,
        ("v has shape", "Dv a multiple of 16"),
    )
    for name in "qkv":
        descale, says = f"{name}_descale", f"{name}_descale"
        yield f"{descale} short", eight | {descale: scale[:, 1:]}, ValueError, (says, "has shape", "Hk = 2")
        yield f"{descale} of another batch", eight | {descale: scale[1:]}, ValueError, (says, "has shape", "B = ")
        yield f"{descale} flat", eight | {descale: scale[0]}, ValueError, (says, "1 dimensions", "expected 2")
        yield f"{descale} fp64", eight | {descale: scale.double()}, TypeError, (says, "float64")
        yield f"{descale} a number", eight | {descale: 1.0}, TypeError, (says, "float", "or None")
    for name in ("q", "k"):
        wants = eight | {name: eight[name].clone().requires_grad_()}
        yield (
            f"fp8, {name} requires grad",
            wants,
            ValueError,
            (f"{name} requires grad", "fp8 attention has no backward"),
        )


def _bad_sequences(gen: Gen, base: Call) -> Bad:
    """Values in the offsets, which are read on the CPU only."""
    if base["q"].is_cuda:
        return
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        yield f"{name} from 2", {name: gen.tensor([2, 3, 6, 9])}, ValueError, (f"{name}[0] is 2", "expected 0")
        yield f"{name} descends", {name: gen.tensor([0, 5, 4, 9])}, ValueError, (f"{name}[2] is 4",)
    ends_late = {"cu_seqlens_k": gen.tensor([0, 9, 14, 99])}
    yield "keys end late", ends_late, ValueError, ("cu_seqlens_k[-1] is 99", "Tk = 25")
    yield "max_seqlen_q small", {"max_seqlen_q": 0}, ValueError, ("max_seqlen_q is 0", "sequence 0")
    yield "max_seqlen_k small", {"max_seqlen_k": 8}, ValueError, ("max_seqlen_k is 8", "at least 9")
    for name, lengths in (("seqused_q", (1, 5, 3)), ("seqused_k", (9, 5, 8))):
        for b, wrong in ((0, -1), (1, 6), (2, 2**31 - 1)):
            used = gen.tensor([wrong if b == i else n for i, n in enumerate(lengths)])
            says = (f"{name}[{b}] is {wrong}", f"≤ {lengths[b]}, the length of sequence {b}")
            yield f"{name} {wrong}", {name: used}, ValueError, says


def _bad_shared(gen: Gen, base: Call) -> Bad:
    yield from _bad_windows()
    q = base["q"]
    three = {"q": q[:, :3].contiguous(), "alibi_slopes": None, "sinks": None}
    yield "three heads", three, ValueError, ("Hk = 2", "H = 3")


def bad_paged(gen: Gen, base: Call) -> Bad:
    yield from _bad_shared(gen, base)
    q, k, v = base["q"], base["k_cache"], base["v_cache"]
    for dim in (12, 0):
        small = {"q": q[..., :dim], "k_cache": k[..., :dim], "v_cache": v[..., :dim]}
        yield f"head dim {dim}", {n: t.contiguous() for n, t in small.items()}, ValueError, ("multiple of 8",)
    wide = {n: t.repeat(*([1] * (t.dim() - 1)), 17)[..., :264] for n, t in (("q", q), ("k_cache", k), ("v_cache", v))}
    yield "head dim 264", {n: t.contiguous() for n, t in wide.items()}, ValueError, ("multiple of 8 from 8 to 256",)
    yield "no kv heads", {"k_cache": k[:, :, :0], "v_cache": v[:, :, :0]}, ValueError, ("Hk = 0",)
    yield "empty blocks", {"k_cache": k[:, :0], "v_cache": v[:, :0]}, ValueError, ("block_size ≥ 1",)
    yield "a tree that is not causal", {"causal": False}, ValueError, ("causal is False", "tree_mask")
    yield "no offsets", {"cu_seqlens_q": gen.tensor([])}, ValueError, ("cu_seqlens_q has shape (0,)",)
    if q.is_cuda:
        return
    for wrong, says in (([1, 1, 6, 9], "cu_seqlens_q[0] is 1"), ([0, 6, 1, 9], "cu_seqlens_q[2] is 1")):
        yield f"cu_seqlens_q {wrong}", {"cu_seqlens_q": gen.tensor(wrong)}, ValueError, (says, "expected")
    yield "runs end early", {"cu_seqlens_q": gen.tensor([0, 1, 6, 8])}, ValueError, ("cu_seqlens_q[-1] is 8", "T = 9")
    yield "runs end late", {"cu_seqlens_q": gen.tensor([0, 1, 6, 10])}, ValueError, ("cu_seqlens_q[-1] is 10", "T = 9")
    yield "max_seqlen_q small", {"max_seqlen_q": 4}, ValueError, ("max_seqlen_q is 4", "at least 5", "sequence 1")
    for i, word in ((0, 0), (2, 1), (3, 0b1011), (8, 0b1100), (5, -1)):
        words = gen.tensor([1, 1, 3, 7, 15, 31, 1, 3, 7], torch.int64)
        words[i] = word
        says = (f"tree_mask[{i}] is {word % 2**64:#b}", "as the highest", "sees itself")
        yield f"word {word} of query {i}", {"tree_mask": words}, ValueError, says
    yield "negative length", {"seqused_k": gen.tensor([9, -1, 8])}, ValueError, ("seqused_k[1] is -1",)
    yield "long length", {"seqused_k": gen.tensor([9, 5, 17])}, ValueError, ("seqused_k[2] is 17", "16")
    for block in (-1, k.shape[0], 2**31 - 1):
        table = base["block_table"].clone()
        table[1, 1] = block
        yield f"block {block}", {"block_table": table}, ValueError, (f"block_table[1, 1] is {block}", "num_blocks")


def bad_out_scale(gen: Gen, base: Call) -> Bad:
    two = gen.tensor([1.0, 1.0], torch.float32)
    yield "of each head", {"out_scale": two}, ValueError, ("out_scale has shape (2,)", "expected (1,)")
    for out, says in (
        (torch.empty_like(base["q"]), (f"out is {base['q'].dtype}", "float8_e4m3fn as out_scale is given")),
        (base["q"].to(torch.int8), ("out is torch.int8", "torch.float8_e4m3fn")),
    ):
        yield f"out in {out.dtype}", {"out": out}, TypeError, says
    eight = {"out": torch.empty_like(base["q"], dtype=torch.float8_e4m3fn)}
    yield "no out_scale", eight | {"out_scale": None}, TypeError, ("out is torch.float8_e4m3fn", "as q")
    short = {"out": eight["out"][1:]}
    yield "a short out", short, ValueError, ("out has shape", "the shape of q")
    yield "out with gaps", {"out": eight["out"].repeat(1, 1, 2)[..., ::2]}, ValueError, ("out has strides",)
    if base["q"].is_cuda:
        return
    for value in (0.0, -1.0, math.nan):
        bad = {"out_scale": gen.tensor([value], torch.float32)}
        yield f"scale {value}", bad, ValueError, (f"out_scale is {value}", "positive")


def bad_scales(gen: Gen, base: Call) -> Bad:
    """Of base, whose caches are int8 with scales of tokens."""
    k, v, scale = base["k_cache"], base["v_cache"], base["k_scale"]
    of_heads = {name: torch.ones_like(scale[0, 0]).contiguous() for name in ("k_scale", "v_scale")}
    none = {"k_scale": None, "v_scale": None}
    q_like = {name: torch.zeros_like(base[name], dtype=base["q"].dtype) for name in ("k_cache", "v_cache")}
    other = torch.float16 if base["q"].dtype is torch.bfloat16 else torch.bfloat16
    yield "int8 without scales", none, ValueError, ("k_scale is None", "int8", "expected")
    yield "scales and q's dtype", q_like, ValueError, ("k_scale is given", "k_cache is", "expected")
    yield (
        "another dtype than q's",
        {name: t.to(other) for name, t in q_like.items()} | none,
        TypeError,
        (f"k_cache is {other}", "as q", "torch.int8"),
    )
    yield "only one in 8 bits", {"v_cache": q_like["v_cache"]}, TypeError, ("v_cache is", "as k_cache")
    for name, lacks in (("k_scale", "v_scale"), ("v_scale", "k_scale")):
        yield f"only {name}", {lacks: None}, ValueError, (f"{name} is given and {lacks} is None", "both or neither")
        yield f"{name} of heads", {name: of_heads[name]}, ValueError, ("v_scale has shape", "as k_scale")
        short = base[name][:, :-1].contiguous()
        yield (
            f"{name} of smaller pages",
            {name: short},
            ValueError,
            (f"{name} has shape", "(num_blocks, block_size, Hk)"),
        )
        yield f"{name} of two dimensions", {name: scale[0]}, ValueError, (f"{name} has shape", "expected (Hk)")
    yield "short scales", {n: t[:1] for n, t in of_heads.items()}, ValueError, ("k_scale has shape (1,)", "Hk = ")
    if k.device.type == "cpu":  # elsewhere no value is read
        zeros = {n: torch.zeros_like(t) for n, t in of_heads.items()}
        yield "scales of zero", zeros, ValueError, ("k_scale has values down to 0.0", "positive")
    narrow = {"q": base["q"][..., :8], "k_cache": k[..., :8], "v_cache": v[..., :8]}
    if "cos_sin" in base:
        narrow |= {"k": base["k"][..., :8], "v": base["v"][..., :8], "cos_sin": base["cos_sin"][:, :8]}
    yield (
        "head dim 8",
        {n: t.contiguous() for n, t in narrow.items()},
        ValueError,
        ("k_cache has shape", "multiple of 16"),
    )


def _bad_contiguous(op: str, num_heads: int) -> Callable[[Gen, Call], Bad]:
    """num_heads: which dimension of q counts them."""

    def bad(gen: Gen, base: Call) -> Bad:
        yield from _bad_windows()
        q, k = base["q"], base["k"]
        three = {name: base[name].narrow(num_heads, 0, 3).contiguous() for name in ("q", "dout", "out") if name in base}
        optional = {name: None for name in ("alibi_slopes", "sinks", "dlse") if name in base}
        if "lse" in base:
            three["lse"] = base["lse"].narrow(num_heads - 1, 0, 3).contiguous()
        yield "three heads", three | optional, ValueError, ("Hk = 2", "H = 3")
        small = {"q": q[..., :12].contiguous(), "k": k[..., :12].contiguous()}
        yield "head dim 12", small, ValueError, ("q has shape", "multiple of 8")
        yield from _bad_options(gen, base, op)
        if "cu_seqlens_q" in base:
            yield from _bad_sequences(gen, base)

    return bad


bad_batch, bad_batch_backward = (_bad_contiguous(op, 2) for op in ("batch_attention", "batch_attention_backward"))
bad_varlen, bad_varlen_backward = (_bad_contiguous(op, 1) for op in ("varlen_attention", "varlen_attention_backward"))


def bad_merge(gen: Gen, base: Call) -> Bad:
    yield "swapped", {"out_a": base["lse_a"], "lse_a": base["out_a"]}, ValueError, ("lse_a has 4 dimensions",)
    yield (
        "lse (B, S, H)",
        {"lse_a": base["lse_a"].transpose(1, 2).contiguous()},
        ValueError,
        ("lse_a has shape", "H, S"),
    )
    flat = {name: t[0] for name, t in base.items() if name != "lse_b"}
    yield "one side packed", flat, ValueError, ("lse_b has 3 dimensions",)
