"""flash-attn's functions by the cases that flash-attn's own tests have, against attention written out; `flash_attn` is us.

Each family names its axes and checks one case. On the CPU a few cases of each are drawn; on a GPU a few hundred, and all
of them where slow tests run too.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from fastattn import compat
from tests.integrations.cases import FAMILIES, MEMORY, Case, drawn, family, label, seeded, whole
from tests.integrations.comparison import close, compare, errors_from_rounded_out, same_lse
from tests.integrations.reference import attention, rotate

with compat.install("flash_attn", force=True):  # the cases run what code written for flash-attn imports
    import flash_attn
    from flash_attn import bert_padding

HALF = [torch.float16, torch.bfloat16]
HEAD_DIMS = [32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256]
LENGTHS = [97, 128, 200, 257, 384, 512, 768, 1024, 1025, 2048]
PAIRS = [(113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256)]
PAIRS += [(1024, 1024), (1023, 1024), (1024, 1023), (2048, 2048)]
UNEQUAL = [(1, 239), (3, 799), (127, 512), (127, 513), (113, 203), (128, 217), (113, 211), (108, 256), (256, 512)]
UNEQUAL += [(1023, 1024)]
DECODE = [(3, 1024), (1, 339), (64, 800), (3, 799), (64, 2048), (16, 20000), (16, 100000), (128, 128), (256, 256)]
CACHE = [(1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (64, 2048), (16, 20000), (128, 128)]
CACHE += [(1, 128 * 1024), (16, 128 * 1024)]
BOTH = [False, True]
GROUPS = {"mha": 6, "mqa": 1, "gqa": 3}


def window_of(case: Case, num_keys: int, rng: random.Random) -> tuple[int, int]:
    return (rng.randrange(num_keys), rng.randrange(num_keys)) if case.get("local") else (-1, -1)


def slopes_of(case: Case, batch: int, num_heads: int, device: str) -> Tensor | None:
    if not case.get("alibi"):
        return None
    return torch.rand(batch, num_heads, device=device) * 0.3


@family(
    kvpacked=BOTH, dtype=HALF, mha_type=list(GROUPS), deterministic=BOTH, alibi=BOTH, local=BOTH, causal=BOTH, d=HEAD_DIMS,
    seqlens=PAIRS, softcap=[0.0, 50.0],
)  # fmt: skip
def output(case: Case, device: str) -> None:
    rng, (num_queries, num_keys), head_dim = seeded(case), case["seqlens"], case["d"]
    num_heads, num_kv_heads = 6, GROUPS[case["mha_type"]]
    dtype = {"dtype": case["dtype"], "device": device}
    q = torch.randn(2, num_queries, num_heads, head_dim, **dtype) * (5 if case["softcap"] else 1)
    kv = torch.randn(2, num_keys, 2, num_kv_heads, head_dim, **dtype)
    window, slopes = window_of(case, num_keys, rng), slopes_of(case, 2, num_heads, device)
    options = {
        "causal": case["causal"], "window_size": window, "softcap": case["softcap"], "alibi_slopes": slopes,
        "deterministic": case["deterministic"], "return_attn_probs": True,
    }  # fmt: skip
    masks = {"causal": case["causal"], "window": window, "softcap": case["softcap"], "slopes": slopes}
    if case["kvpacked"]:
        call = functools.partial(flash_attn.flash_attn_kvpacked_func, **options)
        compare(call, [q, kv], lambda q, kv, **kw: attention(q, *kv.unbind(2), **kw), masks)
    else:
        compare(functools.partial(flash_attn.flash_attn_func, **options), [q, *kv.unbind(2)], attention, masks)


@family(dtype=HALF, deterministic=BOTH, alibi=BOTH, local=BOTH, causal=BOTH, d=HEAD_DIMS, seqlen=LENGTHS)
def qkvpacked(case: Case, device: str) -> None:
    rng = seeded(case)
    qkv = torch.randn(2, case["seqlen"], 3, 5, case["d"], device=device, dtype=case["dtype"])
    window, slopes = window_of(case, case["seqlen"], rng), slopes_of(case, 2, 5, device)
    call = functools.partial(
        flash_attn.flash_attn_qkvpacked_func, causal=case["causal"], window_size=window, alibi_slopes=slopes,
        deterministic=case["deterministic"], return_attn_probs=True,
    )  # fmt: skip
    masks = {"causal": case["causal"], "window": window, "slopes": slopes}
    compare(call, [qkv], lambda qkv, **kw: attention(*qkv.unbind(2), **kw), masks)


def padding(num_sequences: int, longest: int, how: str, rng: random.Random, device: str) -> Tensor:
    """(B, S) bool, tokens first."""
    least = {"full": longest, "random": max(1, longest - 20), "third": longest // 3}[how]
    lengths = torch.tensor([rng.randint(least, longest) for _ in range(num_sequences)], device=device)
    return torch.arange(longest, device=device) < lengths.unsqueeze(1)


def packed(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    tokens, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask)
    assert torch.equal(used, mask.sum(1, dtype=torch.int32)) and cu_seqlens.dtype == torch.int32
    return tokens, indices, cu_seqlens, longest


def padded_lse(lse: Tensor, indices: Tensor, mask: Tensor) -> Tensor:
    """(H, T) → (B, H, S), +inf where padding is."""
    out = lse.new_full((mask.numel(), lse.shape[0]), torch.inf)
    out[indices] = lse.t()
    return out.view(*mask.shape, -1).transpose(1, 2)


@family(
    dtype=HALF, deterministic=BOTH, alibi=BOTH, local=BOTH, causal=BOTH, d=HEAD_DIMS, seqlen=LENGTHS,
    mode=["full", "random", "third"],
)  # fmt: skip
def varlen_qkvpacked(case: Case, device: str) -> None:
    rng = seeded(case)
    qkv = torch.randn(3, case["seqlen"], 3, 5, case["d"], device=device, dtype=case["dtype"])
    mask = padding(3, case["seqlen"], case["mode"], rng, device)
    lengths = mask.sum(1)
    window, slopes = window_of(case, case["seqlen"], rng), slopes_of(case, 3, 5, device)

    def call(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, indices, cu_seqlens, longest = packed(qkv, mask)
        out, lse, empty = flash_attn.flash_attn_varlen_qkvpacked_func(
            tokens, cu_seqlens, longest, causal=case["causal"], window_size=window, alibi_slopes=slopes,
            deterministic=case["deterministic"], return_attn_probs=True,
        )  # fmt: skip
        return bert_padding.pad_input(out, indices, *mask.shape), padded_lse(lse, indices, mask), empty

    masks = {"causal": case["causal"], "window": window, "slopes": slopes, "lengths_q": lengths, "lengths_k": lengths}
    compare(call, [qkv], lambda qkv, **kw: attention(*qkv.unbind(2), **kw), masks)


@family(
    kvpacked=BOTH, dtype=HALF, mha_type=list(GROUPS), deterministic=BOTH, alibi=BOTH, local=BOTH, causal=BOTH, d=HEAD_DIMS,
    seqlens=[(1, 147), *PAIRS], softcap=[0.0, 50.0],
)  # fmt: skip
def varlen_output(case: Case, device: str) -> None:
    rng, (num_queries, num_keys), num_kv_heads = seeded(case), case["seqlens"], GROUPS[case["mha_type"]]
    dtype = {"dtype": case["dtype"], "device": device}
    q = torch.randn(3, num_queries, 6, case["d"], **dtype) * (5 if case["softcap"] else 1)
    kv = torch.randn(3, num_keys, 2, num_kv_heads, case["d"], **dtype)
    mask_q, mask_k = padding(3, num_queries, "random", rng, device), padding(3, num_keys, "random", rng, device)
    window, slopes = window_of(case, num_keys, rng), slopes_of(case, 3, 6, device)
    options = {
        "causal": case["causal"], "window_size": window, "softcap": case["softcap"], "alibi_slopes": slopes,
        "deterministic": case["deterministic"], "return_attn_probs": True,
    }  # fmt: skip

    def call(q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, indices, cu_q, longest_q = packed(q, mask_q)
        keys, _, cu_k, longest_k = packed(kv, mask_k)
        if case["kvpacked"]:
            out = flash_attn.flash_attn_varlen_kvpacked_func(rows, keys, cu_q, cu_k, longest_q, longest_k, **options)
        else:
            out = flash_attn.flash_attn_varlen_func(rows, *keys.unbind(1), cu_q, cu_k, longest_q, longest_k, **options)
        return bert_padding.pad_input(out[0], indices, *mask_q.shape), padded_lse(out[1], indices, mask_q), out[2]

    masks = {
        "causal": case["causal"], "window": window, "softcap": case["softcap"], "slopes": slopes,
        "lengths_q": mask_q.sum(1), "lengths_k": mask_k.sum(1),
    }  # fmt: skip
    compare(call, [q, kv], lambda q, kv, **kw: attention(q, *kv.unbind(2), **kw), masks)


def inputs_of(case: Case, batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, Sq, 6, D), k and v (B, Sk, 6, D), with the case's lengths, swapped where it says so."""
    num_queries, num_keys = reversed(case["seqlens"]) if case["swap"] else case["seqlens"]
    dtype = {"dtype": case["dtype"], "device": device}
    q = torch.randn(batch, num_queries, 6, case["d"], **dtype)
    k, v = torch.randn(2, batch, num_keys, 6, case["d"], **dtype)
    return q, k, v


