"""Who holds which KV block. The arithmetic is in `_runtime`; here are the few decisions about it."""

from __future__ import annotations

from typing import NamedTuple

from fastattn._runtime import BlockPool, PrefixTree
from fastattn.engine.request import Request, Status

# A step with copies has one launch and one small transfer more, some 10 µs, whatever their number. An 8B model computes
# a token of a prompt in 27 µs at an H100's peak, so a few pay for it; fewer are what all prompts have in common.
MIN_COPIED_TOKENS = 4


class BlockCopy(NamedTuple):
    """The first num_tokens tokens of block ``source`` are to be copied to block ``target``."""

    source: int
    target: int
    num_tokens: int


class KVCacheManager:
    """Blocks for requests, out of one pool, with what finished requests computed kept in a prefix tree until it is needed.

    A block is free, or held by requests, or held by the tree, or by both (shared prefix), and then nobody writes to it: who
    shares only its beginning gets a copy.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.tree = PrefixTree(self.pool, block_size)
        self.enable_prefix_caching = enable_prefix_caching
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self._copies: list[BlockCopy] = []  # of requests that were let in; their sources are held until they are made

    def attach_prefix(self, request: Request) -> None:
        """Gives a request without blocks the cached blocks of its longest known prefix.

        At least one token is left to compute, since its logits are needed.
        """
        if not self.enable_prefix_caching or request.needs_every_token:
            return
        blocks = self.tree.match(request.salt, request.seq, len(request.seq) - 1)
        request.seq.add_blocks(blocks)
        request.seq.num_computed = len(blocks) * self.block_size

    def copy_beginning(self, request: Request) -> None:
        """Has the next tokens of a request that was let in copied, as many as another block begins with, if they are enough.
        They count as computed. They need no room: there is a block for the next token, and it takes them all.

        The other block is in the prefix tree, or it is where a sibling has the end of the prompt.
        """
        seq, first = request.seq, request.seq.num_computed
        if not self.enable_prefix_caching or request.needs_every_token:
            return
        index, least = first // self.block_size, MIN_COPIED_TOKENS
        # One token at least is left to compute, of the request and of the block.
        num_common = min(request.num_prompt_tokens - first, len(seq) - 1 - first, self.block_size - 1)
        sibling = self._block_of_sibling(request, index) if num_common >= least else None
        if sibling is not None:
            least = num_common + 1
        found = self.tree.match_partial(request.salt, seq, len(seq) - 1, least)
        if found is None and sibling is not None:
            self.pool.retain([sibling])
            found = sibling, num_common
        if found is not None:
            self._copies.append(BlockCopy(found[0], seq.blocks()[index], found[1]))
            seq.num_computed += found[1]

    def room(self, request: Request) -> int:
        """Tokens that can be computed before another block is needed."""
        return request.seq.num_blocks * self.block_size - request.seq.num_computed

    def _block_of_sibling(self, request: Request, index: int) -> int | None:
        """The block in which a sibling has computed that part of the prompt, if it is there when copies are made."""
        sibling = request.after
        if sibling is None or sibling.status is not Status.RUNNING or index >= sibling.seq.num_blocks:
            return None
        block = sibling.seq.blocks()[index]
        return None if any(copy.target == block for copy in self._copies) else block

    def take_copies(self) -> list[BlockCopy]:
        """What must be copied before the next step is computed. What is written to their sources later comes after."""
        copies, self._copies = self._copies, []
        self.pool.release([copy.source for copy in copies])
        return copies

    def count_lookup(self, request: Request) -> None:
        """Counts the prefix lookup of a request that was let in (one that has to wait looks again in the next step)."""
        self.num_queried_tokens += len(request.seq)
        self.num_hit_tokens += request.seq.num_computed

    def reserve(self, request: Request, num_tokens: int) -> bool:
        """Makes room for ``num_tokens`` more computed tokens; False, with nothing changed, if there are too few blocks."""
        short = num_tokens - self.room(request)
        if short <= 0:
            return True
        missing = -(-short // self.block_size)
        if (too_few := missing - self.pool.num_free) > 0:
            self.tree.evict(too_few)
        blocks = self.pool.allocate(missing)
        if blocks is None:
            return False
        request.seq.add_blocks(blocks)
        return True

    def remember(self, request: Request) -> None:
        """Lets others share the blocks that are now full. Call after the step that filled them.

        Not those of a request that takes no cached prefix: its last block would pin the cached twins of its first ones,
        and a request that fills the pool would wait for them for ever.
        """
        if self.enable_prefix_caching and not request.needs_every_token:
            self.tree.insert(request.salt, request.seq, request.seq.num_computed)

    def release(self, request: Request) -> None:
        """Takes all blocks from a request. What the tree also holds stays cached."""
        # Last block first, so that the pool hands out the ends of sequences before their beginnings.
        self.pool.release(request.seq.take_blocks()[::-1])

    def reset(self) -> int:
        """Forgets all cached prefixes; returns how many blocks became free."""
        return self.tree.clear()

    @property
    def num_usable_blocks(self) -> int:
        return self.pool.num_free + self.tree.num_evictable

    def check(self) -> None:
        self.pool.check()
        self.tree.check()
