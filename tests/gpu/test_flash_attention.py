"""Both attention kernels of packed sequences, forced, on drawn calls: the 2× rule, poison behind the ends, logits that leave
every reference behind."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import ops

pytestmark = pytest.mark.gpu
HEAD_DIMS = (8, 40, 64, 72, 80, 96, 104, 128, 160, 192, 200, 256)
LENGTHS = (0, 1, 2, 31, 63, 64, 65, 111, 112, 113, 127, 128, 129, 191, 192, 193, 255, 257, 389, 512, 601)
MANY_HEADS = (
    16,
    31,
    32,
    64,
    71,
    128,
)  # to a KV head; drawn rarely, with few queries: the reference repeats keys for each
CHUNKS, PER_CHUNK = 16, 200


def kernels() -> list[str]:
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return ["sm80", "sm90"] if hopper else ["sm80"]


def attend(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """One sequence in plain torch, computed in ``dtype``: q (Sq, H, D), k (Sk, Hk, D), v (Sk, Hk, Dv) → (Sq, H, Dv), (H, Sq)."""
    (num_rows, num_heads, dim), (num_keys, num_kv_heads, _) = q.shape, k.shape
    k, v = (t.to(dtype).repeat_interleave(num_heads // num_kv_heads, 1).transpose(0, 1) for t in (k, v))
    scores = q.to(dtype).transpose(0, 1) @ k.transpose(1, 2) * options.get("softmax_scale", dim**-0.5)
    if softcap := options.get("softcap", 0.0):
        scores = softcap * torch.tanh(scores / softcap)
    row = torch.arange(num_rows, device=q.device)[:, None] + num_keys - num_rows
    key = torch.arange(num_keys, device=q.device)[None]
    left, right = options.get("window_size", (-1, -1))
    right = 0 if options.get("causal") else right
    seen = torch.ones(num_rows, num_keys, dtype=torch.bool, device=q.device)
    behind = row - key
    if (words := options.get("tree_mask")) is not None:
        nodes = words[:, None] >> torch.arange(num_rows, device=q.device) & 1
        seen = torch.cat([torch.ones_like(seen), nodes.bool()], 1)[:, -num_keys:]
        behind = torch.where(seen, seen.flip(1).cumsum(1).flip(1) - 1, num_keys)
    if (slopes := options.get("alibi_slopes")) is not None:
        scores = scores - slopes.to(dtype)[:, None, None] * behind.abs()
    if left >= 0:
        seen = seen & (behind <= left)
    if right >= 0:
        seen = seen & (behind >= -right)
    scores = scores.masked_fill(~seen, -math.inf)
    if (sinks := options.get("sinks")) is not None:
        scores = torch.cat([scores, sinks.to(dtype)[:, None, None].expand(-1, num_rows, 1)], -1)
    lse = scores.logsumexp(-1)
    weights = torch.where(lse[:, :, None] == -math.inf, 0, scores.softmax(-1))
    return (weights[:, :, :num_keys] @ v).transpose(0, 1), lse


def check(
    q: Tensor, k: Tensor, v: Tensor, runs: list[int], lengths: list[int], kernel: str, options: dict[str, Any]
) -> None:
    """``options`` as varlen_attention takes them; ``seqused_q`` and ``seqused_k`` as lists."""
    starts, key_starts = (torch.tensor([0, *n], device="cuda").cumsum(0).to(torch.int32) for n in (runs, lengths))
    used = [options.get("seqused_q", runs), options.get("seqused_k", lengths)]
    given = dict(options)
    for name in ("seqused_q", "seqused_k"):
        if name in options:
            given[name] = torch.tensor(options[name], device="cuda", dtype=torch.int32)
    out, lse = ops.varlen_attention(q, k, v, starts, key_starts, max(runs), max(lengths), kernel=kernel, **given)
    assert out.shape == (*q.shape[:2], v.shape[2])
    assert out.dtype is q.dtype
    worst = plain_worst = scale = 0.0
    for b in range(len(runs)):
        own = slice(int(starts[b]), int(starts[b]) + used[0][b])
        rest = slice(own.stop, int(starts[b + 1]))
        keys = slice(int(key_starts[b]), int(key_starts[b]) + used[1][b])
        assert (out[rest] == 0).all(), "rows that are not used"
        assert (lse[:, rest] == -math.inf).all(), "the lse of rows that are not used"
        if used[0][b] == 0:
            continue
        of_sequence = options | (
            {"alibi_slopes": options["alibi_slopes"].expand(len(runs), -1)[b]} if "alibi_slopes" in options else {}
        )
        exact, exact_lse = attend(q[own], k[keys], v[keys], torch.float32, of_sequence)
        plain, _ = attend(q[own], k[keys], v[keys], q.dtype, of_sequence)
        assert torch.equal(lse[:, own] == -math.inf, exact_lse == -math.inf)
        seen = exact_lse.isfinite()
        largest = float(exact_lse[seen].abs().max()) if seen.any() else 0.0
        error = (lse[:, own] - exact_lse)[seen].abs()
        assert not seen.any() or float(error.max()) <= 1e-5 * max(20.0, largest), "lse"
        worst = max(worst, float((out[own].float() - exact).abs().max()))
        plain_worst = max(plain_worst, float((plain.float() - exact).abs().max()))
        scale = max(scale, float(exact.abs().max()))
    assert worst <= 2 * plain_worst + 0.5 * torch.finfo(q.dtype).eps * scale, f"{worst:.3e}, plain {plain_worst:.3e}"


def rounded_like_fp8(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """What plain torch gives for values of fp8 in fp32 if P, at most 1, is rounded to e4m3 before the second product."""
    if k.shape[0] == 0:
        return torch.zeros(*q.shape[:2], v.shape[2], device=q.device)
    unit = torch.eye(k.shape[0], device=k.device)[:, None].expand(-1, k.shape[1], -1)
    probs, _ = attend(q, k, unit, torch.float32, options)  # (Sq, H, Sk)
    top = probs.amax(-1, keepdim=True).clamp_min(1e-30)
    probs = (probs / top).to(torch.float8_e4m3fn).float() * top
    group = q.shape[1] // k.shape[1]
    return torch.einsum("qhk,khd->qhd", probs, v.repeat_interleave(group, 1))


def draw(rng: random.Random) -> tuple[Any, ...]:
    dtype = rng.choice((torch.bfloat16, torch.float16))
    dim = rng.choice(HEAD_DIMS)
    kv_heads, group, queries = rng.choice((1, 2, 3)), rng.choice((1, 2, 3, 4, 7, 8)), LENGTHS
    if rng.random() < 0.08:
        kv_heads, group, queries = rng.choice((1, 1, 2)), rng.choice(MANY_HEADS), LENGTHS[:9]
    heads = kv_heads * group
    runs = [rng.choice(queries) for _ in range(rng.choice((1, 1, 2, 4)))]
    lengths = [n if rng.random() < 0.5 else rng.choice(LENGTHS) for n in runs]
    if rng.random() < 0.1:  # long enough for the keys to be split among CTAs
        lengths[0] = rng.choice((1531, 2777, 5003))
    if max(runs) == 0:
        runs[0] = 5
    if max(lengths) == 0:
        lengths[0] = 7
    options: dict[str, Any] = {"causal": rng.random() < 0.5}
    if rng.random() < 0.4:
        options["window_size"] = tuple(rng.choice((-1, 0, 1, 17, 64, 127, 300)) for _ in range(2))
    if rng.random() < 0.2:
        options["softcap"] = rng.choice((5.0, 30.0))
    if rng.random() < 0.2:
        options["softmax_scale"] = rng.choice((0.02, 1.0))
    if rng.random() < 0.2:
        slopes = [[2.0 ** -rng.uniform(0, 8) for _ in range(heads)] for _ in runs]
        options["alibi_slopes"] = torch.tensor(slopes if rng.random() < 0.5 else slopes[0], device="cuda")
    if rng.random() < 0.2:
        sinks = [rng.choice((-math.inf, -20.0, 20.0, rng.gauss(0, 2))) for _ in range(heads)]
        options["sinks"] = torch.tensor(sinks, device="cuda")
    for name, most in (("seqused_q", runs), ("seqused_k", lengths)):
        if rng.random() < 0.15:
            options[name] = [n if rng.random() < 0.3 else rng.randint(0, n) for n in most]
    v_dim = dim if rng.random() < 0.7 else rng.choice(HEAD_DIMS)
    return dtype, dim, v_dim, heads, kv_heads, runs, lengths, options


@pytest.mark.parametrize("kernel", kernels())
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_drawn_calls(kernel: str, chunk: int) -> None:
    """Rows of gaps between them, and NaN where no result may come from."""
    rng = random.Random(1000 + chunk)
    gen = torch.Generator("cuda").manual_seed(chunk)
    for index in range(PER_CHUNK):
        dtype, dim, v_dim, heads, kv_heads, runs, lengths, options = draw(rng)

        def tensor(tokens: int, num_heads: int, dim: int, dtype: torch.dtype = dtype) -> Tensor:
            memory = torch.full(
                (tokens + 3, num_heads, dim + 8 * rng.randint(0, 1)), math.nan, device="cuda", dtype=dtype
            )
            t = memory[:tokens, :, :dim]
            return t.copy_(torch.randn(t.shape, generator=gen, device="cuda", dtype=dtype))

        q = tensor(sum(runs), heads, dim)
        # Three more rows of k and v than there are keys: poison right behind the last sequence.
        k, v = (tensor(sum(lengths), kv_heads, d) for d in (dim, v_dim))
        k, v = (t.as_strided((t.shape[0] + 3, *t.shape[1:]), t.stride()) for t in (k, v))
        for b, n in enumerate(options.get("seqused_k", ())):  # and behind what is used of each
            for t in (k, v):
                t[sum(lengths[:b]) + n : sum(lengths[: b + 1])] = math.nan
        try:
            check(q, k, v, runs, lengths, kernel, options)
        except AssertionError as error:
            what = f"{dtype}, head dims {dim} and {v_dim}, heads {heads}/{kv_heads}, {runs} to {lengths}, {options}"
            raise AssertionError(f"case {index}: {what}: {error}") from None


@pytest.mark.skipif("sm90" not in kernels(), reason="fp8 is for GPUs of compute capability 9.0")
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_drawn_calls_of_fp8(chunk: int) -> None:
    """At most twice the error of plain torch with the same rounding of the probabilities."""
    rng = random.Random(2000 + chunk)
    gen = torch.Generator("cuda").manual_seed(chunk)
    for index in range(PER_CHUNK // 2):
        _, dim, v_dim, heads, kv_heads, runs, lengths, options = draw(rng)
        dim, v_dim = (-(-n // 16) * 16 for n in (dim, v_dim))
        starts, key_starts = (torch.tensor([0, *n], device="cuda").cumsum(0).to(torch.int32) for n in (runs, lengths))

        def tensor(tokens: int, num_heads: int, dim: int) -> Tensor:
            memory = torch.full(
                (tokens + 3, num_heads, dim + 16 * rng.randint(0, 1)), 127, device="cuda", dtype=torch.uint8
            )
            values = torch.randn(tokens, num_heads, dim, generator=gen, device="cuda").to(torch.float8_e4m3fn)
            memory[:tokens, :, :dim] = values.view(torch.uint8)
            return memory.view(torch.float8_e4m3fn)[:tokens, :, :dim]

        q, k, v = (
            tensor(sum(runs), heads, dim),
            tensor(sum(lengths), kv_heads, dim),
            tensor(sum(lengths), kv_heads, v_dim),
        )
        used = [options.get("seqused_q", runs), options.get("seqused_k", lengths)]
        given = dict(options)
        for name in ("seqused_q", "seqused_k"):
            if name in options:
                given[name] = torch.tensor(options[name], device="cuda", dtype=torch.int32)
        scales = {}
        for name in ("q_descale", "k_descale", "v_descale"):
            scales[name] = torch.ones(len(runs), kv_heads, device="cuda")
            if rng.random() < 0.5:
                scales[name] = 0.5 + torch.rand(kv_heads, len(runs), generator=gen, device="cuda").T
                given[name] = scales[name]
        for b, n in enumerate(options.get("seqused_k", ())):
            for t in (k, v):
                t.view(torch.uint8)[sum(lengths[:b]) + n : sum(lengths[: b + 1])] = 127
        most = max(*runs, rng.choice((0, 2100)))  # calls of more than 2,048 rows have tiles of their own
        out, lse = ops.varlen_attention(q, k, v, starts, key_starts, most, max(lengths), **given)
        assert out.dtype is torch.bfloat16
        what = f"case {index}: head dims {dim} and {v_dim}, heads {heads}/{kv_heads}, {runs} to {lengths}, {options}"
        worst = plain_worst = scale = 0.0
        for b in range(len(runs)):
            own = slice(int(starts[b]), int(starts[b]) + used[0][b])
            rest = slice(own.stop, int(starts[b + 1]))
            keys = slice(int(key_starts[b]), int(key_starts[b]) + used[1][b])
            assert (out[rest] == 0).all(), what
            assert (lse[:, rest] == -math.inf).all(), what
            if used[0][b] == 0:
                continue
            group = heads // kv_heads
            qk = (scales["q_descale"] * scales["k_descale"])[b].repeat_interleave(group)[:, None]
            wide_q, wide_k = q[own].float() * qk, k[keys].float()
            wide_v = v[keys].float() * scales["v_descale"][b][:, None]
            of_sequence = options | {"softmax_scale": options.get("softmax_scale", dim**-0.5)}
            if "alibi_slopes" in options:
                of_sequence["alibi_slopes"] = options["alibi_slopes"].expand(len(runs), -1)[b]
            exact, exact_lse = attend(wide_q, wide_k, wide_v, torch.float32, of_sequence)
            plain = rounded_like_fp8(wide_q, wide_k, wide_v, of_sequence)
            seen = exact_lse.isfinite()
            assert torch.equal(lse[:, own].isfinite(), seen), what
            if seen.any():
                error = (lse[:, own] - exact_lse)[seen].abs().max()
                # Hopper adds up products of fp8 with 13 bits behind the leading one.
                assert float(error) <= 1e-3 * max(20.0, float(exact_lse[seen].abs().max())), f"{what}: lse {error}"
            worst = max(worst, float((out[own].float() - exact).abs().max()))
            plain_worst = max(plain_worst, float((plain - exact).abs().max()))
            scale = max(scale, float(exact.abs().max()))
        allowed = 2 * plain_worst + torch.finfo(torch.bfloat16).eps * scale
        assert worst <= allowed, f"{what}: {worst:.3e}, plain {plain_worst:.3e}"


@pytest.mark.parametrize("kernel", kernels())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("towards_the_end", [True, False])
def test_scores_that_grow(kernel: str, dtype: torch.dtype, dim: int, towards_the_end: bool) -> None:
    """By hundreds from block to block: what was enough of a reference for one is not for the next."""
    gen = torch.Generator("cuda").manual_seed(7)
    q, k, v = (torch.randn(n, 2, dim, generator=gen, device="cuda", dtype=dtype) for n in (300, 900, 900))
    slope = torch.linspace(1, 60, 900, device="cuda")[:, None, None]
    k = (k * (slope if towards_the_end else slope.flip(0))).to(dtype)
    k[10:20] = q[:10] * 30
    check(q, k, v, [300], [900], kernel, {})


@pytest.mark.parametrize("kernel", kernels())
def test_another_sequence_is_not_touched_by_a_neighbours_nan(kernel: str) -> None:
    gen = torch.Generator("cuda").manual_seed(3)
    lengths = [5, 300, 0, 1, 177, 64, 129]
    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    q = torch.randn(sum(lengths), 4, 64, generator=gen, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(sum(lengths), 2, 64, generator=gen, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    clean, _ = ops.varlen_attention(q, k, v, starts, starts, 300, 300, causal=True, kernel=kernel)
    for bad in range(len(lengths)):
        own = slice(int(starts[bad]), int(starts[bad + 1]))
        poisoned = [t.clone() for t in (q, k, v)]
        for t in poisoned:
            t[own] = math.nan
        out, _ = ops.varlen_attention(*poisoned, starts, starts, 300, 300, causal=True, kernel=kernel)
        out[own] = clean[own]
        assert torch.equal(out, clean), f"sequence {bad}"


@pytest.mark.parametrize("kernel", kernels())
def test_expanded_keys(kernel: str) -> None:
    """One head of keys for all, by a stride of zero, which the copy engine cannot be told of."""
    gen = torch.Generator("cuda").manual_seed(2)
    q = torch.randn(2, 130, 4, 64, generator=gen, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, 200, 1, 64, generator=gen, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    wide = [t.expand(2, 200, 4, 64) for t in (k, v)]
    out, lse = ops.batch_attention(q, *wide, causal=True, kernel=kernel)
    expected, expected_lse = ops.batch_attention(q, *(t.contiguous() for t in wide), causal=True, kernel=kernel)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


def test_a_kernel_that_this_gpu_lacks_is_refused() -> None:
    q = torch.randn(8, 2, 64, device="cuda", dtype=torch.bfloat16)
    starts = torch.tensor([0, 8], dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match=r"kernel is 'sm90', expected 'sm80' for a GPU .* softmax_scale 0"):
        ops.varlen_attention(q, q, q, starts, starts, 8, 8, softmax_scale=0.0, kernel="sm90")
