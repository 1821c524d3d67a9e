"""The operators' cases: inputs of the sizes of one model, and what a call must move and compute at least."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastattn import ops
from fastattn.benchmarks.kernels import Call, Case, Shapes

_MAX_BATCH = 256  # sequences that decode, and rows that are sampled from, at most: more is no step of one GPU


def cases(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """One case an operator; GEMM at its four places in a layer, attention for prefill and for decode."""
    s, size = shapes, dtype.itemsize
    rows, hidden = s.num_tokens, s.hidden_size

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def int32(*values: Any) -> Tensor:
        return torch.tensor(values, device=device, dtype=torch.int32)

    def rms_norm() -> Call:
        x, weight = rand(rows, hidden), rand(hidden)
        return lambda: ops.rms_norm(x, weight)

    def add_rms_norm() -> Call:
        x, residual, weight = rand(rows, hidden), torch.zeros(rows, hidden, device=device, dtype=dtype), rand(hidden)
        return lambda: ops.add_rms_norm(x, residual, weight)

    def layer_norm() -> Call:
        x, weight = rand(rows, hidden), rand(hidden)
        return lambda: ops.layer_norm(x, weight)

    def gated(op: Callable[[Tensor], Tensor]) -> Callable[[], Call]:
        def build() -> Call:
            x = rand(rows, 2 * s.intermediate_size)
            return lambda: op(x)

        return build

    def embedding() -> Call:
        token_ids = torch.randint(0, s.vocab_size, (rows,), device=device, dtype=torch.int32)
        weight = rand(s.vocab_size, hidden)
        return lambda: ops.embedding(token_ids, weight)

    for name, build, num_bytes in (
        ("rms_norm", rms_norm, 2 * rows * hidden),
        ("add_rms_norm", add_rms_norm, 4 * rows * hidden),
        ("layer_norm", layer_norm, 2 * rows * hidden),
    ):
        yield Case(name, f"{rows} × {hidden}", build, num_bytes * size)
    for name, op in (("swiglu", ops.swiglu), ("geglu", ops.geglu)):
        shape = f"{rows} × {2 * s.intermediate_size}"
        yield Case(name, shape, gated(op), 3 * rows * s.intermediate_size * size)
    yield Case("embedding", f"{rows} of {s.vocab_size} × {hidden}", embedding, 2 * rows * hidden * size)
    yield _rope(s, rand, device, size)
    yield from _block_copies(s, rand, device, size)
    yield from _linears(s, rand, size)
    yield from _few_bits(s, rand, device, size)
    yield from _sparse(s, rand, device, size)
    yield from _attention(s, rand, int32, device, size)
    yield from _sampling(s, device, dtype)


def _rope(s: Shapes, rand: Callable[..., Tensor], device: torch.device, size: int) -> Case:
    rows, dim = s.num_tokens, s.head_dim

    def build() -> Call:
        q, k, v = rand(rows, s.num_heads, dim), rand(rows, s.num_kv_heads, dim), rand(rows, s.num_kv_heads, dim)
        positions = torch.arange(rows, device=device, dtype=torch.int32)
        cos_sin = torch.randn(rows, dim, device=device)
        keys, values = (rand(-(-rows // s.block_size), s.block_size, s.num_kv_heads, dim) for _ in range(2))
        return lambda: ops.rope_kv_write(q, k, v, cos_sin, positions, positions, keys, values)

    elements = 2 * rows * dim * (s.num_heads + 2 * s.num_kv_heads)
    return Case("rope_kv_write", f"{rows} × ({s.num_heads} + 2·{s.num_kv_heads}) × {dim}", build, elements * size)


def _block_copies(s: Shapes, rand: Callable[..., Tensor], device: torch.device, size: int) -> Iterator[Case]:
    """Keys and values of a layer: as many blocks as a step has rows. A swap is bound by PCIe, and its share is low."""
    count = min(s.num_tokens, _MAX_BATCH)
    block = (s.block_size, s.num_kv_heads, s.head_dim)
    first = torch.arange(count, device=device, dtype=torch.int32)

    def copy_blocks() -> Call:
        caches = [rand(2 * count, *block) for _ in range(2)]
        mapping = torch.stack([first, first + count], 1)
        return lambda: ops.copy_blocks(caches, mapping)

    def swap_blocks() -> Call:
        caches = [rand(count, *block) for _ in range(2)]
        host = [torch.empty(c.shape, dtype=c.dtype, pin_memory=c.is_cuda) for c in caches]
        mapping = torch.stack([first, first], 1)
        return lambda: ops.swap_blocks(caches, host, mapping)

    moved = 4 * count * s.block_size * s.num_kv_heads * s.head_dim * size
    yield Case("copy_blocks", f"{count} blocks of {s.block_size}", copy_blocks, moved)
    yield Case("swap_blocks", f"{count} blocks of {s.block_size} to the host", swap_blocks, moved)


def _linears(s: Shapes, rand: Callable[..., Tensor], size: int) -> Iterator[Case]:
    q_dim = s.num_heads * s.head_dim
    for n, k in (
        (q_dim + 2 * s.num_kv_heads * s.head_dim, s.hidden_size),
        (s.hidden_size, q_dim),
        (2 * s.intermediate_size, s.hidden_size),
        (s.hidden_size, s.intermediate_size),
    ):

        def build(n: int = n, k: int = k) -> Call:
            x, weight = rand(s.num_tokens, k), rand(n, k)
            return lambda: ops.linear(x, weight)

        m = s.num_tokens
        yield Case("linear", f"{m} × {k} → {n}", build, (m * k + n * k + m * n) * size, 2 * m * n * k)

    m, k, n = s.num_tokens, s.hidden_size, 2 * s.intermediate_size

    def rms_norm_linear() -> Call:
        x, weight = rand(m, k), rand(n, k)
        return lambda: ops.rms_norm_linear(x, weight)

    def layer_norm_linear() -> Call:
        x, weight = rand(m, k), rand(n, k)
        weight_sum = weight.sum(1, dtype=torch.float32)
        return lambda: ops.layer_norm_linear(x, weight, weight_sum)

    def gated_linear() -> Call:
        x, weight = rand(m, k), rand(n, k)
        return lambda: ops.gated_linear(x, weight)

    def rms_norm_gated_linear() -> Call:
        x, weight = rand(m, k), rand(n, k)
        return lambda: ops.rms_norm_gated_linear(x, weight)

    for name, gated in (("gated_linear", gated_linear), ("rms_norm_gated_linear", rms_norm_gated_linear)):
        yield Case(name, f"{m} × {k} → {n // 2}", gated, (m * k + n * k + m * n // 2) * size, 2 * m * n * k)
    for name, normed in (("rms_norm_linear", rms_norm_linear), ("layer_norm_linear", layer_norm_linear)):
        yield Case(name, f"{m} × {k} → {n}", normed, (m * k + n * k + m * n) * size, 2 * m * n * k)


def _few_bits(s: Shapes, rand: Callable[..., Tensor], device: torch.device, size: int) -> Iterator[Case]:
    """Products with weights of 8 and 4 bits, at the largest place in a layer."""
    m, k, n = s.num_tokens, s.hidden_size, 2 * s.intermediate_size

    def bits(*shape: int, dtype: torch.dtype = torch.uint8, low: int = 0, high: int = 256) -> Tensor:
        return torch.randint(low, high, shape, device=device, dtype=dtype)

    def quantize_int8() -> Call:
        x = rand(m, k)
        return lambda: ops.quantize_int8(x)

    def rms_norm_quantize(op: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], Call]:
        def build() -> Call:
            x, residual, weight = rand(m, k), rand(m, k), rand(k)
            return lambda: op(x, weight, residual=residual)

        return build

    def int8_linear() -> Call:
        x, x_scale = ops.quantize_int8(rand(m, k))
        weight, scale = bits(n, k, dtype=torch.int8, low=-127, high=128), torch.rand(n, device=device)
        out_dtype = rand(1).dtype
        return lambda: ops.int8_linear(x, x_scale, weight, scale, out_dtype=out_dtype)

    def quantize_int8_gated() -> Call:
        x = rand(m, 2 * k)
        return lambda: ops.quantize_int8(x, activation="silu")

    def quantize_int8_asymmetric() -> Call:
        x = rand(m, k)
        return lambda: ops.quantize_int8_asymmetric(x)

    def quantize_fp8() -> Call:
        x = rand(m, k)
        return lambda: ops.quantize_fp8(x)

    def fp8_linear() -> Call:
        x, x_scale = ops.quantize_fp8(rand(m, k))
        weight, scale = ops.quantize_fp8(rand(n, k))
        out_dtype = rand(1).dtype
        return lambda: ops.fp8_linear(x, x_scale, weight, scale, out_dtype=out_dtype)

    def quantize_fp8_groups() -> Call:
        x = rand(m, k)
        return lambda: ops.quantize_fp8_groups(x)

    def fp8_block_linear() -> Call:
        x, x_scale = ops.quantize_fp8_groups(rand(m, k))
        weight, _ = ops.quantize_fp8(rand(n, k))
        scale = torch.rand(-(-n // 128), -(-k // 128), device=device)
        out_dtype = rand(1).dtype
        return lambda: ops.fp8_block_linear(x, x_scale, weight, scale, out_dtype=out_dtype)

    def int4_linear() -> Call:
        x, scale = rand(m, k), rand(n, -(-k // 128))
        weight = bits(n, -(-k // 8), dtype=torch.int32, low=-(2**31), high=2**31 - 1)
        return lambda: ops.int4_linear(x, weight, scale, group_size=128)

    def fp4_linear() -> Call:
        x, weight = rand(m, k), bits(n, -(-k // 2))
        scale = bits(n, -(-k // 16), low=48, high=64)  # E4M3 from 0.5 to 2
        rows = torch.ones(n, device=device)
        return lambda: ops.fp4_linear(x, weight, scale, group_size=16, global_scale=rows)

    def fp4_fp8_linear() -> Call:
        x, x_scale = ops.quantize_fp8(rand(m, k))
        weight, scale = bits(n, -(-k // 2)), bits(n, -(-k // 32), low=117, high=121)  # from 2⁻¹⁰ to 2⁻⁷
        out_dtype = rand(1).dtype
        return lambda: ops.fp4_fp8_linear(x, x_scale, weight, scale, group_size=32, out_dtype=out_dtype)

    yield Case("quantize_int8", f"{m} × {k}", quantize_int8, m * k * (size + 1))
    yield Case("quantize_int8", f"{m} × {k}, SwiGLU", quantize_int8_gated, m * k * (2 * size + 1))
    yield Case("quantize_int8_asymmetric", f"{m} × {k}", quantize_int8_asymmetric, m * k * (size + 1))
    yield Case("quantize_fp8", f"{m} × {k}", quantize_fp8, m * k * (size + 1))
    for op in (ops.rms_norm_quantize_int8, ops.rms_norm_quantize_fp8):
        yield Case(op.__name__, f"{m} × {k}", rms_norm_quantize(op), m * k * (3 * size + 1))
    yield Case("quantize_fp8_groups", f"{m} × {k}", quantize_fp8_groups, m * k * (size + 1))
    for name, build, weight_bytes, x_size in (
        ("int8_linear", int8_linear, n * k, 1),
        ("fp8_linear", fp8_linear, n * k, 1),
        ("fp8_block_linear", fp8_block_linear, n * k, 1),
        ("int4_linear", int4_linear, n * k // 2 + n * -(-k // 128) * size, size),
        ("fp4_linear", fp4_linear, n * k // 2 + n * -(-k // 16), size),
        ("fp4_fp8_linear", fp4_fp8_linear, n * k // 2 + n * -(-k // 32), 1),
    ):
        moved = weight_bytes + m * k * x_size + m * n * size
        yield Case(name, f"{m} × {k} → {n}", build, moved, 2 * m * n * k)


def _sparse(s: Shapes, rand: Callable[..., Tensor], device: torch.device, size: int) -> Iterator[Case]:
    """Products with 2:4 sparse weights, there too. Operations are those of the numbers that are stored."""
    m, k, n = s.num_tokens, s.hidden_size, 2 * s.intermediate_size
    if k % 4:
        return

    def pruned() -> Tensor:
        return rand(n, k) * (torch.arange(k, device=device) % 4 < 2)

    def sparse_linear() -> Call:
        x, (values, metadata) = rand(m, k), ops.pack_sparse_24(pruned())
        return lambda: ops.sparse_linear(x, values, metadata)

    def sparse_8bit(
        quantize: Callable[[Tensor], tuple[Tensor, Tensor]], product: Callable[..., Tensor]
    ) -> Callable[[], Call]:
        def build() -> Call:
            x, weight = rand(m, k), pruned()
            (x_q, x_scale), (weight_q, scale) = quantize(x), quantize(weight)
            values, metadata = ops.pack_sparse_24(weight_q)
            return lambda: product(x_q, x_scale, values, metadata, scale, out_dtype=x.dtype)

        return build

    for name, build, weight_size in (
        ("sparse_linear", sparse_linear, size),
        ("sparse_int8_linear", sparse_8bit(ops.quantize_int8, ops.sparse_int8_linear), 1),
        ("sparse_fp8_linear", sparse_8bit(ops.quantize_fp8, ops.sparse_fp8_linear), 1),
    ):
        moved = n * k * weight_size // 2 + n * k // 8 + m * k * weight_size + m * n * size
        yield Case(name, f"{m} × {k} → {n}", build, moved, m * n * k)


def _attention(
    s: Shapes, rand: Callable[..., Tensor], int32: Callable[..., Tensor], device: torch.device, size: int
) -> Iterator[Case]:
    rows, heads, kv_heads, dim = s.num_tokens, s.num_heads, s.num_kv_heads, s.head_dim
    batch = min(rows, _MAX_BATCH)
    blocks_per_seq = -(-s.context_len // s.block_size)

    def prefill() -> Call:
        q, k, v = rand(rows, heads, dim), rand(rows, kv_heads, dim), rand(rows, kv_heads, dim)
        offsets = int32(0, rows)
        return lambda: ops.varlen_attention(q, k, v, offsets, offsets, rows, rows, causal=True)

    def one_batch() -> Call:
        q, k, v = rand(1, rows, heads, dim), rand(1, rows, kv_heads, dim), rand(1, rows, kv_heads, dim)
        return lambda: ops.batch_attention(q, k, v, causal=True)

    def batch_backward() -> Call:
        q, k, v = rand(1, rows, heads, dim), rand(1, rows, kv_heads, dim), rand(1, rows, kv_heads, dim)
        out, lse = ops.batch_attention(q, k, v, causal=True)
        return lambda: ops.batch_attention_backward(out, q, k, v, out, lse, causal=True)

    def varlen_backward() -> Call:
        q, k, v = rand(rows, heads, dim), rand(rows, kv_heads, dim), rand(rows, kv_heads, dim)
        sequences = (int32(0, rows), int32(0, rows), rows, rows)
        out, lse = ops.varlen_attention(q, k, v, *sequences, causal=True)
        return lambda: ops.varlen_attention_backward(out, q, k, v, out, lse, *sequences, causal=True)

    def merge() -> Call:
        halves = [(rand(rows, heads, dim), torch.randn(heads, rows, device=device)) for _ in range(2)]
        return lambda: ops.merge_attention_states(*halves[0], *halves[1])

    def decode() -> Call:
        q = rand(batch, heads, dim)
        keys, values = (rand(batch * blocks_per_seq, s.block_size, kv_heads, dim) for _ in range(2))
        table = torch.randperm(batch * blocks_per_seq, device=device).to(torch.int32).view(batch, blocks_per_seq)
        offsets = torch.arange(batch + 1, device=device, dtype=torch.int32)
        lengths = torch.full((batch,), s.context_len, device=device, dtype=torch.int32)
        return lambda: ops.paged_attention(q, keys, values, offsets, lengths, table, 1)

    kept = (2 * heads + 2 * kv_heads) * rows * dim
    # Half of the scores are masked, and not computed.
    for operator, build in (("varlen_attention", prefill), ("batch_attention", one_batch)):
        yield Case(operator, f"prefill of {rows}", build, kept * size, 2 * rows * rows * heads * dim)
    # q, out, dout and dq, k, v, dk and dv; five products where the forward has two.
    for operator, build in (
        ("varlen_attention_backward", varlen_backward),
        ("batch_attention_backward", batch_backward),
    ):
        moved = (4 * heads + 4 * kv_heads) * rows * dim * size
        yield Case(operator, f"prefill of {rows}", build, moved, 5 * rows * rows * heads * dim)
    yield Case("merge_attention_states", f"{rows} × {heads} × {dim}", merge, 3 * rows * heads * (dim * size + 4))
    read = 2 * batch * s.context_len * kv_heads * dim + 2 * batch * heads * dim
    flop = 4 * batch * s.context_len * heads * dim
    yield Case("paged_attention", f"decode, {batch} × {s.context_len} keys", decode, read * size, flop)


def _sampling(s: Shapes, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    rows, vocab, hidden = min(s.num_tokens, _MAX_BATCH), s.vocab_size, s.hidden_size

    def logits() -> Tensor:
        return torch.randn(rows, vocab, device=device)

    def full(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((rows,), value, device=device, dtype=dtype)

    def sample() -> Call:
        f, i, arguments = torch.float32, torch.int64, logits()
        rest = (full(0.8, f), full(50, torch.int32), full(0.95, f), full(0, f), full(7, i), full(3, i))
        return lambda: ops.sample(arguments, *rest)

    def lm_head_sample() -> Call:
        x, weight = (torch.randn(n, hidden, device=device, dtype=dtype) for n in (rows, vocab))
        rest = (full(0.8, torch.float32), full(7, torch.int64), full(3, torch.int64))
        return lambda: ops.lm_head_sample(x, weight, *rest)

    def speculative_sample() -> Call:
        f, i, arguments, drafts = torch.float32, torch.int64, logits(), logits()
        rest = (full(0.8, f), full(50, torch.int32), full(0.95, f), full(0, f), full(7, i), full(3, i))
        every, ids = torch.arange(rows, device=device, dtype=torch.int32), full(1, torch.int32)
        return lambda: ops.speculative_sample(arguments, drafts, ids, every, *rest)

    def token_logprobs() -> Call:
        x, token_ids = logits(), full(1, torch.int32)
        return lambda: ops.token_logprobs(x, token_ids, 5)

    def apply_token_bitmask() -> Call:
        x, mask = logits(), torch.full((rows, -(-vocab // 32)), -1, device=device, dtype=torch.int32)
        every = torch.arange(rows, device=device, dtype=torch.int32)
        return lambda: ops.apply_token_bitmask(x, mask, every)

    # Everything is allowed: no logit is written.
    yield Case("apply_token_bitmask", f"{rows} × {vocab}", apply_token_bitmask, rows * vocab // 8)
    yield Case("sample", f"{rows} × {vocab}, top-k 50, top-p 0.95", sample, rows * vocab * 4)
    yield Case("speculative_sample", f"{rows} × {vocab}, a draft each", speculative_sample, 2 * rows * vocab * 4)
    yield Case("token_logprobs", f"{rows} × {vocab}, 5 best", token_logprobs, rows * vocab * 4)
    moved, flop = (rows + vocab) * hidden * dtype.itemsize, 2 * rows * vocab * hidden
    yield Case("lm_head_sample", f"{rows} × {hidden} → {vocab}", lm_head_sample, moved, flop)
