"""Which part of a checkpoint tensor a rank holds. Plain data: layers describe it, loaders and memory plans read it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """Entries ``start`` up to ``start + length`` of dimension ``dim``, which has ``total`` of them in the checkpoint.

    A length of 0 is a tensor that this rank does not need.
    """

    dim: int
    start: int
    length: int
    total: int

    @classmethod
    def whole(cls, total: int, dim: int = 0) -> Shard:
        return cls(dim, 0, total, total)

    def times(self, count: int) -> Shard:
        """The same part where each entry is ``count`` of them: heads → rows."""
        return Shard(self.dim, self.start * count, self.length * count, self.total * count)

    def over(self, count: int) -> Shard:
        """The same part where ``count`` entries are one: rows → groups with a scale each, packed words."""
        for value in (self.start, self.length, self.total):
            if value % count:
                raise ValueError(f"{self} does not begin and end at multiples of {count}")
        return Shard(self.dim, self.start // count, self.length // count, self.total // count)

    def full_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The checkpoint tensor's shape, from that of the part."""
        return (*shape[: self.dim], self.total, *shape[self.dim + 1 :])

    @property
    def slices(self) -> tuple[slice, ...]:
        """What selects the part: ``tensor[shard.slices]``."""
        return (*(slice(None),) * self.dim, slice(self.start, self.start + self.length))


def split(total: int, parts: int, index: int, unit: int = 1) -> tuple[int, int]:
    """(start, length) of part ``index``. Parts are whole units, but for a short last one, and the larger ones come first."""
    units = -(-total // unit)
    share, rest = divmod(units, parts)
    start = index * share + min(index, rest)
    end = start + share + (index < rest)
    return min(start * unit, total), min(end * unit, total) - min(start * unit, total)


def split_unit(total: int, parts: int) -> int:
    """The coarsest unit, up to 128, that leaves no part empty: tiles of a GEMM and groups of a quantized weight stay whole."""
    return next(unit for unit in (128, 64, 32, 16, 8, 4, 2, 1) if -(-total // unit) >= parts or unit == 1)


def split_heads(num_heads: int, num_kv_heads: int, parts: int, index: int) -> tuple[Shard, Shard]:
    """The query heads and the KV heads of part ``index``, as entries of dimension 0.

    Up to as many parts as KV heads: each has whole groups (a KV head with its queries), some one group more than others, so
    that 3 groups are cut in 2 without padding. With more parts a KV head is replicated in several, which share its queries;
    the last KV heads get the additional parts, so the first part is never smaller than another.
    """
    group = num_heads // num_kv_heads
    if parts <= num_kv_heads:
        kv_start, kv_length = split(num_kv_heads, parts, index)
        return (
            Shard(0, kv_start * group, kv_length * group, num_heads),
            Shard(0, kv_start, kv_length, num_kv_heads),
        )
    share, rest = divmod(parts, num_kv_heads)
    first = 0  # part of this KV head
    for head in range(num_kv_heads):
        count = share + (head >= num_kv_heads - rest)
        if index < first + count:
            start, length = split(group, count, index - first)
            return Shard(0, head * group + start, length, num_heads), Shard(0, head, 1, num_kv_heads)
        first += count
    raise AssertionError(f"part {index} of {parts}")
