"""The table of rotary angles (Su et al., 2021), with the frequency scalings that published models use."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fastattn.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, rotary_dim: int) -> torch.Tensor:
    """Angular frequency per pair, (rotary_dim / 2,) fp32, after the model's scaling rule."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.freq_factors is not None:
        return frequencies / torch.tensor(rope.freq_factors, dtype=torch.float32)
    if rope.scaling_type == "linear":
        return frequencies / rope.factor
    if rope.scaling_type == "llama3":
        # Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, the band between is blended.
        wavelengths = 2 * math.pi / frequencies
        low, high = rope.low_freq_factor, rope.high_freq_factor
        smooth = (rope.original_max_position / wavelengths - low) / (high - low)
        blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
        scaled = torch.where(wavelengths > rope.original_max_position / low, frequencies / rope.factor, blended)
        return torch.where(wavelengths < rope.original_max_position / high, frequencies, scaled)
    if rope.scaling_type == "yarn":
        # YaRN (Peng et al., 2023): pairs that turn fewer than beta_slow times in the original context are stretched by
        # `factor`, those that turn more than beta_fast times kept, the band between is blended.
        first, last = (_pair_that_turns(turns, rope, rotary_dim) for turns in (rope.beta_fast, rope.beta_slow))
        if rope.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rotary_dim - 1)
        ramp = ((torch.arange(rotary_dim // 2) - first) / max(last - first, 0.001)).clamp(0, 1)
        return frequencies / rope.factor * ramp + frequencies * (1 - ramp)
    return frequencies


def _pair_that_turns(turns: float, rope: RopeConfig, rotary_dim: int) -> float:
    """The pair whose angle goes round so many times in the original context, as a fraction between two."""
    return rotary_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def rotary_table(rope: RopeConfig, rotary_dim: int, num_positions: int) -> torch.Tensor:
    """(num_positions, rotary_dim) fp32 on the CPU: cosines in the first half of a row, sines in the second."""
    angles = torch.arange(num_positions).float()[:, None] * inverse_frequencies(rope, rotary_dim)
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * rope.attention_factor