@family(dtype=HALF, local=BOTH, d=HEAD_DIMS, swap=BOTH, seqlens=UNEQUAL)
def causal(case: Case, device: str) -> None:
    rng = seeded(case)
    q, k, v = inputs_of(case, 2, device)
    window = window_of(case, k.shape[1], rng)
    call = functools.partial(flash_attn.flash_attn_func, causal=True, window_size=window, return_attn_probs=True)
    compare(call, [q, k, v], attention, {"causal": True, "window": window})


def pages(cache: Tensor, block_size: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    """(B, S, Hk, D) → its tokens in pages (num_blocks, block_size, Hk, D) in any order among pages of NaN, and the table."""
    batch, length = cache.shape[:2]
    per_sequence = math.ceil(length / block_size)
    num_blocks = 2 * batch * per_sequence
    order = torch.tensor(rng.sample(range(num_blocks), batch * per_sequence), device=cache.device)
    pool = torch.full((num_blocks, block_size, *cache.shape[2:]), math.nan, dtype=cache.dtype, device=cache.device)
    filled = torch.nn.functional.pad(cache, (0, 0, 0, 0, 0, per_sequence * block_size - length), value=math.nan)
    pool[order] = filled.view(-1, block_size, *cache.shape[2:])
    return pool, order.view(batch, per_sequence).to(torch.int32)


@family(dtype=HALF, local=BOTH, d=HEAD_DIMS, swap=BOTH, seqlens=UNEQUAL, block_size=[None, 1, 7, 16, 256, 512])
def varlen_causal(case: Case, device: str) -> None:
    rng = seeded(case)
    q, k, v = inputs_of(case, 3, device)
    mask_q, mask_k = padding(3, q.shape[1], "random", rng, device), padding(3, k.shape[1], "random", rng, device)
    window = window_of(case, k.shape[1], rng)
    masks = {"causal": True, "window": window, "lengths_q": mask_q.sum(1), "lengths_k": mask_k.sum(1)}

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, indices, cu_q, longest_q = packed(q, mask_q)
        if case["block_size"] is None:
            (keys, _, cu_k, longest_k), (values, *_) = packed(k, mask_k), packed(v, mask_k)
            table = None
        else:
            *_, cu_k, longest_k = packed(k, mask_k)
            seed = rng.random()
            keys, table = pages(k, case["block_size"], random.Random(seed))
            values, _ = pages(v, case["block_size"], random.Random(seed))
        out, lse, empty = flash_attn.flash_attn_varlen_func(
            rows, keys, values, cu_q, cu_k, longest_q, longest_k, causal=True, window_size=window, block_table=table,
            return_attn_probs=True,
        )  # fmt: skip
        return bert_padding.pad_input(out, indices, *mask_q.shape), padded_lse(lse, indices, mask_q), empty

    if case["block_size"] is None:
        compare(call, [q, k, v], attention, masks)
        return
    out, lse, _ = call(q, k, v)
    exact, exact_lse = attention(q, k, v, **masks)
    close("out", out, exact, attention(q, k, v, upcast=False, **masks)[0])
    same_lse(lse, exact_lse)


@family(dtype=HALF, deterministic=BOTH, alibi=BOTH, local=BOTH, causal=BOTH, d=HEAD_DIMS, swap=BOTH, seqlens=DECODE)
def splitkv(case: Case, device: str) -> None:
    rng = seeded(case)
    q, k, v = inputs_of(case, 1, device)
    window, slopes = window_of(case, k.shape[1], rng), slopes_of(case, 1, 6, device)
    call = functools.partial(
        flash_attn.flash_attn_func, causal=case["causal"], window_size=window, alibi_slopes=slopes,
        deterministic=case["deterministic"], return_attn_probs=True,
    )  # fmt: skip
    compare(call, [q, k, v], attention, {"causal": case["causal"], "window": window, "slopes": slopes})


@family(
    dtype=HALF, num_splits=[0, 1], mha_type=list(GROUPS), new_kv=BOTH, alibi=BOTH, local=BOTH, causal=BOTH,
    new_is_q=BOTH, rotary_interleaved=BOTH, rotary_fraction=[0.0, 0.5, 1.0], block_size=[None, 1, 13, 16, 256],
    leftpad=BOTH, batch_idx=BOTH, d=[32, 59, 64, 80, 128, 256], seqlens=CACHE,
)  # fmt: skip
def kvcache(case: Case, device: str) -> None:
    """All parameters of flash_attn_with_kvcache: the output, its LSE, and what is in the cache afterwards."""
    rng, (num_queries, num_keys), head_dim = seeded(case), case["seqlens"], case["d"]
    batch, num_heads, num_kv_heads = 2, 6, GROUPS[case["mha_type"]]
    dtype = {"dtype": case["dtype"], "device": device}
    rotary_dim = int(case["rotary_fraction"] * head_dim) // 16 * 16
    num_rows = 2 * batch if case["batch_idx"] else batch
    num_new = num_queries if case["new_is_q"] else rng.randint(1, num_queries)
    q = torch.randn(batch, num_queries, num_heads, head_dim, **dtype)
    k_cache, v_cache = torch.randn(2, num_rows, num_keys, num_kv_heads, head_dim, **dtype)
    k = v = None
    if case["new_kv"]:
        k, v = torch.randn(2, batch, num_new, num_kv_heads, head_dim, **dtype)
    taken = num_queries if (case["causal"] or case["local"]) and rotary_dim > 1 else num_new
    least, most = (0, num_keys - taken) if case["new_kv"] else (1, num_keys)
    lengths = torch.tensor([rng.randint(least, most) for _ in range(batch)], dtype=torch.int32, device=device)
    leftpad = None
    if case["leftpad"]:
        begin = [rng.randrange(n) if n > 0 else 0 for n in lengths.tolist()]
        leftpad = torch.tensor(begin, dtype=torch.int32, device=device)
    rows = rng.sample(range(num_rows), batch) if case["batch_idx"] else list(range(batch))
    batch_idx = torch.tensor(rows, dtype=torch.int32, device=device) if case["batch_idx"] else None
    window, slopes = window_of(case, num_keys, rng), slopes_of(case, batch, num_heads, device)
    cos = sin = None
    if rotary_dim:
        angle = torch.rand(num_keys, rotary_dim // 2, device=device) * 2 * math.pi
        cos, sin = angle.cos().to(case["dtype"]), angle.sin().to(case["dtype"])

    # What the cache holds afterwards, and what q is then.
    expected_k, expected_v, expected_q = k_cache[rows].clone(), v_cache[rows].clone(), q
    total = lengths.clone()
    if k is not None and v is not None:
        places = lengths.long().unsqueeze(1) + torch.arange(num_new, device=device)
        turned = rotate(k, cos[places], sin[places], case["rotary_interleaved"]) if cos is not None else k
        for b in range(batch):
            expected_k[b, places[b]], expected_v[b, places[b]] = turned[b], v[b]
        if cos is not None and sin is not None:
            moves = case["causal"] or case["local"]
            own = lengths.long().unsqueeze(1) + torch.arange(num_queries, device=device) * moves
            expected_q = rotate(q, cos[own], sin[own], case["rotary_interleaved"])
        total += num_new

    if case["block_size"] is None:
        pool_k, pool_v, table = k_cache.clone(), v_cache.clone(), None
    else:
        seed = rng.random()
        pool_k, table = pages(k_cache, case["block_size"], random.Random(seed))
        pool_v, _ = pages(v_cache, case["block_size"], random.Random(seed))
    arguments = {
        "rotary_cos": cos, "rotary_sin": sin, "cache_seqlens": lengths, "cache_batch_idx": batch_idx,
        "cache_leftpad": leftpad, "block_table": table, "causal": case["causal"], "window_size": window,
        "rotary_interleaved": case["rotary_interleaved"], "alibi_slopes": slopes, "num_splits": case["num_splits"],
    }  # fmt: skip
    kept = lengths.clone()
    out, lse = flash_attn.flash_attn_with_kvcache(q, pool_k, pool_v, k, v, **arguments, return_softmax_lse=True)
    assert torch.equal(lengths, kept), "cache_seqlens is the caller's"

    masks = {"causal": case["causal"], "window": window, "slopes": slopes, "lengths_k": total, "leftpad": leftpad}
    exact, exact_lse = attention(expected_q, expected_k, expected_v, **masks)
    plain, _ = attention(expected_q, expected_k, expected_v, upcast=False, **masks)
    close("out", out, exact, plain, 3.0)
    same_lse(lse, exact_lse)
    if table is None:
        found_k, found_v = pool_k[rows], pool_v[rows]
        others = [row for row in range(num_rows) if row not in rows]
        assert torch.equal(pool_k[others], k_cache[others])
    else:
        found_k, found_v = (pool[table.long()].flatten(1, 2)[:, :num_keys] for pool in (pool_k, pool_v))
    ulp = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[case["dtype"]]
    torch.testing.assert_close(found_k, expected_k, atol=ulp, rtol=ulp)
    assert torch.equal(found_v, expected_v)


@family(dtype=HALF, local=BOTH, causal=BOTH, d=HEAD_DIMS, swap=BOTH, seqlens=UNEQUAL, varlen=BOTH)
def deterministic(case: Case, device: str) -> None:
    """The same gradients each time."""
    rng = seeded(case)
    q, k, v = inputs_of(case, 3, device)
    mask_q, mask_k = padding(3, q.shape[1], "random", rng, device), padding(3, k.shape[1], "random", rng, device)
    options = {"causal": case["causal"], "window_size": window_of(case, k.shape[1], rng), "deterministic": True}
    if case["varlen"]:
        (q, _, cu_q, longest_q), (k, _, cu_k, longest_k), (v, *_) = (
            packed(q, mask_q),
            packed(k, mask_k),
            packed(v, mask_k),
        )
    leaves = [t.requires_grad_() for t in (q, k, v)]
    if case["varlen"]:
        out = flash_attn.flash_attn_varlen_func(*leaves, cu_q, cu_k, longest_q, longest_k, **options)
    else:
        out = flash_attn.flash_attn_func(*leaves, **options)
    upstream = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    for _ in range(3 if device == "cpu" else 30):
        for a, b in zip(first, torch.autograd.grad(out, leaves, upstream, retain_graph=True), strict=True):
            assert torch.equal(a, b)


@family(dtype=HALF, causal=BOTH, d=[16, 32, 64, 59], seqlen=[1, 2, 5, 17, 128])
def overflow(case: Case, device: str) -> None:
    """Large values, and gradients that are still finite and right."""
    seeded(case)
    q = torch.randn(2, case["seqlen"], 5, case["d"], device=device, dtype=case["dtype"]) * 5
    kv = torch.randn(2, case["seqlen"], 2, 5, case["d"], device=device, dtype=case["dtype"]) * 3
    call = functools.partial(flash_attn.flash_attn_kvpacked_func, causal=case["causal"], return_attn_probs=True)
    compare(call, [q, kv], lambda q, kv, **kw: attention(q, *kv.unbind(2), **kw), {"causal": case["causal"]})


@family(dtype=HALF, causal=BOTH, d=[64, 128], seqlen=[97, 128, 200, 256])
def transposed(case: Case, device: str) -> None:
    """Inputs and the gradient of the output with strides of their own: they lie heads first, batch last."""
    seeded(case)
    q, k, v = (
        torch.randn(3, case["seqlen"], 2, 5, case["d"], device=device, dtype=case["dtype"]).transpose(1, 2).unbind(0)
    )
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = flash_attn.flash_attn_func(*leaves, causal=case["causal"])
    upstream = torch.randn(case["seqlen"], 2, 5, case["d"], device=device, dtype=case["dtype"]).transpose(0, 1)
    exact, _ = attention(*leaves, causal=case["causal"])
    plain, _ = attention(*leaves, causal=case["causal"], upcast=False)
    grads = [torch.autograd.grad(x, leaves, upstream) for x in (out, exact, plain)]
    close("out", out, exact, plain)
    for a, b, c in zip(*grads, strict=True):
        close("gradient", a, b, c, 3.0)


@family(dtype=HALF, causal=BOTH, d=[16, 32, 64], seqlen=[60])
def varlen_overflow(case: Case, device: str) -> None:
    """A sequence beside others of other lengths: what is behind its end has no part in its gradients."""
    rng = seeded(case)
    lengths = [rng.randint(1, 60) for _ in range(5)]
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    qkv = torch.randn(3, sum(lengths), 5, case["d"], device=device, dtype=case["dtype"]) * 5
    leaves = [x.detach().requires_grad_() for x in qkv.unbind(0)]
    out = flash_attn.flash_attn_varlen_func(*leaves, cu, cu, max(lengths), max(lengths), causal=case["causal"])
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(g.isfinite().all() for g in grads)
    first = slice(lengths[0])
    alone = [x[first].detach().unsqueeze(0).requires_grad_() for x in leaves]
    single = flash_attn.flash_attn_func(*alone, causal=case["causal"])
    close("out", out[first], single[0], None)
    # The two may be of kernels that round `out` otherwise, and the gradients depend on how.
    wide = [x.detach().float().requires_grad_() for x in alone]
    _, lse = attention(*wide, causal=case["causal"])
    noise = errors_from_rounded_out(out[first].unsqueeze(0), single.float(), lse, wide, torch.ones_like(single))
    for a, b, n in zip(grads, torch.autograd.grad(single, alone, torch.ones_like(single)), noise, strict=True):
        close("gradient", a[first], b[0], None, noise=n)


CPU_CASES = [
    (name, case)
    for name in FAMILIES
    for case in drawn(name, 24 if name == "kvcache" else 8, 130 * 520, [torch.float32, torch.bfloat16])
]


@pytest.mark.parametrize(("name", "case"), CPU_CASES, ids=[f"{name} {label(case)}" for name, case in CPU_CASES])
def test_on_the_cpu(name: str, case: Case) -> None:
    FAMILIES[name][1](case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_on_a_gpu(name: str) -> None:
    run_all(name, drawn(name, 300, MEMORY // 24, HALF))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", FAMILIES)
def test_whole_grid(name: str) -> None:
    run_all(name, whole(name))


def run_all(name: str, cases: Iterable[Case]) -> None:
    failed, total = [], 0
    for case in cases:
        total += 1
        try:
            FAMILIES[name][1](case, "cuda")
        except (AssertionError, RuntimeError, ValueError, TypeError) as error:
            failed.append(f"{label(case)}: {error}")
    assert total > 0
    assert not failed, f"{len(failed)} of {total}\n" + "\n".join(failed[:20])


@pytest.mark.parametrize("window_size", [3, None, (1, 2, 3)])
def test_a_window_that_is_no_pair_is_named(window_size: object) -> None:
    q = torch.zeros(1, 2, 1, 8)
    with pytest.raises(TypeError, match=r"window_size is .*, expected a pair \(left, right\)"):
        flash_attn.flash_attn_func(q, q, q, window_size=window_size)  # type: ignore[arg-type]
