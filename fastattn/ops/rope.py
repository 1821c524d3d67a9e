"""Rotary embedding with the write of keys and values to the paged cache."""

from __future__ import annotations

from torch import Tensor

from fastattn.ops._kv_cache import cache_args, check_cache, scale_args
from fastattn.ops._library import define
from fastattn.ops.checks import (
    FLOAT,
    FP32,
    INT32,
    Flag,
    NonNegative,
    TensorArg,
    check_range,
    compile_check,
    fail_value,
    values_readable,
)
from fastattn.reference import rope as reference


def _fake(*_: object) -> None:
    return None


_rope_kv_write = define(
    "rope_kv_write(Tensor(a!) q, Tensor k, Tensor v, Tensor cos_sin, Tensor positions, Tensor slot_mapping, "
    "Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor? q_norm_weight, Tensor? k_norm_weight, Tensor(d!)? k_scale, "
    "Tensor(e!)? v_scale, float norm_eps, bool interleaved, bool hadamard) -> ()",
    reference.rope_kv_write,
    _fake,
)

_check_rope_kv_write = compile_check(
    "rope_kv_write",
    TensorArg("q", "T H D", FLOAT, mutated=True),
    TensorArg("k", "T Hk D", "q"),
    TensorArg("v", "T Hk D", "q"),
    TensorArg("cos_sin", "max_position rotary_dim", FP32),
    TensorArg("positions", "T", INT32),
    TensorArg("slot_mapping", "T", INT32),
    *cache_args(mutated=True),
    TensorArg("q_norm_weight", "D", "q", optional=True),
    TensorArg("k_norm_weight", "D", "q", optional=True),
    *scale_args(mutated=True),
    NonNegative("norm_eps"),
    Flag("interleaved"),
    Flag("hadamard"),
)


def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    norm_eps: float = 1e-6,
    interleaved: bool = False,
    hadamard: bool = False,
) -> None:
    """Rotate q in place, write rotated k and plain v to their slots of the cache (https://arxiv.org/abs/2104.09864).

    q: (T, H, D), changed in place; k, v: (T, Hk, D), read only; bf16 or fp16, on the CPU also fp32.
    cos_sin: (max_position, rotary_dim) fp32, cosines in the first half of a row, sines in the second; rotary_dim is
      even and at most D; dimensions from rotary_dim on pass through.
    positions: (T) int32, rows of cos_sin. slot_mapping: (T) int32, `block * block_size + offset`, distinct; -1 writes
      nothing.
    k_cache, v_cache: (num_blocks, block_size, Hk, D), changed in place; q's dtype, or float8_e4m3fn or int8 with D a
      multiple of 16 up to 256.
    q_norm_weight, k_norm_weight: (D), q's dtype: each head is RMS-normalized, and rounded, before it is rotated.
    k_scale, v_scale: fp32, for caches of 8 bits, which take what is written divided by it, rounded once, and not beyond
      their largest number. (Hk): given, positive, ones if None, which int8 may not be. (num_blocks, block_size, Hk), of any strides:
      changed in place, to the largest magnitude of the token's head / 127 (int8), or / 448 times the one of 2^(i / 8),
      i = 0 … 7, that leaves the smallest squared error (fp8), or 1 for zeros.
    interleaved: pairs are (2i, 2i + 1) if True, (i, i + rotary_dim / 2) if False (GPT-NeoX, Hugging Face).
    hadamard: then, for caches of 8 bits, heads of q and k are multiplied by an orthonormal Hadamard matrix, before anything is rounded; by several
      side by side of the largest power of two that divides D. Their products stay what they are, and no few dimensions
      have all of the magnitude, and of the error, in 8 bits (incoherent processing, https://arxiv.org/abs/2407.08608).

    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    Positions and slots are checked on the CPU, and on the GPU only with FASTATTN_VALIDATE_INPUTS=1.
    """
    _check_rope_kv_write(
        q, k, v, cos_sin, positions, slot_mapping, k_cache, v_cache, q_norm_weight, k_norm_weight, k_scale, v_scale,
        norm_eps, interleaved, hadamard,
    )  # fmt: skip
    check_cache("rope_kv_write", q, k_cache, k_scale, v_scale)
    rotary_dim = cos_sin.shape[1]
    if rotary_dim % 2 != 0 or rotary_dim > q.shape[2]:
        fail_value(
            "rope_kv_write",
            f"cos_sin has shape {tuple(cos_sin.shape)}, expected (max_position, rotary_dim) with rotary_dim even and "
            f"at most D = {q.shape[2]} from q {tuple(q.shape)}",
        )
    if hadamard and k_cache.dtype is q.dtype:
        fail_value("rope_kv_write", f"hadamard is True with k_cache in {k_cache.dtype}, expected it in 8 bits")
    if values_readable(positions):
        last_slot = k_cache.shape[0] * k_cache.shape[1] - 1
        check_range(
            "rope_kv_write", "positions", positions, 0, cos_sin.shape[0] - 1, "max_position - 1 from cos_sin", cos_sin
        )
        check_range(
            "rope_kv_write",
            "slot_mapping",
            slot_mapping,
            -1,
            last_slot,
            "num_blocks * block_size - 1 from k_cache",
            k_cache,
        )
    _rope_kv_write(
        q, k, v, cos_sin, positions, slot_mapping, k_cache, v_cache, q_norm_weight, k_norm_weight, k_scale, v_scale,
        norm_eps, interleaved, hadamard,
    )  # fmt: skip
