"""What the operators that write and read the paged cache ask of it, and of the scales of one of 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.checks import FP8, FP32, KV_CACHE, TensorArg, fail_type, fail_value, values_readable


def cache_args(mutated: bool) -> tuple[TensorArg, TensorArg]:
    return (
        TensorArg("k_cache", "num_blocks block_size Hk D", KV_CACHE, mutated=mutated),
        TensorArg("v_cache", "like k_cache", "k_cache", mutated=mutated),
    )


def scale_args(mutated: bool) -> tuple[TensorArg, TensorArg]:
    k_scale, v_scale = (
        TensorArg(f"{name}_scale", "... Hk", FP32, optional=True, mutated=mutated, any_strides=True) for name in "kv"
    )
    return k_scale, v_scale


def check_cache(op: str, q: Tensor, k_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """That the caches have q's dtype, or 8 bits, and then their scales one of the two shapes."""
    if k_cache.dtype is FP8 or k_cache.dtype is torch.int8:
        if k_cache.shape[3] % 16 != 0 or k_cache.shape[3] > 256:
            fail_value(
                op,
                f"k_cache has shape {tuple(k_cache.shape)}, expected D a multiple of 16 up to 256 in {k_cache.dtype}",
            )
        if k_cache.dtype is torch.int8 and k_scale is None and v_scale is None:
            fail_value(op, "k_scale is None and k_cache is torch.int8, expected its scales")
    elif k_cache.dtype is not q.dtype:
        fail_type(op, f"k_cache is {k_cache.dtype}, expected {q.dtype} as q, {FP8} or torch.int8")
    elif k_scale is not None or v_scale is not None:
        name = "k_scale" if k_scale is not None else "v_scale"
        fail_value(op, f"{name} is given and k_cache is {k_cache.dtype}, expected it only with {FP8} or torch.int8")
    if (k_scale is None) != (v_scale is None):
        given, lacks = ("k_scale", "v_scale") if v_scale is None else ("v_scale", "k_scale")
        fail_value(op, f"{given} is given and {lacks} is None, expected both or neither")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None or k_scale is None:
            continue
        of_tokens = k_cache.shape[:3]
        if scale.dim() != 1 and scale.shape != of_tokens:
            fail_value(
                op,
                f"{name} has shape {tuple(scale.shape)}, expected (Hk) = ({of_tokens[2]},) or (num_blocks, block_size, Hk) "
                f"= {tuple(of_tokens)} from k_cache",
            )
        if scale.dim() != k_scale.dim():
            fail_value(op, f"{name} has shape {tuple(scale.shape)}, expected {tuple(k_scale.shape)} as k_scale")
        if scale.dim() == 1 and values_readable(scale) and not bool((scale > 0).all()):
            fail_value(op, f"{name} has values down to {float(scale.min())}, expected them to be positive")
