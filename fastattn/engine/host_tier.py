"""The second tier of the prefix cache: which blocks of host memory hold what left the device."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator

from fastattn._runtime import BlockPool

_TOKEN_BYTES = 4


class HostTier:
    """Blocks by the text that they end: a digest of salt and all tokens up to a block's last one. So a block is found whatever
    became of those before it, and another tenant's digests are others.

    A block that was brought back stays, and costs no copy when it leaves the device again. What `match` and `add` give is on
    its way, and kept until it is released.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.pool = BlockPool(num_blocks)
        self._block_bytes = block_size * _TOKEN_BYTES
        self._blocks: OrderedDict[bytes, int] = OrderedDict()  # least recently used first

    def match(self, salt: bytes, tokens: bytes, first: int) -> list[int]:
        """The blocks number ``first``, first + 1, … of a prompt, as far as they are here. tokens: int32. The caller releases
        them."""
        found: dict[bytes, int] = {}
        for digest in self._digests(salt, tokens, first):
            if digest not in self._blocks:
                break
            found[digest] = self._blocks[digest]
        self.pool.retain(blocks := list(found.values()))
        self._touch(found)
        return blocks

    def add(self, salt: bytes, tokens: bytes, num_blocks: int) -> list[int | None]:
        """Places for the last ``num_blocks`` blocks of a prefix, in order; the caller copies, then releases them. None for
        those that are here already, and for which there is no room: all others are on their way."""
        first = len(tokens) // self._block_bytes - num_blocks
        places: dict[bytes, int | None] = {}
        for digest in self._digests(salt, tokens, first):
            places[digest] = None
            if digest not in self._blocks and (block := self._allocate()) is not None:
                self._blocks[digest] = places[digest] = block
                self.pool.retain([block])
        self._touch(places)
        return list(places.values())

    def release(self, blocks: list[int]) -> None:
        self.pool.release(blocks)

    def clear(self) -> None:
        self.pool.release(list(self._blocks.values()))
        self._blocks.clear()

    @property
    def num_used(self) -> int:
        return self.pool.num_blocks - self.pool.num_free

    def check(self, on_their_way: Iterable[int]) -> None:
        """on_their_way: what was given by `match` and `add`, and not released. Raises RuntimeError if an invariant is broken."""
        self.pool.check()
        counts = Counter(self._blocks.values())
        if max(counts.values(), default=1) > 1:
            raise RuntimeError("invariant broken: a host block is of two prefixes")
        counts.update(on_their_way)
        for block in range(self.pool.num_blocks):
            if self.pool.ref_count(block) != counts[block]:
                raise RuntimeError(
                    f"invariant broken: host block {block} has {self.pool.ref_count(block)} references, not {counts[block]}"
                )

    def _allocate(self) -> int | None:
        blocks = self.pool.allocate(1)
        if blocks is None:
            digest = next((d for d, block in self._blocks.items() if self.pool.ref_count(block) == 1), None)
            if digest is None:
                return None
            self.pool.release([self._blocks.pop(digest)])
            blocks = self.pool.allocate(1)
            assert blocks is not None
        return blocks[0]

    def _touch(self, digests: Iterable[bytes]) -> None:
        # Last block first, so that ends of prefixes are forgotten before their beginnings.
        for digest in reversed(list(digests)):
            if digest in self._blocks:
                self._blocks.move_to_end(digest)

    def _digests(self, salt: bytes, tokens: bytes, first: int) -> Iterator[bytes]:
        """Of the blocks from ``first`` on. Not a hash that is merely fast: who could make two texts meet would be answered from
        another's."""
        digest = hashlib.blake2b(len(salt).to_bytes(8, "little") + salt, digest_size=32)
        start, view = first * self._block_bytes, memoryview(tokens)
        digest.update(view[:start])
        for at in range(start, len(tokens), self._block_bytes):
            digest.update(view[at : at + self._block_bytes])
            yield digest.digest()
