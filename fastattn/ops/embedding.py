"""Token embedding."""

from __future__ import annotations

from torch import Tensor

from fastattn.ops._library import define
from fastattn.ops.checks import FLOAT, INT32, NonNegative, TensorArg, check_range, compile_check, values_readable
from fastattn.reference import embedding as reference


def _fake(token_ids: Tensor, weight: Tensor, scale: float, drawn: Tensor | None = None) -> Tensor:
    return weight.new_empty((token_ids.shape[0], weight.shape[1]))


_embedding = define(
    "embedding(Tensor token_ids, Tensor weight, float scale, Tensor? drawn=None) -> Tensor", reference.embedding, _fake
)

_check_embedding = compile_check(
    "embedding",
    TensorArg("token_ids", "T", INT32),
    TensorArg("weight", "V N", FLOAT),
    NonNegative("scale"),
    TensorArg("drawn", "R", INT32, optional=True),
)


def embedding(token_ids: Tensor, weight: Tensor, scale: float = 1.0, drawn: Tensor | None = None) -> Tensor:
    """Rows of `weight`, scaled: `round(weight[id] * scale)`.

    token_ids: (T) int32. weight: (V, N), bf16 or fp16, on the CPU also fp32. scale: finite, ≥ 0 (Gemma's is √N).
    drawn: (R) int32, tokens that only the device knows yet: an id t below 0 stands for drawn[-1 - t].

    Returns (T, N) in weight's dtype, contiguous. An id outside 0 ≤ id < V is a ValueError on the CPU and a row of zeros
    on the GPU, where its value is not read before the launch; one of `drawn` that is outside is a row of zeros on both.
    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    """
    _check_embedding(token_ids, weight, scale, drawn)
    if values_readable(token_ids):
        least = 0 if drawn is None else -drawn.shape[0]
        check_range("embedding", "token_ids", token_ids, least, weight.shape[0] - 1, "V - 1 from weight", weight)
    out: Tensor = _embedding(token_ids, weight, scale, drawn)
    return out
