"""What a user may ask of embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Pooling = Literal["mean", "last"]


@dataclass(frozen=True)
class PoolingParams:
    """In place of SamplingParams: one vector for the whole prompt, and no text.

    pooling: "mean" of the final hidden states of all tokens, or the "last" token's. normalize: to length 1 (L2).
    """

    pooling: Pooling = "mean"
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.pooling not in ("mean", "last"):
            raise ValueError(f"PoolingParams: pooling is {self.pooling!r}, allowed are 'mean' and 'last'")
        if not isinstance(self.normalize, bool):
            raise ValueError(f"PoolingParams: normalize is {self.normalize!r}, allowed are True and False")
