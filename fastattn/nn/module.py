"""The base of our layers: a torch module that can say which checkpoint tensor goes where."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastattn.nn.shard import Shard


class Weight(NamedTuple):
    """name: in the checkpoint. out: the destination. shard: the part of the tensor that belongs there; None is all of it.
    stored_as: the types that it may have in the file, as safetensors names them; none: any that is numbers to round."""

    name: str
    out: torch.Tensor
    shard: Shard | None = None
    stored_as: tuple[str, ...] = ()

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The tensor's shape in the checkpoint."""
        shape = tuple(self.out.shape)
        return shape if self.shard is None else self.shard.full_shape(shape)


Weights = Iterator[Weight]


class Module(torch.nn.Module):
    """A layer whose ``weights(prefix)`` lists what it takes of a checkpoint.

    A destination may be a row slice of a fused weight (q, k and v in one matrix), so that a loader decodes each tensor
    straight to its final place and nothing is concatenated afterwards.

    batch_invariant: a token's results have the same bits whatever other tokens are computed with it, of its own sequence or of
    others (`DecoderModel.make_batch_invariant`).
    """

    batch_invariant = False

    def weights(self, prefix: str) -> Weights:
        for name, child in self.named_children():
            if isinstance(child, Module):
                yield from child.weights(f"{prefix}{name}.")


def empty_parameter(
    *shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> torch.nn.Parameter:
    """An uninitialized weight, in the default dtype on the default device if not given; inference only, so it never requires grad."""
    return torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)


def fixed_parameter(dtype: torch.dtype, *shape: int) -> torch.nn.Parameter:
    """The same with a dtype of its own, whatever the model's is."""
    return torch.nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
