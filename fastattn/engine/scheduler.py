"""Which request gets how many tokens in the next step. Knows no torch; the same arrivals give the same steps."""

from __future__ import annotations

from fastattn._runtime import ScheduledBatch
from fastattn.engine.config import EngineConfig
from fastattn.engine.kv_cache import KVCacheManager
from fastattn.engine.outputs import FinishReason
from fastattn.engine.request import Request, Status
from fastattn.engine.scheduled import Scheduled
from fastattn.engine.waiting import OUTPUT_COST, PROMPT_COST, FairQueue, OrderedQueue, WaitingQueue

# A token that comes back from the host takes an eighth of the time of one that is computed: 2.7 µs and 21 µs of an 8B model
# on an H200. So a step that brings much back lets fewer others in.
BROUGHT_BACK_PER_COMPUTED = 8


class Scheduler:
    """Continuous batching with chunked prefill and preemption. What a preempted request had computed stays in the prefix
    cache, in both tiers, as long as there is room; what is not there any more is computed again.

    ``schedule()`` returns {request: number of tokens}. A decode is a request with one pending token, a prefill one with
    many, a preempted request one whose tokens are all pending again, and drafts to verify are tokens more than are pending:
    amounts, not modes.
    """

    def __init__(self, config: EngineConfig, kv: KVCacheManager) -> None:
        self.config = config
        self.kv = kv
        self._is_fair = config.policy == "fair"
        self.waiting: WaitingQueue = FairQueue() if self._is_fair else OrderedQueue(config.max_waiting_steps)
        self.num_waiting = 0
        self._num_gone = 0  # ended while they waited, since the queue was told to forget such
        self.running: list[Request] = []  # in the order of `sort_key`
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        request.status = Status.WAITING
        self.num_waiting += 1
        self.waiting.push(request)

    def schedule(self) -> Scheduled:
        self.waiting.next_step()
        # Decodes first: somebody is reading their stream.
        scheduled, decodes, others = self._schedule_decodes()
        budget = self.config.max_num_batched_tokens - len(scheduled)
        preempted = False
        num_decodes = sum(r.seq.num_pending == 1 for r in others)
        for request in others:
            num_decodes = max(0, num_decodes - 1)  # those behind it
            if request.status is not Status.RUNNING:  # preempted for one before it
                continue
            num_tokens = min(request.seq.num_pending, budget)
            if num_tokens == 0:
                break
            if request.seq.num_drafts > 0:
                num_tokens += self._num_drafts(request, budget - num_tokens - num_decodes)
            while not self.kv.reserve(request, num_tokens):
                victim = self.running[-1]
                budget += scheduled.pop(victim, 0)
                self._preempt(victim)
                preempted = True
                if victim is request:
                    break
            if request.status is Status.RUNNING:
                scheduled[request] = num_tokens
                budget -= num_tokens
        # After a preemption nobody new is let in: the blocks would be taken from those who just gave way.
        if not preempted:
            self._admit(scheduled, budget)
        if decodes is not None and not preempted and len(scheduled) == len(decodes):
            scheduled.batch = decodes  # nobody else is in the step
        return scheduled

    def _schedule_decodes(self) -> tuple[Scheduled, ScheduledBatch | None, list[Request]]:
        """One token of each running request that has one to compute, all of them at once, and who else has some to compute. If
        they have drafts, or there is no room for all, those are all, to be looked at one by one, decodes first.

        Of who has nothing to compute the token that is being drawn is the last.
        """
        running = self.running
        batch, rest = ScheduledBatch.of_decodes([request.seq for request in running])
        others = [running[i] for i in rest]
        has_drafts = any(r.seq.num_pending == 1 for r in others)
        if has_drafts or len(batch) > self.config.max_num_batched_tokens or not self.kv.reserve_decodes(batch):
            decodes = [r for r in running if r.seq.num_pending == 1]
            return Scheduled(), None, [*decodes, *(r for r in running if r.seq.num_pending > 1)]
        scheduled = Scheduled(dict.fromkeys(running, 1))
        for request in others:
            del scheduled[request]
        return scheduled, batch, [r for r in others if r.seq.num_pending > 1]

    def _num_drafts(self, request: Request, room: int) -> int:
        """How many of its drafts a decode may bring: what others need comes first, in the step and in the cache."""
        num_drafts = min(request.seq.num_drafts, max(0, room))
        return num_drafts if self.kv.reserve(request, 1 + num_drafts) else 0

    def _admit(self, scheduled: Scheduled, budget: int) -> None:
        held_back, num_before = [], len(self.running)
        while budget > 0 and len(self.running) < self.config.max_num_seqs:
            request = self.waiting.first()
            if request is None:
                break
            if request.must_wait_for_sibling:
                held_back.append(self.waiting.pop_first())
                continue
            self.kv.attach_prefix(request)
            num_tokens = min(request.num_pending_tokens, budget)
            fits_step = num_tokens == request.num_pending_tokens or self.config.enable_chunked_prefill
            if not fits_step or not self.kv.reserve(request, num_tokens):
                self.kv.release(request)
                break
            self.waiting.pop_first()
            self.num_waiting -= 1
            num_brought_back = self.kv.bring_back(request)
            self.kv.copy_beginning(request)
            num_tokens = min(num_tokens, request.num_pending_tokens, self.kv.room(request))
            self.kv.count_lookup(request)
            if request.metrics.num_preemptions == 0:
                request.num_cached_tokens = request.seq.num_computed
                # All of the prompt at once, so that the next of this tenant is not let in on credit.
                self.waiting.charge(request, PROMPT_COST * request.num_pending_tokens)
                request.num_charged = len(request.seq)
            request.status = Status.RUNNING
            self.running.append(request)
            scheduled[request] = num_tokens
            budget -= num_tokens + num_brought_back // BROUGHT_BACK_PER_COMPUTED
        for request in held_back:
            self.waiting.put_back(request)
        if len(self.running) > num_before:
            self.running.sort(key=lambda r: r.sort_key)

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.kv.release(request)
        request.metrics.num_preemptions += 1
        self.num_preemptions += 1
        self.add(request)

    def advance(self, scheduled: Scheduled) -> None:
        """The step was computed: its tokens' KV is in the cache now. Call before the sampled tokens are appended.

        Drafts are no tokens yet. What was computed of those that are rejected lies past `num_computed` and is overwritten.
        """
        filled = scheduled.batch.advance(self.config.block_size)
        if self.config.enable_prefix_caching:
            for index in filled:
                self.kv.remember(scheduled.requests[index])
        if self._is_fair:
            for request in scheduled:
                self._charge(request)

    def accept(self, request: Request) -> None:
        """The token that was appended last was a draft of the step, so its KV is in the cache already."""
        request.seq.num_computed += 1
        if request.seq.num_computed % self.config.block_size == 0:
            self.kv.remember(request)
        self._charge(request)

    def _charge(self, request: Request) -> None:
        # What is computed again after a preemption is not paid for again.
        if (new := request.seq.num_computed - request.num_charged) > 0:
            self.waiting.charge(request, OUTPUT_COST * new)
            request.num_charged += new

    def finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends a request wherever it stands and takes its blocks back."""
        if request.status is Status.FINISHED:
            return
        if request.status is Status.RUNNING:
            self.running.remove(request)
        else:
            self.num_waiting -= 1
            self._num_gone += 1
        self.kv.release(request)
        request.seq.end()
        request.status = Status.FINISHED
        if self._num_gone > self.num_waiting + 64:  # so that what is kept of them is never the most
            self.waiting.forget_ended()
            self._num_gone = 0
        request.finish_reason, request.stop_reason = reason, stop_reason
