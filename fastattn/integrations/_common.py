"""What the functions of this package have in common: checks, and the shapes that the operators want."""

from __future__ import annotations

from typing import NoReturn, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops.checks import FP8, MAX_HEAD_DIM


def fail(op: str, message: str) -> NoReturn:
    """flash-attn raises RuntimeError for what it cannot do; callers that fall back to something else rely on that."""
    raise RuntimeError(f"{op}: {message}")


def not_implemented(op: str, message: str) -> NoReturn:
    """A RuntimeError too."""
    raise NotImplementedError(f"{op}: {message}")


def check(op: str, q: Tensor, k: Tensor, v: Tensor, k_name: str = "k", v_name: str = "v", *, fp8: bool = False) -> None:
    """The limits whose errors flash-attn's callers know. What else does not fit, the operators refuse."""
    dtypes = (torch.float16, torch.bfloat16, *((FP8,) if fp8 else ()))
    cast = isinstance(q, Tensor) and torch.is_autocast_enabled(q.device.type)
    for name, t in (("q", q), (k_name, k), (v_name, v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}, expected a torch.Tensor")
        # The operators cast under autocast, and a CPU takes fp32.
        if t.dtype not in dtypes and not (t.dtype == torch.float32 and (t.is_cpu or cast)):
            fail(op, f"{name} is {t.dtype}, expected fp16 or bf16: FlashAttention only support fp16 and bf16 data type")
        if t.dtype != q.dtype and not cast:
            fail(op, f"{name} is {t.dtype} and q is {q.dtype}: query, key and value must have the same dtype")
        if t.dim() == 0 or t.shape[-1] > MAX_HEAD_DIM:
            fail(
                op,
                f"{name} has shape {tuple(t.shape)}: FlashAttention only supports head dimension at most {MAX_HEAD_DIM}",
            )
    if q.dim() > 2 and k.dim() > 2 and (k.shape[-2] == 0 or q.shape[-2] % k.shape[-2] != 0):
        fail(
            op,
            f"q has shape {tuple(q.shape)} and {k_name} {tuple(k.shape)}: "
            "Number of heads in key/value must divide number of heads in query",
        )


def no_dropout(op: str, dropout_p: float) -> None:
    if dropout_p != 0.0:
        not_implemented(
            op,
            f"dropout_p is {dropout_p}, expected 0: fastattn has no attention dropout. Set the model's attention dropout "
            "to 0, or use torch.nn.functional.scaled_dot_product_attention(..., dropout_p=...) where you need it",
        )


def scale_of(q: Tensor, softmax_scale: float | None) -> float:
    """1/√D of the head dim that the caller sees, before it is filled up."""
    return float(max(q.shape[-1], 1) ** -0.5) if softmax_scale is None else softmax_scale


def window_of(window_size: tuple[int | None, int | None]) -> tuple[int, int]:
    """(left, right) where anything below 0, or None, is open; a tensor of two serves as well."""
    if not isinstance(window_size, tuple | list | Tensor) or len(window_size) != 2:
        raise TypeError(f"window_size is {window_size!r}, expected a pair (left, right)")
    left, right = (int(side) if isinstance(side, Tensor) else side for side in window_size)
    return -1 if left is None or left < 0 else left, -1 if right is None or right < 0 else right


class Scores(TypedDict):
    """How scores are made and masked, as the operators want it."""

    softmax_scale: float
    causal: bool
    window_size: tuple[int, int]
    softcap: float


def scores_of(
    q: Tensor, softmax_scale: float | None, causal: bool, window_size: tuple[int | None, int | None], softcap: float
) -> Scores:
    """From what flash-attn's functions take; to them a softcap below 0 is off too."""
    return {
        "softmax_scale": scale_of(q, softmax_scale),
        "causal": causal,
        "window_size": window_of(window_size),
        "softcap": max(softcap, 0.0),
    }


def fit(x: Tensor) -> Tensor:
    """x with a head dim that is a multiple of 8, filled up with zeros, and a contiguous last dimension."""
    missing = -x.shape[-1] % 8
    if missing and x.dtype != FP8:
        return F.pad(x, (0, missing))
    return x if x.stride(-1) == 1 else x.contiguous()


def cut(out: Tensor, head_dim: int) -> Tensor:
    """`fit` undone."""
    return out if out.shape[-1] == head_dim else out[..., :head_dim]


def length(value: int | Tensor, bound: int) -> int:
    """A longest length that may come as a 0-d tensor. Where reading that would wait for a GPU whose work is being
    recorded, `bound`, the longest that it can be, serves as well."""
    if not isinstance(value, Tensor):
        return value
    if torch.compiler.is_compiling() or (value.is_cuda and torch.cuda.is_current_stream_capturing()):
        return bound
    return int(value)


def plus_infinity(lse: Tensor) -> Tensor:
    """flash-attn 2's LSE of a row that sees no key."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def offsets(num_sequences: int, step: int, device: torch.device) -> Tensor:
    """(num_sequences + 1) int32: 0, step, 2 step, …"""
    return torch.arange(num_sequences + 1, dtype=torch.int32, device=device) * step
