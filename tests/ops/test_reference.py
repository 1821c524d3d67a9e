"""The references against torch's own operators, and what only large or dynamic shapes show."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastattn import ops
from tests.harness.generators import Gen, offsets, pages


def test_norms_and_activations_agree_with_torch() -> None:
    gen = Gen(seed=1)
    x, weight, bias = gen.randn(5, 96), gen.randn(96), gen.randn(96)
    close = torch.testing.assert_close
    close(ops.rms_norm(x, weight, 1e-6), F.rms_norm(x, (96,), weight, 1e-6))
    close(ops.layer_norm(x, weight, bias), F.layer_norm(x, (96,), weight, bias))
    close(ops.swiglu(x), F.silu(x[:, :48]) * x[:, 48:])
    close(ops.geglu(x), F.gelu(x[:, :48], approximate="tanh") * x[:, 48:])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 64, 600])
def test_attention_agrees_with_torch(causal: bool, length: int) -> None:
    """Longer than one chunk of queries, with grouped heads; paged and packed give the same."""
    gen = Gen(seed=2)
    heads, kv_heads, dim = 6, 2, 32
    cache = pages(gen, [length], 16, kv_heads, dim, torch.float32)
    q = gen.randn(length, heads, dim)
    offset = gen.tensor([0, length])
    expected = F.scaled_dot_product_attention(
        q.transpose(0, 1), cache.k[0].transpose(0, 1), cache.v[0].transpose(0, 1), is_causal=causal, enable_gqa=True
    ).transpose(0, 1)
    paged, paged_lse = ops.paged_attention(
        q, cache.k_cache, cache.v_cache, offset, offset[1:], cache.block_table, length, causal=causal
    )
    packed, lse = ops.varlen_attention(q, cache.k[0], cache.v[0], offset, offset, length, length, causal=causal)
    torch.testing.assert_close(paged, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed, paged)
    torch.testing.assert_close(lse, paged_lse)


def test_rows_without_keys() -> None:
    gen = Gen(seed=3)
    q, k = gen.randn(6, 4, 16), gen.randn(2, 2, 16)
    queries, keys = gen.tensor(offsets([4, 2])), gen.tensor(offsets([2, 0]))
    out, lse = ops.varlen_attention(q, k, k, queries, keys, 4, 2, causal=True)
    empty = torch.tensor(
        [True, True, False, False, True, True]
    )  # bottom-right: the first two rows stand before the keys
    assert torch.equal(out[empty], torch.zeros(4, 4, 16)) and bool((lse[:, empty] == -torch.inf).all())
    assert bool(lse[:, ~empty].isfinite().all()) and bool((out[~empty] != 0).all())


def test_chunked_prefill_equals_one_prefill() -> None:
    """A prompt in three steps over a growing cache gives what one step gives."""
    gen = Gen(seed=4)
    cache = pages(gen, [50], 8, 2, 16, torch.float32)
    q = gen.randn(50, 4, 16)

    def attend(start: int, end: int) -> torch.Tensor:
        runs = gen.tensor([0, end - start])
        used = gen.tensor([end])
        return ops.paged_attention(q[start:end], cache.k_cache, cache.v_cache, runs, used, cache.block_table, 50)[0]

    whole = attend(0, 50)
    torch.testing.assert_close(torch.cat([attend(0, 17), attend(17, 18), attend(18, 50)]), whole)


def test_paged_attention_does_not_look_at_the_default_dtype() -> None:
    """Several single tokens, which are computed together."""
    gen = Gen(seed=6)
    cache = pages(gen, [9, 30, 17], 8, 2, 16, torch.bfloat16)
    call = (gen.randn(3, 4, 16, dtype=torch.bfloat16), cache.k_cache, cache.v_cache, gen.tensor([0, 1, 2, 3]))
    found = []
    for dtype in (torch.bfloat16, torch.float32):  # what is kept for later calls must not hide the first
        torch.set_default_dtype(dtype)
        try:
            found.append(ops.paged_attention(*call, gen.tensor([9, 30, 17]), cache.block_table, 1))
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("options", [{}, {"window_size": (2, 0)}, {"window_size": (7, 0)}], ids=str)
def test_a_node_of_a_tree_is_the_end_of_its_path(options: dict[str, object]) -> None:
    """What it would be if the guesses on its path were all that there are, positions included; a word of a chain is causal."""
    gen = Gen(seed=8)
    prefix, parents = 5, [-1, 0, 0, 1, 1, 2, 5, 3, 6]
    n, slopes = len(parents), gen.rand(4)
    cache = pages(gen, [prefix + n], 4, 2, 16, torch.float32)
    paths: list[list[int]] = []
    for i, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), i])
    words = gen.tensor([sum(1 << j for j in path) for path in paths], torch.int64)
    q, runs, used = gen.randn(n, 4, 16), gen.tensor([0, n]), gen.tensor([prefix + n])
    call = (q, cache.k_cache, cache.v_cache, runs, used, cache.block_table, n)
    out, lse = ops.paged_attention(*call, tree_mask=words, alibi_slopes=slopes, **options)
    for i, path in enumerate(paths):
        keys = [*range(prefix), *(prefix + j for j in path)]
        at = gen.tensor([0, len(keys)])
        one, k, v = q[i : i + 1], cache.k[0][keys], cache.v[0][keys]
        alone, alone_lse = ops.varlen_attention(
            one, k, v, gen.tensor([0, 1]), at, 1, len(keys), causal=True, alibi_slopes=slopes, **options
        )
        torch.testing.assert_close(out[i : i + 1], alone)
        torch.testing.assert_close(lse[:, i : i + 1], alone_lse)
    chain = gen.tensor([(2 << i) - 1 for i in range(n)], torch.int64)
    found = ops.paged_attention(*call, tree_mask=chain, **options)
    for a, b in zip(found, ops.paged_attention(*call, **options), strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    weight, matrix = torch.ones(16), torch.ones(32, 16)

    def block(x: torch.Tensor) -> torch.Tensor:
        return ops.swiglu(ops.linear(ops.rms_norm(x, weight), matrix))

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5, 9):
        x = Gen(seed=rows).randn(rows, 16)
        assert torch.equal(compiled(x), block(x))


def test_mistakes_in_a_compiled_function_are_errors() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: ops.rms_norm(x, w), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="rms_norm"):
        compiled(torch.ones(3, 8), torch.ones(5))


def test_exported_program_runs() -> None:
    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return ops.add_rms_norm(x, residual, weight)

    gen = Gen(seed=6)
    x, residual, weight = gen.randn(3, 8), gen.randn(3, 8), gen.randn(8)
    program = torch.export.export(Block(), (x, residual.clone(), weight))
    ours = residual.clone()
    expected = ops.add_rms_norm(x, ours, weight)
    assert torch.equal(program.module()(x, residual, weight), expected)
    assert torch.equal(residual, ours)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("window", [-1, 0, 9])
def test_decodes_of_many_lengths_are_those_of_each_alone(softcap: float, window: int) -> None:
    """The CPU takes sequences with one query together, padded, in memory that it keeps: in and outside inference mode."""
    gen = Gen(seed=9)
    lengths = [1, 3, 64, 65, 0, 700, 2, 1300, 17]
    rows = [1, 1, 1, 1, 1, 1, 2, 1, 0]
    kept = pages(gen, lengths, 16, 2, 8, torch.float32)
    q = gen.randn(sum(rows), 4, 8)
    starts = offsets(rows)
    options = {"window_size": (window, -1), "softcap": softcap}

    def call(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        own = slice(starts[first], starts[last])
        cu_seqlens = gen.tensor([s - starts[first] for s in starts[first : last + 1]])
        out: tuple[torch.Tensor, torch.Tensor] = ops.paged_attention(
            q[own], kept.k_cache, kept.v_cache, cu_seqlens, gen.tensor(lengths[first:last]),
            kept.block_table[first:last], max(rows), **options,
        )  # fmt: skip
        return out

    with torch.inference_mode():
        together = call(0, len(lengths))
    again = call(0, len(lengths))
    for b in range(len(lengths)):
        own = slice(starts[b], starts[b + 1])
        out, lse = call(b, b + 1)
        for result, result_lse in (together, again):
            torch.testing.assert_close(result[own], out, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(result_lse[:, own], lse, rtol=1e-5, atol=1e-6)
