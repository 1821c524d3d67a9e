"""The scheduler by itself: no model, no torch, steps that are only counted."""

from __future__ import annotations

import random
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn._runtime import TokenSequence
from fastattn.engine import waiting
from fastattn.engine.config import EngineConfig
from fastattn.engine.kv_cache import MIN_COPIED_TOKENS, KVCacheManager, Route
from fastattn.engine.outputs import RequestMetrics
from fastattn.engine.request import Request, Status
from fastattn.engine.sampling_params import SamplingParams
from fastattn.engine.scheduler import BROUGHT_BACK_PER_COMPUTED, Scheduler

BLOCK = 8
Prefix = tuple[bytes, tuple[int, ...]]


class Simulation:
    """Schedules requests whose every output token is a counter."""

    def __init__(self, **options: Any) -> None:
        defaults = {"max_model_len": 128, "num_kv_blocks": 64, "block_size": BLOCK, "max_num_batched_tokens": 32}
        self.config = EngineConfig(**{**defaults, "max_num_seqs": 8, **options})
        self.kv = KVCacheManager(
            self.config.num_kv_blocks, BLOCK, self.config.enable_prefix_caching, self.config.num_host_kv_blocks
        )
        self.scheduler = Scheduler(self.config, self.kv)
        self.arrivals, self.tokens = count(), count(1000)
        self.num_copied = 0
        # Slot -> the tokens whose last one has its keys and values there; on the device, and on the host.
        self.memory: dict[int, Prefix] = {}
        self.host_memory: dict[int, Prefix] = {}

    def add(
        self,
        prompt: int | list[int],
        outputs: int = 4,
        priority: int = 0,
        after: Request | None = None,
        tenant: bytes = b"",
    ) -> Request:
        tokens = [next(self.tokens) for _ in range(prompt)] if isinstance(prompt, int) else prompt
        request = Request(
            request_id=str(arrival := next(self.arrivals)),
            index=0,
            params=SamplingParams(max_tokens=outputs),
            num_prompt_tokens=len(tokens),
            max_output_tokens=outputs,
            seq=TokenSequence(tokens),
            seed=0,
            arrival=arrival,
            priority=priority,
            salt=tenant,
            stop_token_ids=frozenset(),
            metrics=RequestMetrics(arrival_time=0.0),
            after=after,
        )
        self.scheduler.add(request)
        return request

    def step(self) -> dict[Request, int]:
        """One step; every rule that holds for all steps is checked here."""
        scheduled = self.scheduler.schedule()
        assert sum(scheduled.values()) <= self.config.max_num_batched_tokens
        assert len(scheduled) <= len(self.scheduler.running) <= self.config.max_num_seqs
        for request, num_tokens in scheduled.items():
            assert request.status is Status.RUNNING
            assert 1 <= num_tokens <= request.num_pending_tokens
            assert request.seq.num_blocks * BLOCK >= request.seq.num_computed + num_tokens
        self.kv.check()
        self.compute(scheduled)
        self.scheduler.advance(scheduled)
        for request in scheduled:
            if request.num_pending_tokens == 0:
                request.seq.append(token := next(self.tokens))
                request.output_token_ids.append(token)
                if len(request.output_token_ids) == request.max_output_tokens:
                    self.scheduler.finish(request, "length")
        return scheduled

    def compute(self, scheduled: dict[Request, int]) -> None:
        """What the step does to the cache: copies, then each request's tokens, of which all before them are read."""
        copies = self.kv.take_copies()
        assert [copy.route for copy in copies] == sorted(copy.route for copy in copies)
        places = {
            Route.TO_HOST: (self.memory, self.host_memory),
            Route.FROM_HOST: (self.host_memory, self.memory),
            Route.WITHIN: (self.memory, self.memory),
        }
        for route, (source, target) in places.items():
            of_route = [copy for copy in copies if copy.route is route]
            assert len({copy.target for copy in of_route}) == len(of_route)
            if route is Route.WITHIN:
                assert not {copy.target for copy in of_route} & {copy.source for copy in of_route}
                assert all(MIN_COPIED_TOKENS <= copy.num_tokens < BLOCK for copy in of_route)
                self.num_copied += sum(copy.num_tokens for copy in of_route)
            else:
                assert all(copy.num_tokens == BLOCK for copy in of_route)
            for copy in of_route:
                for offset in range(copy.num_tokens):
                    target[copy.target * BLOCK + offset] = source[copy.source * BLOCK + offset]
        for request, num_tokens in scheduled.items():
            blocks, tokens = request.seq.blocks(), request.seq.tokens()
            for position in range(request.seq.num_computed + num_tokens):
                slot, prefix = blocks[position // BLOCK] * BLOCK + position % BLOCK, tuple(tokens[: position + 1])
                if position >= request.seq.num_computed:
                    self.memory[slot] = (request.salt, prefix)
                assert self.memory[slot] == (request.salt, prefix)

    def drain(self, most: int = 10_000) -> int:
        steps = 0
        while self.scheduler.running or self.scheduler.num_waiting:
            assert self.step(), "a step in which nothing moves"
            steps += 1
            assert steps < most
        assert self.kv.num_usable_blocks == self.config.num_kv_blocks
        self.kv.check()
        return steps


def test_a_long_prompt_is_cut_into_chunks_and_decodes_go_first() -> None:
    sim = Simulation()
    short = sim.add(5, outputs=10)
    assert sim.step() == {short: 5}
    long = sim.add(70)
    assert sim.step() == {short: 1, long: 31}
    assert sim.step() == {short: 1, long: 31}
    assert sim.step() == {short: 1, long: 8}
    assert sim.step() == {short: 1, long: 1}


def test_without_chunks_a_prompt_waits_for_a_step_that_holds_it() -> None:
    sim = Simulation(enable_chunked_prefill=False, max_num_batched_tokens=128)
    first, second = sim.add(100), sim.add(40)
    assert sim.step() == {first: 100}
    assert sim.step() == {first: 1, second: 40}


def test_nobody_overtakes_the_first_in_the_queue() -> None:
    sim = Simulation(num_kv_blocks=16, max_num_batched_tokens=128)
    big = sim.add(100, outputs=20)
    sim.step()
    blocked, small = sim.add(60), sim.add(8)  # there is room for the small one alone
    assert list(sim.step()) == [big]
    assert blocked.status is small.status is Status.WAITING


def test_the_most_recent_gives_way_and_comes_back_with_all_its_tokens() -> None:
    sim = Simulation(num_kv_blocks=4, max_model_len=32, enable_prefix_caching=False)
    first, second = sim.add(15, outputs=12), sim.add(15, outputs=12)
    assert sim.step() == {first: 15, second: 15}
    assert sim.step() == {first: 1, second: 1}
    assert sim.step() == {first: 1}  # both need a third block and there is none
    assert (second.status, second.seq.num_blocks, second.num_pending_tokens) == (Status.WAITING, 0, 17)
    assert (first.metrics.num_preemptions, second.metrics.num_preemptions, sim.scheduler.num_preemptions) == (0, 1, 1)
    sim.drain()
    assert len(first.output_token_ids) == len(second.output_token_ids) == 12


def test_a_more_urgent_request_is_the_last_to_give_way() -> None:
    sim = Simulation(num_kv_blocks=4, max_model_len=32, policy="priority", enable_prefix_caching=False)
    calm, urgent = sim.add(15, outputs=12, priority=1), sim.add(15, outputs=12, priority=0)
    for _ in range(3):
        sim.step()
    assert (calm.status, urgent.status) == (Status.WAITING, Status.RUNNING)


def test_urgent_requests_are_let_in_first() -> None:
    sim = Simulation(max_num_seqs=1)
    requests = {priority: sim.add(4, outputs=1, priority=priority) for priority in (3, 1, 2)}
    assert [list(sim.step()) for _ in range(3)] == [[requests[p]] for p in (1, 2, 3)]


def test_a_prefix_is_computed_once() -> None:
    sim = Simulation()
    prompt = list(range(30))
    sim.add(prompt)
    sim.drain()
    again = sim.add([*prompt, 99])
    assert sim.step() == {again: 1}  # three full blocks, and six tokens of the fourth
    assert again.num_cached_tokens == 30
    whole = sim.add(prompt[:24])
    assert sim.step()[whole] == 1  # the third block again, but for its last token, as a copy
    assert whole.num_cached_tokens == 23


@pytest.mark.parametrize("num_equal", range(9))
def test_a_block_that_begins_alike_is_copied_if_that_pays(num_equal: int) -> None:
    sim = Simulation()
    sim.add(list(range(30)))
    sim.drain()
    request = sim.add([*range(8), *range(8, 8 + num_equal), *[99] * 10])
    copied = num_equal if num_equal >= MIN_COPIED_TOKENS else 0
    assert sim.step() == {request: 18 + num_equal - 8 - copied}
    assert (request.num_cached_tokens, sim.num_copied) == (8 + copied, 0 if num_equal == 8 else copied)
    assert sim.kv.num_hit_tokens == 8 + copied
    sim.drain()


def test_a_copy_takes_no_more_blocks_and_fits_a_small_step() -> None:
    sim = Simulation(num_kv_blocks=4, max_model_len=32, max_num_batched_tokens=6)
    sim.add(list(range(24)), outputs=1)
    sim.drain()
    request = sim.add([*range(7), *range(100, 125)], outputs=1)  # all blocks are needed, that of the source too
    assert sim.step() == {request: 1}  # room was made for six, and seven are copied: one more fits their block
    assert request.num_cached_tokens == 7
    sim.drain()


def test_another_tenant_gets_no_copy() -> None:
    sim = Simulation()
    sim.add(list(range(30)), tenant=b"one")
    sim.drain()
    request = sim.add(list(range(30)), tenant=b"two")
    assert sim.step() == {request: 30}
    assert sim.num_copied == 0


def test_siblings_wait_for_the_prompt_they_share() -> None:
    sim = Simulation()
    prompt = list(range(50))
    first = sim.add(prompt)
    sibling, stranger = sim.add(prompt, after=first), sim.add(4)
    assert sim.step() == {first: 32}
    assert sim.step() == {first: 18, stranger: 4}
    assert sim.step() == {first: 1, stranger: 1, sibling: 2}
    sim.drain()


def test_siblings_copy_the_end_of_the_prompt() -> None:
    sim = Simulation(max_num_batched_tokens=64)
    prompt = list(range(54))
    first = sim.add(prompt)
    siblings = [sim.add(prompt, after=first) for _ in range(3)]
    assert sim.step() == {first: 54}
    assert sim.step() == dict.fromkeys([first, *siblings], 1)  # 48 tokens are in whole blocks, 5 are copied
    assert sim.num_copied == 15
    sim.drain()


def test_a_sibling_goes_on_when_the_first_is_aborted() -> None:
    sim = Simulation()
    first = sim.add(50)
    sibling = sim.add(50, after=first)
    sim.step()
    sim.scheduler.finish(first, "abort")
    assert sim.step() == {sibling: 32}
    sim.drain()


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_finish_wherever_it_stands(steps: int) -> None:
    sim = Simulation()
    request, other = sim.add(60, outputs=20), sim.add(9, outputs=20)
    for _ in range(steps):
        sim.step()
    for _ in range(2):  # the second time nothing happens
        sim.scheduler.finish(request, "abort")
        assert (request.status, request.seq.num_blocks) == (Status.FINISHED, 0)
    assert request not in sim.step()
    sim.drain()
    assert len(other.output_token_ids) == 20


def test_the_heap_does_not_keep_those_who_left() -> None:
    sim = Simulation(max_num_seqs=1)
    requests = [sim.add(4) for _ in range(5000)]
    for request in requests[1:]:
        sim.scheduler.finish(request, "abort")
    assert sim.scheduler.num_waiting == 1 and len(sim.scheduler.waiting._heap._entries) < 100


# ---- a second tier in host memory ----


def test_what_is_evicted_comes_back() -> None:
    sim = Simulation(num_kv_blocks=16, num_host_kv_blocks=64, max_num_batched_tokens=128)
    prompts = [list(range(start, start + 60)) for start in range(0, 500, 100)]
    for prompt in prompts:  # two fit
        sim.add(prompt, outputs=1)
        sim.drain()
    assert (sim.kv.num_host_hit_tokens, sim.kv.num_blocks_from_host) == (0, 0)
    num_saved = sim.kv.num_blocks_to_host
    assert num_saved == 5 * 7 - sim.kv.tree.num_cached
    for _ in range(2):
        for prompt in prompts[:3]:
            request = sim.add(prompt, outputs=1)
            assert sim.step() == {request: 60 - 56}
            assert request.num_cached_tokens == 56
    assert sim.kv.num_host_hit_tokens == sim.kv.num_blocks_from_host * BLOCK
    assert 5 * 7 < sim.kv.num_blocks_from_host < 6 * 7  # some beginnings had not left
    assert sim.kv.num_blocks_to_host == 5 * 7  # of each prompt once: what came back is still on the host
    assert sim.kv.reset() + sim.kv.pool.num_free >= 16
    assert sim.kv.host is not None and sim.kv.host.num_used == 0


def test_two_that_come_together_share_what_comes_back() -> None:
    sim = Simulation(num_kv_blocks=16, num_host_kv_blocks=64, max_num_batched_tokens=128)
    prompt = list(range(60))
    for other in (prompt, 100, 100):
        sim.add(other, outputs=1)
        sim.drain()
    assert sim.kv.tree.num_cached < 16
    first, second = sim.add(prompt), sim.add(prompt)
    assert sim.step() == {first: 4, second: 4}
    assert sim.kv.num_blocks_from_host == 7
    stranger = sim.add(prompt, tenant=b"you", outputs=1)
    sim.drain()
    assert stranger.num_cached_tokens == 0


def test_a_preempted_request_goes_on_with_what_it_had() -> None:
    """It has its full blocks from the cache and from the host, and computes the rest."""
    sim = Simulation(num_kv_blocks=8, num_host_kv_blocks=8, max_num_batched_tokens=64)
    first, second = sim.add(30, outputs=33), sim.add(30, outputs=33)
    while second.metrics.num_preemptions == 0:
        sim.step()
    num_computed = len(second.seq) - 1
    while second.status is Status.WAITING:
        scheduled = sim.step()
    assert first.status is Status.FINISHED
    assert scheduled == {second: num_computed + 1 - num_computed // BLOCK * BLOCK}
    assert sim.kv.num_blocks_from_host > 0
    sim.drain()
    assert len(second.output_token_ids) == 33


def test_a_step_that_brings_much_back_lets_fewer_in() -> None:
    sim = Simulation(num_kv_blocks=16, num_host_kv_blocks=64, max_num_batched_tokens=24)
    prompt = list(range(125))
    for other in (prompt, 120):
        sim.add(other, outputs=1)
        sim.drain()
    again = sim.add(prompt[:117])  # its first block is still there
    small = sim.add(11, outputs=1)
    assert sim.step() == {again: 5, small: 24 - 5 - (112 - BLOCK) // BROUGHT_BACK_PER_COMPUTED}
    sim.drain()


def test_a_host_smaller_than_a_prompt_keeps_beginnings() -> None:
    sim = Simulation(num_kv_blocks=16, num_host_kv_blocks=3, max_num_batched_tokens=128)
    prompt = list(range(100))
    for other in (prompt, 120):
        sim.add(other, outputs=1)
        sim.drain()
    request = sim.add(prompt)  # one block is still there
    assert sim.step() == {request: 100 - (1 + 3) * BLOCK}


@given(
    st.randoms(use_true_random=False),
    st.integers(16, 40),
    st.integers(1, 40),
    st.sampled_from([None, 0, 1, 6, 100]),
)
@settings(max_examples=100, deadline=None)
def test_everybody_gets_all_of_it(rng: random.Random, blocks: int, budget: int, host: int | None) -> None:
    """Random arrivals, priorities, shared prefixes and aborts, with too little memory: all others end whole. host: blocks of the
    second tier; None is without prefix caching."""
    caching = host is not None
    sim = Simulation(
        num_kv_blocks=blocks,
        num_host_kv_blocks=host or 0,
        max_num_batched_tokens=budget,
        policy="priority",
        enable_prefix_caching=caching,
    )
    shared = list(range(40))
    requests: list[Request] = []
    aborted = set()
    for _ in range(60):
        if rng.random() < 0.5:
            prompt = shared[: rng.randint(1, 40)] + [5000 + rng.randint(0, 3)] * rng.randint(0, 20)
            tenant = rng.choice([b"", b"", b"other"])
            sibling = rng.choice(requests) if requests and rng.random() < 0.2 else None
            if sibling is not None:
                prompt, tenant = sibling.seq.tokens(0, sibling.num_prompt_tokens), sibling.salt
                sibling = sibling if caching else None
            requests.append(sim.add(prompt, rng.randint(1, 30), rng.randint(0, 2), sibling, tenant))
        if requests and rng.random() < 0.1:
            aborted.add(victim := rng.choice(requests))
            sim.scheduler.finish(victim, "abort")
        sim.step()
    sim.drain()
    for request in requests:
        assert request in aborted or len(request.output_token_ids) == request.max_output_tokens


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_the_same_arrivals_give_the_same_steps(seed: int) -> None:
    def steps() -> list[list[tuple[str, int]]]:
        rng, sim, out = random.Random(seed), Simulation(num_kv_blocks=20), []
        for _ in range(40):
            if rng.random() < 0.5:
                sim.add(rng.randint(1, 60), rng.randint(1, 20), rng.randint(0, 1))
            out.append([(request.request_id, n) for request, n in sim.step().items()])
        return out

    assert steps() == steps()


# ---- nobody waits for ever, nobody takes it all ----


def test_age_goes_before_priority() -> None:
    """Urgent requests without end: the calm one is let in after its limit, and is not the first to give way again."""
    sim = Simulation(policy="priority", max_num_seqs=1, max_waiting_steps=50)
    sim.add(4, outputs=3)
    calm = sim.add(4, outputs=3, priority=1000)
    steps = 0
    while calm.status is not Status.FINISHED:
        if sim.scheduler.num_waiting < 3:
            sim.add(4, outputs=3, priority=-5)
        sim.step()
        steps += 1
        assert steps < 60
    assert steps > 50
    assert calm.metrics.num_preemptions == 0


def served(sim: Simulation, steps: int, backlog: dict[bytes, tuple[int, int, int]]) -> dict[bytes, int]:
    """What each tenant is served in so many steps, if it always has (count, prompt, outputs) waiting."""
    cost: dict[bytes, int] = dict.fromkeys(backlog, 0)
    waiting: dict[bytes, list[Request]] = {tenant: [] for tenant in backlog}
    for _ in range(steps):
        for tenant, (depth, prompt, outputs) in backlog.items():
            waiting[tenant] = [r for r in waiting[tenant] if r.status is Status.WAITING]
            waiting[tenant] += [sim.add(prompt, outputs, tenant=tenant) for _ in range(depth - len(waiting[tenant]))]
        for request, num_tokens in sim.step().items():
            cost[request.salt] += 2 * num_tokens if num_tokens == 1 else num_tokens
    return cost


def test_fair_shares() -> None:
    """One tenant with a flood of requests, one with a few long ones, one with short ones: the same service for each."""
    sim = Simulation(policy="fair", max_num_seqs=4, enable_prefix_caching=False)
    cost = served(sim, 3000, {b"flood": (40, 10, 8), b"long": (2, 60, 30), b"short": (3, 3, 2)})
    assert max(cost.values()) < 1.1 * min(cost.values()), cost
    flooded = served(Simulation(max_num_seqs=4), 500, {b"flood": (40, 10, 8), b"short": (3, 3, 2)})
    assert flooded[b"flood"] > 5 * flooded[b"short"]  # what the order of arrival gives


def test_fair_but_not_idle() -> None:
    """Alone a tenant has the machine to itself, in order of arrival; one that comes back has no credit for its absence."""
    sim = Simulation(policy="fair", max_num_seqs=1, enable_prefix_caching=False)
    mine = [sim.add(5, outputs=4, tenant=b"a") for _ in range(40)]
    for _ in range(80):
        sim.step()
    assert [r.status is Status.FINISHED for r in mine] == [True] * 20 + [False] * 20
    theirs = [sim.add(5, outputs=4, tenant=b"b") for _ in range(10)]
    for _ in range(40):
        sim.step()
    done = [sum(r.status is Status.FINISHED for r in requests) for requests in (mine[20:], theirs)]
    assert done in ([5, 5], [4, 6], [6, 4])
    for request in theirs:
        sim.scheduler.finish(request, "abort")
    sim.drain()
    assert sim.scheduler.num_waiting == 0


def test_who_waits_for_a_sibling_was_not_away() -> None:
    """It keeps its place in front of a tenant that was served more while the prompt that it shares was computed."""
    sim = Simulation(policy="fair", max_num_batched_tokens=128, max_num_seqs=6)
    theirs = [sim.add(8, tenant=b"b") for _ in range(10)]
    first = sim.add(prompt := list(range(100)), tenant=b"a")
    sibling = sim.add(prompt, after=first, tenant=b"a")
    sim.scheduler.waiting.charge(theirs[0], 500)
    assert list(sim.step()) == [first, *theirs[:4]]
    sim.step()
    assert sibling.status is Status.RUNNING and theirs[4].status is Status.WAITING
    sim.drain()


def test_more_tenants_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is above the limit was forgotten while it waited, and the engine died of it."""
    monkeypatch.setattr(waiting, "_MAX_TENANTS", 3)
    sim = Simulation(policy="fair")
    for i in range(12):
        requests = [sim.add(5, 2, tenant=b"%d" % (i + j)) for j in range(i % 3 + 1)]
        sim.drain()
        assert all(request.status is Status.FINISHED for request in requests)
    assert len(sim.scheduler.waiting._served) <= 5  # type: ignore[union-attr]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60), st.integers(1, 12)), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_fair_ends_for_all(wanted: list[tuple[int, int, int]]) -> None:
    sim = Simulation(policy="fair", num_kv_blocks=12, max_num_batched_tokens=9)
    requests = [sim.add(prompt, outputs, tenant=bytes([tenant])) for tenant, prompt, outputs in wanted]
    sim.drain()
    assert all(len(r.output_token_ids) == outputs for r, (_, _, outputs) in zip(requests, wanted, strict=True))
