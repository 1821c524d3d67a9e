"""Tensor parallelism: a model cut across ranks, each of which holds a part of every matrix.

Matrices come in pairs. The first is cut by rows (a rank's heads, a rank's part of the MLP), the second by columns, so that
between the two nothing is exchanged and one sum over ranks ends the pair (Shoeybi et al., 2019).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch.distributed import Work

from fastattn.nn.shard import Shard, split, split_heads, split_unit

# Longer than kernels take to see that their exchange was given up.
_QUIT_SECONDS = 0.1


class CollectiveError(RuntimeError):
    """An exchange between ranks failed: another rank ended or is late."""


class Group(Protocol):
    """What we use of torch's `ProcessGroupGloo` and `ProcessGroupNCCL`, which we make ourselves: no process-wide state."""

    def allreduce(self, tensor: torch.Tensor) -> Work: ...
    def gather(self, output_tensors: Sequence[torch.Tensor], input_tensor: torch.Tensor, root: int) -> Work: ...
    def abort(self) -> None: ...


class TensorParallel:
    """One rank's place among the ranks that share a model, and what they exchange. Layers get it passed.

    group: None for one rank alone, or for a model that is only described and never run.
    on_exchange: called before each exchange, so that it can be seen which rank is late.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        group: Group | None = None,
        on_exchange: Callable[[], None] = lambda: None,
    ) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"TensorParallel: rank is {rank}, allowed is 0 to {size - 1}, one less than size")
        self.rank, self.size, self._group, self._on_exchange = rank, size, group, on_exchange
        self._drop_captures: list[Callable[[], None]] = []

    def shard(self, total: int, dim: int = 0) -> Shard:
        """This rank's part of a dimension."""
        return Shard(dim, *split(total, self.size, self.rank, split_unit(total, self.size)), total)

    def shard_heads(self, num_heads: int, num_kv_heads: int) -> tuple[Shard, Shard]:
        """This rank's query heads and KV heads (see `split_heads`)."""
        return split_heads(num_heads, num_kv_heads, self.size, self.rank)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place. x: contiguous, the same shape on each."""
        if self.size > 1 and x.numel():
            self._exchange(lambda group: group.allreduce(x))
        return x

    def gather_columns(self, x: torch.Tensor, total: int) -> torch.Tensor:
        """x (n, length of this rank's `shard(total)`) → (n, total) on rank 0, the only one that needs it; x on the others."""
        if self.size == 1:
            return x
        lengths = [split(total, self.size, rank, split_unit(total, self.size))[1] for rank in range(self.size)]
        if x.shape[0] == 0:
            return x.new_empty(0, total)
        # Messages have one size, that of the first part, which is the widest.
        x = torch.nn.functional.pad(x, (0, lengths[0] - x.shape[1]))
        parts = self.gather(x)
        return torch.cat([part[:, :n] for part, n in zip(parts, lengths, strict=True)], 1) if parts else x

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Each rank's x, contiguous and of one shape, on rank 0; nothing on the others."""
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else []
        self._exchange(lambda group: group.gather(parts, x, 0))
        return parts

    def captured(self, drop: Callable[[], None]) -> None:
        """Says how to drop the CUDA graphs that exchanges are recorded in: ``abort`` does. No graph may be replayed then.

        drop: must not hold what holds this object, or neither ever goes.
        """
        if self._group is not None:
            self._drop_captures.append(drop)

    def abort(self) -> None:
        """From another thread: gives up the exchange that is under way, and all later ones. May take long."""
        if self._group is None:
            return
        # It ends the kernels that run, and then NCCL waits for the last graph that has one of its own in it.
        aborting = threading.Thread(target=self._group.abort, name="fastattn-abort", daemon=True)
        with contextlib.suppress(RuntimeError):  # Python is ending, starts no thread any more, and no kernel runs
            aborting.start()
            aborting.join(_QUIT_SECONDS)
        for drop in self._drop_captures:
            drop()
        if aborting.ident is None:
            self._group.abort()
        else:
            aborting.join()

    def _exchange(self, start: Callable[[Group], Work]) -> None:
        if self._group is None:
            raise CollectiveError(f"rank {self.rank} of {self.size} has no group to exchange with")
        self._on_exchange()
        try:
            start(self._group).wait()
        except RuntimeError as error:
            raise CollectiveError(f"rank {self.rank}: {error}") from error


ALONE = TensorParallel()
