"""What a loader gives, whatever the file format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from fastattn.models.config import ModelConfig
from fastattn.models.tokenizer import Tokenizer
from fastattn.nn import Shard, Weight


@dataclass(frozen=True)
class TensorInfo:
    """shape as in Hugging Face's checkpoints; dtype: its name in the file ("Q4_1", "BF16"); nbytes: in the file."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class ModelSource(Protocol):
    """An opened model. Nothing but headers is read until ``read`` is called."""

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> ModelConfig: ...
    def tokenizer(self) -> Tokenizer: ...
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name in Hugging Face's checkpoints → what is stored."""
        ...

    def read(self, name: str, out: torch.Tensor, shard: Shard | None = None) -> None:
        """Decodes a tensor, or ``shard`` of it, into ``out``: of that shape, any floating dtype, any device.

        Only the shard is read from the file, as far as its format allows.
        """
        ...


def expected_shape(out: torch.Tensor, shard: Shard | None) -> tuple[int, ...]:
    """The shape that a tensor must have in the file so that ``out`` can take its shard."""
    return Weight("", out, shard).full_shape
