"""`fastattn.explain`: what a call would run, and how long it must take at least. Nothing is launched, no GPU is needed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from fastattn import _runtime
from fastattn.ops._args import MAX_LEADING_DIMS
from fastattn.ops._explain_backward import FlashBackward, explain_backward
from fastattn.ops._explain_paged import InvariantAttention, explain_invariant
from fastattn.ops.checks import MAX_HEAD_DIM, fail_value

_HOPPER_SMS, _HOPPER_SHARED_MEMORY = 132, 227 * 1024  # of an H100 or H200 (SXM), and what a thread block may have
_TFLOPS, _TB_S = 790.0, 3.0  # what an H100's matrix units and memory were measured to do
Shape = tuple[int, ...] | torch.Size


@dataclass(frozen=True)
class FlashForward:
    """How `batch_attention` would run. block_m × block_n: query rows and keys of a step of one CTA. num_splits: CTAs that
    share the keys of the same rows; those of paged_decode, which packs the heads of a group into its rows, take equal
    numbers of tiles of block_n keys instead, over the borders of sequences. num_ops, num_bytes: what any kernel must
    compute and move."""

    kernel: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool
    padded_head_dim: int
    block_m: int
    block_n: int
    num_tiles: int
    num_splits: int
    num_ctas: int
    num_ops: int
    num_bytes: int
    fp8: bool = False

    def floor_us(self, tflops: float | None = None, tb_s: float = _TB_S) -> float:
        """Microseconds that it takes at least, at these rates of the matrix units and the memory."""
        return max(self.num_ops / (tflops or self._tflops), self.num_bytes / tb_s) / 1e6

    @property
    def _tflops(self) -> float:  # of fp8, twice as much at most
        return _TFLOPS * (2 if self.fp8 else 1)

    def __str__(self) -> str:
        bound = "matrix units" if self.num_ops / self._tflops > self.num_bytes / _TB_S else "memory"
        padded = f" (padded to {self.padded_head_dim})" if self.padded_head_dim != self.head_dim else ""
        split = f", the keys of each among {self.num_splits} CTAs" if self.num_splits > 1 else ""
        tiles = f"{self.num_tiles // self.num_splits} tiles of {self.block_m} rows, {self.block_n} keys a step{split}; "
        if self.kernel == "paged_decode":
            each = -(-self.num_tiles // self.num_ctas)
            tiles = f"{self.num_tiles} tiles of {self.block_m} rows and {self.block_n} keys, {each} to each of "
        return (
            f"flash_fwd on {self.kernel}: {self.batch} × {self.seqlen_q} queries to {self.seqlen_k} keys, {self.num_heads} "
            f"heads to {self.num_kv_heads} of {self.head_dim}{padded}{' in fp8' if self.fp8 else ''}"
            f"{', causal' if self.causal else ''}\n"
            f"  {tiles}{self.num_ctas} CTAs\n"
            f"  {self.num_ops / 1e9:.4g} GFLOP, {self.num_bytes / 1e6:.4g} MB: at least {self.floor_us():.3g} µs on an H100, "
            f"bound by its {bound}"
        )


@dataclass(frozen=True)
class DenseLayer:
    """How `linear`, or a norm and it, or it and a gated activation, would run. n: rows of weight. block_m × block_n: rows of x and of weight of a CTA's tile, None on the
    portable kernel. num_splits: CTAs of a cluster that share the columns of a tile; stream_k: pairs of CTAs share those of all
    tiles evenly. fuses_norm: there is a norm, and it has no
    kernel of its own; fuses_gates: the same of a gated activation. num_ops, num_bytes: what any kernel must compute and
    move."""

    op: str
    kernel: str
    m: int
    n: int
    k: int
    block_m: int | None
    block_n: int | None
    num_splits: int
    num_ctas: int | None
    fuses_norm: bool
    num_ops: int
    num_bytes: int
    fuses_gates: bool = False
    stream_k: bool = False

    def floor_us(self, tflops: float = _TFLOPS, tb_s: float = _TB_S) -> float:
        """Microseconds that it takes at least, at these rates of the matrix units and the memory."""
        return max(self.num_ops / tflops, self.num_bytes / tb_s) / 1e6

    def __str__(self) -> str:
        bound = "matrix units" if self.num_ops / _TFLOPS > self.num_bytes / _TB_S else "memory"
        tiles = "tiles as its own heuristic has them"
        if self.block_m is not None:
            split = f", the columns of each among {self.num_splits} CTAs" if self.num_splits > 1 else ""
            split += ", their columns shared out evenly (stream-K)" if self.stream_k else ""
            tiles = f"tiles of {self.block_m} rows of x and {self.block_n} of weight{split}; {self.num_ctas} CTAs"
        norm = (
            ""
            if "norm" not in self.op
            else ", the norm inside"
            if self.fuses_norm
            else ", behind a kernel for the norm"
        )
        gates = (
            ""
            if "gated" not in self.op
            else ", the gates inside"
            if self.fuses_gates
            else ", before a kernel for the gates"
        )
        return (
            f"{self.op} on {self.kernel}: {self.m} × {self.k} → {self.n}{norm}{gates}\n"
            f"  {tiles}\n"
            f"  {self.num_ops / 1e9:.4g} GFLOP, {self.num_bytes / 1e6:.4g} MB: at least {self.floor_us():.3g} µs on an H100, "
            f"bound by its {bound}"
        )


Dense = Literal["linear", "rms_norm_linear", "layer_norm_linear", "gated_linear", "rms_norm_gated_linear"]
_DENSE = get_args(Dense)


@overload
def explain(
    what: Literal["flash_fwd"], q: Tensor | Shape, k: Tensor | Shape, /, *, causal: bool = False, kernel: str = "auto"
) -> FlashForward: ...
@overload
def explain(
    what: Literal["flash_bwd"],
    q: Tensor | Shape,
    k: Tensor | Shape,
    /,
    *,
    causal: bool = False,
    deterministic: bool = False,
    kernel: str = "auto",
) -> FlashBackward: ...
@overload
def explain(
    what: Literal["paged_attention"],
    q: Tensor | Shape,
    k_cache: Tensor | Shape,
    /,
    *,
    seqlen_k: int,
    batch_invariant: Literal[True],
    tree: bool = False,
) -> InvariantAttention: ...
@overload
def explain(what: Dense, x: Tensor | Shape, weight: Tensor | Shape, /) -> DenseLayer: ...
def explain(
    what: str,
    first: Tensor | Shape,
    second: Tensor | Shape,
    /,
    *,
    causal: bool = False,
    deterministic: bool = False,
    kernel: str = "auto",
    seqlen_k: int | None = None,
    batch_invariant: bool = False,
    tree: bool = False,
) -> FlashForward | FlashBackward | InvariantAttention | DenseLayer:
    """The configuration that a call gets, and its floor; print it.

    `explain("flash_fwd", q, k)` is of `batch_attention(q, k, k, causal=causal, kernel=kernel)`: q (B, Sq, H, D), k (B, Sk, Hk,
    D). `explain("flash_bwd", q, k)` is of its gradients, also with deterministic=…. `explain("paged_attention", q, k_cache, seqlen_k=…, batch_invariant=True)` is of one sequence of such a call, with or
    without a tree_mask (tree): q (Sq, H, D), its queries, seqlen_k, its keys, and k_cache (num_blocks, block_size, Hk, D), a
    tensor if it is of 8 bits; without batch_invariant it depends on the whole batch, and is not told.
    `explain("linear", x, weight)`, and "rms_norm_linear", "layer_norm_linear", "gated_linear" or "rms_norm_gated_linear", is of
    that operator: x (…, K), weight (N, K), with gates (2N, K) and the activation "silu" or "gelu_tanh".

    16-bit tensors or their shapes, for "flash_fwd" also float8_e4m3fn tensors; rows of shapes are packed and aligned. For tensors on a GPU it is that GPU's,
    for others an H100's. Raises ValueError for what does not fit.
    """
    shapes = [tuple(t.shape) if isinstance(t, Tensor) else tuple(t) for t in (first, second)]
    capability, num_sms = (9, 0), _HOPPER_SMS
    if isinstance(first, Tensor) and first.is_cuda:
        capability = torch.cuda.get_device_capability(first.device)
        num_sms = torch.cuda.get_device_properties(first.device).multi_processor_count
    if what in ("flash_fwd", "flash_bwd"):
        problem = _attention_problem(shapes, kernel, capability)
        num_pairs = _visible_pairs(*problem[4:], causal)
        fp8 = isinstance(first, Tensor) and first.dtype is torch.float8_e4m3fn
        if what == "flash_fwd":
            return _flash_forward(problem, num_pairs, causal, kernel, capability, num_sms, fp8)
        if fp8:
            fail_value("explain", "q is float8_e4m3fn, expected 16 bits: fp8 attention has no backward")
        shared_memory = _HOPPER_SHARED_MEMORY
        if isinstance(first, Tensor) and first.is_cuda:
            of_device = torch.cuda.get_device_properties(first.device)
            shared_memory = of_device.shared_memory_per_block_optin  # type: ignore[attr-defined]
        return explain_backward(problem, num_pairs, causal, deterministic, kernel, capability, num_sms, shared_memory)
    if what == "paged_attention":
        if not batch_invariant:
            fail_value(
                "explain", "batch_invariant is False, expected True: else what runs follows from the whole batch"
            )
        is_8bit = isinstance(second, Tensor) and second.itemsize == 1
        return explain_invariant(shapes[0], shapes[1], seqlen_k, tree, is_8bit, capability, num_sms)
    if what not in _DENSE:
        allowed = ("flash_fwd", "flash_bwd", "paged_attention", *_DENSE)
        fail_value("explain", f"what is {what!r}, expected {', '.join(map(repr, allowed))}")
    return _dense(what, shapes, capability, num_sms)


def _dense(what: str, shapes: list[tuple[int, ...]], capability: tuple[int, int], num_sms: int) -> DenseLayer:
    x, weight = shapes
    if not 1 <= len(x) <= MAX_LEADING_DIMS:
        fail_value("explain", f"x has shape {x}, expected 1 to {MAX_LEADING_DIMS} dimensions")
    k = x[-1]
    if len(weight) != 2 or weight[1] != k:
        fail_value("explain", f"weight has shape {weight}, expected (N, {k}) as x is {x}")
    m, n = math.prod(x[:-1]), weight[0]
    gated = "gated" in what
    per_column = 2 if gated else 1  # rows of weight for a column of the result
    if n % per_column != 0:
        fail_value("explain", f"weight has shape {weight}, expected (2N, {k}), as many rows of gates as of ups")
    work = 2 * m * n * k, 2 * (m * k + n * k + m * n // per_column)
    if capability != (9, 0) or n % (8 * per_column) != 0 or k % 8 != 0 or 0 in (m, n, k):
        return DenseLayer(what, "sm80", m, n, k, None, None, 1, None, False, *work)
    norm: Literal["", "rms", "layer"] = "rms" if "rms" in what else "layer" if "layer" in what else ""
    config = _runtime.gemm_sm90_config(m, n, k, num_sms, norm=norm, gated=gated)
    kernel = "sm90, few rows" if config["few_rows"] else "sm90"
    tile = config["block_m"], config["block_n"], config["num_splits"], config["num_ctas"]
    return DenseLayer(what, kernel, m, n, k, *tile, norm != "", *work, gated, bool(config["stream_k"]))


def _attention_problem(
    shapes: list[tuple[int, ...]], kernel: str, capability: tuple[int, int]
) -> tuple[int, int, int, int, int, int]:
    """B, H, Hk, D, Sq and Sk of q (B, Sq, H, D) and k (B, Sk, Hk, D), if they fit and the kernel can be had."""
    op = "explain"
    for name, shape in zip("qk", shapes, strict=True):
        if len(shape) != 4:
            fail_value(op, f"{name} has shape {shape}, expected four dimensions")
    (batch, seqlen_q, heads, dim), (batch_k, seqlen_k, kv_heads, dim_k) = shapes
    if (batch_k, dim_k) != (batch, dim):
        fail_value(op, f"k has shape {shapes[1]}, expected ({batch}, Sk, Hk, {dim}) as q is {shapes[0]}")
    if dim % 8 != 0 or not 8 <= dim <= MAX_HEAD_DIM or kv_heads < 1 or heads % kv_heads != 0:
        fail_value(
            op,
            f"q is {shapes[0]} and k {shapes[1]}, expected D a multiple of 8 up to {MAX_HEAD_DIM}, and Hk to divide H",
        )
    if kernel not in ("auto", "sm80", "sm90") or (kernel == "sm90" and capability != (9, 0)):
        fail_value(op, f"kernel is {kernel!r}, expected 'auto', 'sm80', or 'sm90' for a GPU of capability 9.0")
    return batch, heads, kv_heads, dim, seqlen_q, seqlen_k


def _visible_pairs(seqlen_q: int, seqlen_k: int, causal: bool) -> int:
    """Pairs of a query and a key that it sees."""
    if not causal:
        return seqlen_q * seqlen_k
    rows = min(
        seqlen_q, seqlen_k
    )  # aligned bottom-right: of those that see a key, each sees one more than the one before
    return rows * (rows + 1) // 2 + rows * (seqlen_k - rows)


def _flash_forward(
    problem: tuple[int, int, int, int, int, int],
    num_pairs: int,
    causal: bool,
    kernel: str,
    capability: tuple[int, int],
    num_sms: int,
    fp8: bool,
) -> FlashForward:
    batch, heads, kv_heads, dim, seqlen_q, seqlen_k = problem
    if fp8 and (kernel == "sm80" or capability != (9, 0)):
        fail_value("explain", "q is float8_e4m3fn, expected 16 bits: only the kernel 'sm90' has fp8")
    if fp8 and dim % 16 != 0:
        fail_value("explain", f"q has D = {dim}, expected a multiple of 16 in fp8")
    large_smem = capability[0] in (9, 10)  # 227 KiB for a CTA
    decode = _runtime.paged_decode_config(*problem, num_sms, large_smem)
    if kernel == "auto":
        few_rows = decode["fits"] and decode["num_columns"] == kv_heads
        kernel = "sm90" if capability == (9, 0) and (fp8 or not few_rows) else "sm80"
    if kernel == "sm90":
        config = _runtime.flash_fwd_sm90_config(*problem[:4], *problem[3:], causal, num_sms, fp8=fp8)
        num_tiles, num_ctas, num_splits = config["num_tiles"], config["num_ctas"], config["num_splits"]
    elif decode["fits"]:
        kernel, config = "paged_decode", decode
        num_tiles, num_ctas, num_splits = config["num_columns"] * config["max_tiles"], config["num_ctas"], 1
    else:
        config = _runtime.flash_sm80_config(*problem, num_sms)
        num_splits = config["num_splits"]
        num_tiles = num_ctas = config["num_m_tiles"] * kv_heads * batch * num_splits
    return FlashForward(
        kernel,
        batch,
        seqlen_q,
        seqlen_k,
        heads,
        kv_heads,
        dim,
        causal,
        config["head_dim"],
        config["block_m"],
        config["block_n"],
        num_tiles,
        num_splits,
        num_ctas,
        4 * batch * heads * num_pairs * dim,
        batch
        * dim
        * ((3 if fp8 else 4) * seqlen_q * heads + (2 if fp8 else 4) * seqlen_k * kv_heads),  # out has 16 bits
        fp8,
    )
