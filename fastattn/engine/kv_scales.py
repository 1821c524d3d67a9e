"""Where the static scales of a KV cache of 8 bits come from, and what is said when they come from nowhere."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from fastattn import nn
from fastattn.models.loader import ModelSource
from fastattn.models.loader.kv_scales import is_kv_scale, read_kv_scales, read_kv_scales_file

logger = logging.getLogger("fastattn.engine")


def choose_kv_cache(scales: str, dtype: str, source: ModelSource) -> tuple[str, str]:
    """The options kv_cache_scales and kv_cache_dtype, with what is left to the model decided: a checkpoint that was quantized for a
    KV cache of 8 bits (`kv_cache_scheme`) gets that, with its static scales where it has some.

    Raises ValueError for values that are none, or that do not go together with this model.
    """
    nn.check_kv_cache_dtype(dtype)
    scheme, has_scales = source.config.kv_cache_scheme, any(map(is_kv_scale, source.tensors()))
    follows = dtype == "auto" and scheme is not None
    if follows:
        dtype = str(scheme)
    if scales == "auto":
        scales = "checkpoint" if follows and has_scales else "dynamic"
    nn.check_kv_cache_scales(scales, dtype)
    if follows:
        logger.info(
            "%s: the KV cache is in %s, as its kv_cache_scheme asks for, with kv_cache_scales=%r; kv_cache_dtype='bfloat16', or what "
            "the model's dtype is, keeps 16 bits",
            source.name, dtype, scales,
        )  # fmt: skip
    return scales, dtype


def check_kv_scales(scales: str, dtype: str, source: ModelSource) -> None:
    """Before anything is loaded: raises ValueError if what the options kv_cache_scales and kv_cache_dtype ask for cannot be had
    of this model, and says so if it has scales that stay unused."""
    nn.check_kv_cache_scales(scales, dtype)
    made_for = source.config.kv_cache_scheme or "fp8"  # only fp8's come without a word in config.json
    has_scales = any(map(is_kv_scale, source.tensors()))
    if scales == "checkpoint":
        if has_scales and made_for != dtype.removesuffix("_e4m3"):
            raise ValueError(
                f"kv_cache_scales is 'checkpoint' with kv_cache_dtype {dtype!r}, allowed is {made_for!r}: "
                f"{source.name} has scales for that"
            )
        if not has_scales and dtype == "int8":
            raise ValueError(
                f"kv_cache_scales is 'checkpoint' with kv_cache_dtype 'int8', allowed are 'dynamic' and 'calculate': "
                f"{source.name} has no scales"
            )
    elif has_scales:
        logger.info(
            "%s: its static scales for a KV cache in %s are not used; kv_cache_dtype=%r with kv_cache_scales='checkpoint' uses them",
            source.name, made_for, made_for,
        )  # fmt: skip


def load_kv_scales(
    scales: str, dtype: str, source: ModelSource, tp: nn.TensorParallel = nn.ALONE
) -> torch.Tensor | None:
    """The static scales of this rank's KV heads, (num_layers, 2, num_kv_heads) fp32 on the CPU, 1 where a model lacks them. None
    if they are dynamic or yet to be calculated. Raises ValueError for a file that is damaged, or that int8 would need whole."""
    if scales in ("dynamic", "calculate"):
        return None
    config = source.config
    _, kv_heads = tp.shard_heads(config.num_heads, config.num_kv_heads)
    if scales == "checkpoint":
        found, where = read_kv_scales(source, kv_heads), source.name
    else:
        found, where = read_kv_scales_file(Path(scales), config, kv_heads), scales
    missing = found.isnan().any(-1)
    if dtype == "int8" and bool(missing.any()):
        raise ValueError(f"{where}: {int(missing.sum())} of {missing.numel()} scales are missing, which int8 needs")
    found = found.nan_to_num(1.0)
    if tp.rank == 0:
        warn_of_ones(found, where)
    return found


def warn_of_ones(scales: torch.Tensor, where: str) -> None:
    """Says once how many of the layers' scales (num_layers, 2, num_kv_heads) are 1, which nobody chooses."""
    ones = int((scales == 1).any(-1).sum())
    if ones:
        logger.warning(
            "%d of the %d static scales of the KV cache are 1 (%s): numbers beyond an 8-bit cache's largest would be cut, and "
            "small ones lost; use kv_cache_scales='calculate' or 'dynamic'",
            ones, scales.shape[0] * 2, where,
        )  # fmt: skip
