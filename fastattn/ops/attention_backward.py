"""The backward of attention as functions of their own, for those who keep what autograd would keep."""

from __future__ import annotations

from torch import Tensor

from fastattn.ops import _attention as operators
from fastattn.ops._attention_checks import (
    KERNELS,
    check_batch_attention_backward,
    check_heads,
    check_kernel,
    check_sequences,
    check_varlen_attention_backward,
    default_scale,
    window,
)


def batch_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    dlse: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """What autograd calls for `batch_attention`: the gradients of q, k and v.

    dout, out: (B, Sq, H, Dv), q's dtype. lse and dlse, the gradient of lse, zero if None: (B, H, Sq) fp32.
    The rest is as in `varlen_attention_backward`.
    """
    op = "batch_attention_backward"
    left, right = window(op, window_size)
    scale = default_scale(op, q, 4) if softmax_scale is None else softmax_scale
    check_kernel(op, q, scale, kernel)
    check_batch_attention_backward(
        q, k, v, dout, out, lse, dlse, alibi_slopes, scale, causal, left, right, softcap, deterministic
    )
    check_heads(op, q, "k", k, v)
    dq, dk, dv = operators.batch_attention_backward(
        dout, q, k, v, out, lse, dlse, alibi_slopes,
        scale, causal, left, right, softcap, deterministic, KERNELS[kernel],
    )  # fmt: skip
    return dq, dk, dv


def varlen_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dlse: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """What autograd calls for `varlen_attention`: the gradients of q, k and v (https://arxiv.org/abs/2307.08691).

    out, lse: what the forward gave for q, k, v and the same options. dout: (T, H, Dv), q's dtype, and dlse: (H, T) fp32 or
      None for zero, their gradients.
    Sinks are in lse, and need nothing more; their own gradient is `-(exp(sinks - lse) * delta).sum()` over a head's rows,
      with delta the sum of `dout * out` over Dv, minus dlse.
    deterministic: two runs give the same bits.
    The rest is as in `varlen_attention`. fp8 has no backward.

    Returns dq (T, H, D), dk (Tk, Hk, D) and dv (Tk, Hk, Dv) in q's dtype, summed in fp32: 0 where nothing is seen, and for
    tokens that no sequence has or uses.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    op = "varlen_attention_backward"
    left, right = window(op, window_size)
    scale = default_scale(op, q) if softmax_scale is None else softmax_scale
    check_kernel(op, q, scale, kernel)
    check_varlen_attention_backward(
        q, k, v, dout, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, alibi_slopes,
        max_seqlen_q, max_seqlen_k, scale, causal, left, right, softcap, deterministic,
    )  # fmt: skip
    check_heads(op, q, "k", k, v)
    check_sequences(op, q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k)
    dq, dk, dv = operators.varlen_attention_backward(
        dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, alibi_slopes,
        max_seqlen_q, max_seqlen_k, scale, causal, left, right, softcap, deterministic, KERNELS[kernel],
    )  # fmt: skip
    return dq, dk, dv
