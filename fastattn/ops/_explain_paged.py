"""`fastattn.explain` of batch-invariant `paged_attention`, where what runs follows from one sequence alone."""

from __future__ import annotations

from dataclasses import dataclass

from fastattn import _runtime
from fastattn.ops.checks import MAX_HEAD_DIM, fail_value
from fastattn.reference.attention_scores import MAX_TREE_TOKENS

_DECODE_ROWS = 32  # packed rows of a KV head, up to which the decode kernel takes a sequence of 16-bit pages
_MOST_SPLITS = 32  # above that they are twice as long


@dataclass(frozen=True)
class InvariantAttention:
    """How one sequence of `paged_attention(…, batch_invariant=True)` runs, whatever else is in the call. why: the kernel, and
    not another. split_keys, num_splits: of so many keys each, of which it sees all; None and 1 where the kernel has no splits. num_ops, num_bytes: what any
    kernel must compute and move for it."""

    kernel: str
    why: str
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    kv_bits: int
    split_keys: int | None
    num_splits: int
    num_ops: int
    num_bytes: int

    def floor_us(self, tflops: float = 790.0, tb_s: float = 3.0) -> float:
        """Microseconds that it takes at least, at these rates of the matrix units and the memory (an H100's)."""
        return max(self.num_ops / tflops, self.num_bytes / tb_s) / 1e6

    def __str__(self) -> str:
        cut = "keys are not split"
        if self.num_splits > 1:
            cut = f"keys in {self.num_splits} splits of {self.split_keys}, added up in their order"
        return (
            f"paged_attention, batch-invariant, on {self.kernel}: {self.seqlen_q} queries to {self.seqlen_k} keys of "
            f"{self.kv_bits} bits, {self.num_heads} heads to {self.num_kv_heads} of {self.head_dim}, pages of {self.page_size}\n"
            f"  {self.why}\n"
            f"  {cut}\n"
            f"  {self.num_ops / 1e9:.4g} GFLOP, {self.num_bytes / 1e6:.4g} MB: at least {self.floor_us():.3g} µs on an H100"
        )


def explain_invariant(
    q: tuple[int, ...],
    k_cache: tuple[int, ...],
    seqlen_k: int | None,
    tree: bool,
    is_8bit: bool,
    capability: tuple[int, int],
    num_sms: int,
) -> InvariantAttention:
    """q (Sq, H, D) of the sequence, k_cache (num_blocks, block_size, Hk, D)."""
    op = "explain"
    for name, shape, dims in (("q", q, 3), ("k_cache", k_cache, 4)):
        if len(shape) != dims:
            fail_value(op, f"{name} has shape {shape}, expected {dims} dimensions")
    (tokens, heads, dim), (_, page_size, kv_heads, dim_k) = q, k_cache
    step = 16 if is_8bit else 8
    if dim != dim_k or dim % step != 0 or not step <= dim <= MAX_HEAD_DIM or kv_heads < 1 or heads % kv_heads != 0:
        fail_value(
            op,
            f"q is {q} and k_cache {k_cache}, expected the same D, a multiple of {step} up to {MAX_HEAD_DIM}, and Hk to "
            "divide H",
        )
    if min(tokens, page_size) < 1:
        fail_value(op, f"q is {q} and k_cache {k_cache}, expected Sq ≥ 1 and block_size ≥ 1")
    if seqlen_k is None or seqlen_k < 0:
        fail_value(op, f"seqlen_k is {seqlen_k}, expected the sequence's number of keys, ≥ 0")
    kernel, why = _kernel(tokens, heads // kv_heads, page_size, tree, is_8bit, capability)
    split_keys, num_splits = None, 1
    if kernel == "paged_decode":
        config = _runtime.paged_decode_config(
            1, heads, kv_heads, dim, tokens, max(seqlen_k, 1), num_sms, False, False, is_8bit, True
        )
        split_keys = config["split_tiles"] * config["block_n"]
        while seqlen_k > _MOST_SPLITS * split_keys:
            split_keys *= 2
        num_splits = max(1, -(-seqlen_k // split_keys))
    rows = min(tokens, seqlen_k)
    pairs = rows * (rows + 1) // 2 + rows * (seqlen_k - rows)
    num_bytes = 4 * tokens * heads * dim + 2 * seqlen_k * kv_heads * dim * (1 if is_8bit else 2)
    return InvariantAttention(
        kernel, why, tokens, seqlen_k, heads, kv_heads, dim, page_size, 8 if is_8bit else 16, split_keys, num_splits,
        4 * heads * dim * pairs, num_bytes,
    )  # fmt: skip


def _kernel(
    tokens: int, group: int, page_size: int, tree: bool, is_8bit: bool, capability: tuple[int, int]
) -> tuple[str, str]:
    """As run_paged in csrc/torch/attention.cpp has it: a rule for each sequence, by its own number of tokens."""
    rows = f"{tokens * group} rows a KV head ({tokens} tokens × {group} heads of a group)"
    if tokens <= _DECODE_ROWS // group:
        return "paged_decode", f"{rows}: up to {_DECODE_ROWS} are the decode kernel's"
    lacks = [
        reason
        for reason, is_so in (
            (f"the GPU is of compute capability {capability[0]}.{capability[1]}", capability != (9, 0)),
            (f"pages of {page_size} tokens are no multiple of 8", page_size % 8 != 0),
            (f"it has no trees, of up to {MAX_TREE_TOKENS} tokens", tree and tokens <= MAX_TREE_TOKENS),
        )
        if is_so
    ]
    if not lacks:
        return "sm90", f"{rows}: more than {_DECODE_ROWS} are Hopper's kernel's"
    why = f"{rows}: more than {_DECODE_ROWS}, but not for Hopper's kernel, as {'; '.join(lacks)}"
    return ("paged_decode", f"{why}; no other reads 8 bits") if is_8bit else ("sm80", why)
