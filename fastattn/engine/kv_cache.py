"""Who holds which KV block. The arithmetic is in `_runtime`; here are the few decisions about it."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from fastattn._runtime import BlockPool, PrefixTree, ScheduledBatch
from fastattn.engine.host_tier import HostTier
from fastattn.engine.request import Request, Status

# A step with copies has one launch and one small transfer more, some 10 µs, whatever their number. An 8B model computes
# a token of a prompt in 27 µs at an H100's peak, so a few pay for it; fewer are what all prompts have in common.
MIN_COPIED_TOKENS = 4

# With a second tier so many are evicted together, if that is a small part of the cache: they share the hash of their prefix
# and the launch of their copies, and what is wanted again comes back.
_EVICTED_TOGETHER, _EVICTED_SHARE = 16, 64


class Route(IntEnum):
    """Where a copy goes. Those of a step are made in this order: what leaves is saved before it is overwritten, and what came
    back may be copied on."""

    TO_HOST = 0
    FROM_HOST = 1
    WITHIN = 2


class BlockCopy(NamedTuple):
    """The first num_tokens tokens of block ``source`` are to be copied to block ``target``."""

    source: int
    target: int
    num_tokens: int
    route: Route = Route.WITHIN


class KVCacheManager:
    """Blocks for requests, out of one pool, with what finished requests computed kept in a prefix tree until it is needed.

    A block is free, or held by requests, or held by the tree, or by both (shared prefix), and then nobody writes to it: who
    shares only its beginning gets a copy. With a second tier in host memory (num_host_blocks), what is evicted is copied
    there, and back when a prompt has it, or a preempted request that goes on.
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True, num_host_blocks: int = 0
    ) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.tree = PrefixTree(self.pool, block_size)
        self.host = HostTier(num_host_blocks, block_size) if num_host_blocks > 0 else None
        self.enable_prefix_caching = enable_prefix_caching
        self.num_queried_tokens = 0
        self.num_hit_tokens = self.num_host_hit_tokens = 0
        self.num_blocks_to_host = self.num_blocks_from_host = 0
        # For the next step. What they read, and their places on the host, are held until they are taken; evicted blocks are
        # not: nothing is written to them before.
        self._copies: list[BlockCopy] = []

    def attach_prefix(self, request: Request) -> None:
        """Gives a request without blocks the cached blocks of its longest known prefix.

        At least one token is left to compute, since its logits are needed.
        """
        if not self.enable_prefix_caching or request.needs_every_token:
            return
        seq = request.seq
        blocks = self.tree.match(request.salt, seq, len(seq) - 1)
        seq.add_blocks(blocks)
        whole = (len(seq) - 1) // self.block_size
        if self.host is not None and len(blocks) < whole:
            request.host_blocks = self.host.match(request.salt, seq.token_bytes(whole * self.block_size), len(blocks))
        seq.num_computed = (len(blocks) + len(request.host_blocks)) * self.block_size

    def bring_back(self, request: Request) -> int:
        """Has the blocks of a request that was let in copied from the host, to those that it was given for them. Returns how
        many tokens they have. Others may share them in the same step: copies come first."""
        count, seq = len(request.host_blocks), request.seq
        if count == 0:
            return 0
        end = seq.num_computed // self.block_size
        for source, target in zip(request.host_blocks, seq.blocks()[end - count : end], strict=True):
            self._copies.append(BlockCopy(source, target, self.block_size, Route.FROM_HOST))
        request.host_blocks = []
        self.num_host_hit_tokens += count * self.block_size
        self.tree.insert(request.salt, seq, seq.num_computed)
        return count * self.block_size

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
        """What must be copied before the next step is computed, in the order of `Route`. What is written to their sources
        later comes after."""
        copies, self._copies = sorted(self._copies, key=lambda copy: copy.route), []
        self.pool.release([copy.source for copy in copies if copy.route is Route.WITHIN])
        if self.host is not None:
            self.host.release(_host_blocks(copies))
            self.num_blocks_to_host += sum(copy.route is Route.TO_HOST for copy in copies)
            self.num_blocks_from_host += sum(copy.route is Route.FROM_HOST for copy in copies)
        return copies

    def lose_copies(self, copies: list[BlockCopy]) -> None:
        """The step that was to make these failed. What others would read from their targets may not be there."""
        if any(copy.route is not Route.WITHIN for copy in copies):
            self.reset()

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
            self._evict(too_few)
        blocks = self.pool.allocate(missing)
        if blocks is None:
            return False
        request.seq.add_blocks(blocks)
        return True

    def reserve_decodes(self, batch: ScheduledBatch) -> bool:
        """Makes room for one more token of each; False, with no blocks given out, if there are too few."""
        missing = self.pool.grow(batch, self.block_size)
        if missing > 0:
            self._evict(missing)
            missing = self.pool.grow(batch, self.block_size)
        return missing == 0

    def _evict(self, num_blocks: int) -> None:
        if self.host is None:
            self.tree.evict(num_blocks)
            return
        together = min(_EVICTED_TOGETHER, self.pool.num_blocks // _EVICTED_SHARE)
        for salt, tokens, blocks in self.tree.evict_runs(max(num_blocks, together)):
            for block, place in zip(blocks, self.host.add(salt, tokens, len(blocks)), strict=True):
                if place is not None:
                    self._copies.append(BlockCopy(block, place, self.block_size, Route.TO_HOST))

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
        if self.host is not None:
            self.host.release(request.host_blocks)
            request.host_blocks = []

    def reset(self) -> int:
        """Forgets all cached prefixes, in both tiers; returns how many of the device's blocks became free."""
        if self.host is not None:
            self.host.clear()
        return self.tree.clear()

    @property
    def num_usable_blocks(self) -> int:
        return self.pool.num_free + self.tree.num_evictable

    def check(self) -> None:
        self.pool.check()
        self.tree.check()
        if self.host is not None:
            self.host.check(_host_blocks(self._copies))


def _host_blocks(copies: list[BlockCopy]) -> list[int]:
    sides = {Route.TO_HOST: 1, Route.FROM_HOST: 0}
    return [copy[sides[copy.route]] for copy in copies if copy.route in sides]
