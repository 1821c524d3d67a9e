"""What a loader gives, whatever the file format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from fastattn.models.config import ModelConfig
from fastattn.models.loader.copier import Copier
from fastattn.models.tokenizer import Tokenizer
from fastattn.nn import Shard, Weight

# Types of codes, and of scales in 8 bits, that belong to quantized weights and are read as they are: bytes an element.
CODE_TYPES = {"I8": 1, "U8": 1, "I32": 4, "I64": 8, "F8_E4M3": 1, "F8_E8M0": 1}


@dataclass(frozen=True)
class TensorInfo:
    """shape as in Hugging Face's checkpoints; dtype: its name in the file ("Q4_1", "BF16"); nbytes: in the file."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int

    @property
    def is_codes(self) -> bool:
        return self.dtype in CODE_TYPES


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

    def read(self, name: str, out: torch.Tensor, shard: Shard | None = None, copier: Copier | None = None) -> None:
        """Decodes a tensor, or ``shard`` of it, into ``out``: of that shape, any device, any floating dtype; codes of
        quantized weights into an integer one.

        Only the shard is read from the file, as far as its format allows. copier: what copies; some of its kinds return before
        the numbers are there. None copies at once.
        """
        ...


def expected_shape(out: torch.Tensor, shard: Shard | None) -> tuple[int, ...]:
    """The shape that a tensor must have in the file so that ``out`` can take its shard."""
    return Weight("", out, shard).full_shape
