"""The engine: takes requests, runs steps, gives outputs. Single-threaded and deterministic."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from fastattn._runtime import TokenSequence
from fastattn.engine.config import EngineConfig
from fastattn.engine.grammar import DEAD_END
from fastattn.engine.intake import Intake, Params, Prepared, Prompt, TokenLists
from fastattn.engine.kv_cache import KVCacheManager
from fastattn.engine.output_processor import OutputProcessor, RequestGroup
from fastattn.engine.outputs import FinishReason, RequestMetrics, RequestOutput
from fastattn.engine.ranks import RankError
from fastattn.engine.request import Request, Status
from fastattn.engine.runner import Runner
from fastattn.engine.sampler import Draw, Sampled, TokenLogprobs
from fastattn.engine.scheduler import Scheduler
from fastattn.engine.sleep import AsleepError, Bed
from fastattn.engine.startup import Startup
from fastattn.models.decoder import DecoderModel
from fastattn.models.tokenizer import Tokenizer
from fastattn.speculative.speculator import Speculator

logger = logging.getLogger("fastattn.engine")


class EngineBusyError(RuntimeError):
    """The queue of waiting requests is full; try again later. num_waiting of limit requests wait already."""

    def __init__(self, num_waiting: int, limit: int) -> None:
        super().__init__(f"{num_waiting} requests are waiting, allowed are {limit}")
        self.num_waiting, self.limit = num_waiting, limit


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, and the state right now.

    num_drafts: times that guesses of a request were verified; num_draft_tokens: how many in all; num_accepted_tokens: how many
    of them were right; num_accepted_tokens_per_pos: how often the first, second, … guess was. num_host_hit_tokens: those of the
    prefix hits that came back from host memory; num_bytes_to_host, num_bytes_from_host: copied, by all ranks together.
    """

    num_running: int
    num_waiting: int
    num_steps: int
    num_preemptions: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_prefix_queried_tokens: int
    num_prefix_hit_tokens: int
    num_kv_blocks: int
    num_usable_kv_blocks: int
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: tuple[int, ...] = ()
    num_host_kv_blocks: int = 0
    num_used_host_kv_blocks: int = 0
    num_host_hit_tokens: int = 0
    num_bytes_to_host: int = 0
    num_bytes_from_host: int = 0


@dataclass
class _RunningStep:
    """A step that was queued. only_decodes: no prompts in it."""

    scheduled: dict[Request, int]
    draw: Draw | None
    started: float
    only_decodes: bool
    is_advanced: bool = False

    @property
    def must_be_known(self) -> bool:
        """Its draws decide what the next one may be."""
        return self.draw is not None and any(r.needs_known_tokens for r in self.draw.num_drafted)


class Engine:
    """Requests in, steps, outputs: `add_request`, then `step` until nothing is left. Not for several threads at a time.

    `AsyncEngine` and `LLM` are fronts of it; `fastattn.engine.setup.build_engine` makes one from a model's name.
    """

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        tokenizer: Tokenizer,
        speculator: Speculator | None = None,
        *,
        startup: Startup | None = None,
        reload: Callable[[], DecoderModel] | None = None,
    ) -> None:
        """startup: the time line so far, which the first token ends. reload: reads the model's weights again, for `sleep`."""
        if (speculator is None) != (config.speculative is None):
            raise ValueError("Engine: speculator and config.speculative are given together or not at all")
        if config.async_scheduling and runner.ranks is not None:
            raise ValueError("Engine: config.async_scheduling is True, allowed is False with several ranks")
        self.config = config
        self.speculator = speculator
        self.tokenizer = tokenizer
        self.runner = runner
        self.trace = runner.trace
        self.startup = startup
        self._bed = Bed(runner, reload)
        self.kv = KVCacheManager(
            config.num_kv_blocks, config.block_size, config.enable_prefix_caching, config.num_host_kv_blocks
        )
        self.scheduler = Scheduler(config, self.kv)
        self._intake = Intake(config, tokenizer, runner.model.config.vocab_size)
        self._processor = OutputProcessor(tokenizer)
        self._groups: dict[str, RequestGroup] = {}
        self._owner: dict[Request, RequestGroup] = {}
        self._running_step: _RunningStep | None = None  # its draws are not known yet
        self._ended_early: list[Request] = []  # were complete when they came; the next step says so
        self._num_arrivals = 0
        self._num_steps = self._num_prompt_tokens = self._num_generated_tokens = 0

    # ---- requests in ----

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: Params | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
        resume_token_ids: TokenLists | None = None,
    ) -> None:
        """Queues a prompt, text or {"prompt_token_ids": [...]}, to be gone on with (SamplingParams) or embedded
        (PoolingParams). Lower ``priority`` goes first (policy "priority").

        Prefixes are shared within a ``tenant`` only. resume_token_ids: for each of the n completions the tokens that
        another engine, of the same model and with the same seed, generated before it was lost. Each goes on as if it had
        not been: the tokens count towards all limits and penalties, "delta" outputs begin after them, and log-probabilities
        too. A completion that was complete is reported by the next step, with its reason. Without a seed of its own a
        request's draws depend on what came before it in its engine, and cannot be resumed but when greedy.

        Raises ValueError, naming both numbers, for what can never run, and EngineBusyError when the queue is full; nothing
        is queued then.
        """
        self.add_prepared(request_id, self.prepare(prompt, params, resume_token_ids), priority=priority, tenant=tenant)

    def prepare(
        self, prompt: Prompt, params: Params | None = None, resume_token_ids: TokenLists | None = None
    ) -> Prepared:
        """The part of `add_request` that takes time and no engine: any thread may do it, while steps run in another."""
        return self._intake.prepare(prompt, params, resume_token_ids)

    def add_prepared(self, request_id: str, prepared: Prepared, *, priority: int = 0, tenant: str = "") -> None:
        """The part of `add_request` that queues."""
        for name, value, kind in (
            ("request_id", request_id, str),
            ("priority", priority, int),
            ("tenant", tenant, str),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"add_request: {name} is {value!r}, expected {kind.__name__}")
        if request_id in self._groups:
            raise ValueError(f"add_request: request_id {request_id!r} is already in use")
        if self._bed.level:
            raise AsleepError("add_request: the engine sleeps, wake_up comes first")
        params = prepared.params
        if self.scheduler.num_waiting + params.n > self.config.max_num_waiting:
            raise EngineBusyError(self.scheduler.num_waiting, self.config.max_num_waiting)
        requests = self._make_requests(request_id, prepared, priority, tenant)
        streams = [self._processor.make_stream(r) for r in requests]
        group = RequestGroup(request_id, prepared.prompt, prepared.token_ids, requests, streams, requests[0].metrics)
        self._groups[request_id] = group
        for request in requests:
            self._owner[request] = group
            self.scheduler.add(request)
        try:
            for request, token_ids in zip(requests, prepared.resumed, strict=True):
                self._resume(request, token_ids)
        except ValueError:
            self.abort_request(request_id)
            raise

    def _make_requests(self, request_id: str, prepared: Prepared, priority: int, tenant: str) -> list[Request]:
        params = prepared.params
        metrics = RequestMetrics(arrival_time=time.monotonic())
        arrival, self._num_arrivals = self._num_arrivals, self._num_arrivals + 1
        stop_token_ids = frozenset(
            [*(params.stop_token_ids or ()), *(() if params.ignore_eos else self.tokenizer.eos_token_ids)]
        )
        shares_prompt = self.config.enable_prefix_caching and params.prompt_logprobs is None
        requests: list[Request] = []
        for index in range(params.n):
            requests.append(
                Request(
                    request_id=request_id,
                    index=index,
                    params=params,
                    num_prompt_tokens=len(prepared.token_ids),
                    max_output_tokens=prepared.max_output_tokens,
                    seq=TokenSequence(prepared.token_ids),
                    seed=self._seed(params.seed, arrival, index),
                    arrival=arrival,
                    priority=priority if self.config.policy == "priority" else 0,
                    salt=tenant.encode("utf-8", "surrogatepass"),
                    stop_token_ids=stop_token_ids,
                    metrics=metrics,
                    after=requests[0] if requests and shares_prompt else None,
                    pooling=prepared.pooling,
                    grammar=prepared.grammar and prepared.grammar.copy(),
                )
            )
        return requests

    def _resume(self, request: Request, token_ids: list[int]) -> None:
        """Takes a request to where it was after these tokens: the same state, with what was given out marked as given."""
        group = self._owner[request]
        for count, token_id in enumerate(token_ids):
            if request.status is Status.FINISHED:
                raise ValueError(
                    f"add_request: resume_token_ids[{request.index}] has {len(token_ids)} tokens, but this completion "
                    f"ended after {count} ({request.finish_reason})"
                )
            self._append(request, token_id)
        if request.finish_reason == "error":
            raise ValueError(f"add_request: resume_token_ids[{request.index}] cannot be: {request.stop_reason}")
        request.num_resumed_tokens = len(token_ids)
        stream = group.streams[request.index]
        if request.status is Status.FINISHED:
            stream.finish()
            self._ended_early.append(request)
        group.given_chars[request.index], group.given_tokens[request.index] = stream.num_released, len(token_ids)

    def _seed(self, seed: int | None, arrival: int, index: int) -> int:
        """A 64-bit seed: the user's own (each further completion counts on from it), or one from the engine's seed."""
        if seed is None:
            digest = hashlib.blake2b(f"{self.config.seed}:{arrival}".encode(), digest_size=8).digest()
            seed = int.from_bytes(digest, "little", signed=True)
        return (seed + index + 2**63) % 2**64 - 2**63

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """Ends a request now; its blocks are free when this returns. Returns its last output; None if it is not known."""
        group = self._groups.get(request_id)
        if group is None:
            return None
        for request in group.requests:
            self.scheduler.finish(request, "abort")
        return self._give(group)

    # ---- steps ----

    def step(self) -> list[RequestOutput]:
        """Runs one step and returns what is new for each request in it; [] if there is nothing to do.

        With ``async_scheduling`` a step is left running on the device, and what it drew is returned by the next call, which
        first queues the step after it:

            device   │ step n ───────────────│ step n + 1 ───────────│ step n + 2
            host       schedule, queue n + 1 │ texts of n │ schedule, queue n + 2 │ texts of n + 1 │ …

        What step n draws goes into n + 1 on the device. Whom it ends without the host knowing it beforehand (an end token, a
        stop string) has a row in n + 1 for nothing, whose draw is dropped.
        """
        changed, self._ended_early = self._ended_early, []
        before, self._running_step = self._running_step, None
        if before is not None and before.must_be_known:
            changed += self._settle(before)
            before = None
        if before is not None:
            self._advance(before)
        launched = self._launch(changed)
        if before is not None:
            changed += self._settle(before)
        if launched is not None and self.config.async_scheduling:
            self._running_step = launched
        elif launched is not None:
            changed += self._settle(launched)
        self.trace.phase("outputs")
        outputs = self._give_all(changed)
        self.trace.end()
        if not self._groups:
            self._running_step = None  # nobody is left to wait for what it draws
        return outputs

    def _launch(self, changed: list[Request]) -> _RunningStep | None:
        """Schedules and queues a step, if there is something to do. changed: takes the requests that end with an error here."""
        drafts = None
        if self.speculator is not None:
            try:
                drafts = self.speculator.propose(self.scheduler.running)
            except torch.AcceleratorError:
                raise
            except Exception as error:
                changed += self._fail(self.scheduler.running, error)
                return None
        now = time.monotonic()
        self.trace.phase("schedule")
        scheduled = self.scheduler.schedule()
        self.trace.counters(self.scheduler, scheduled)
        if not scheduled:
            self.check()
            return None
        copies = self.kv.take_copies()
        only_decodes = True
        for request, num_tokens in scheduled.items():
            if request.seq.num_pending == 1 and request.is_prefilled:
                continue
            only_decodes = only_decodes and request.seq.num_pending == 1
            if request.metrics.first_scheduled_time is None:
                request.metrics.first_scheduled_time = now
            self._num_prompt_tokens += max(0, min(num_tokens, request.num_prompt_tokens - request.seq.num_computed))
        try:
            draw = self.runner.launch(scheduled, drafts, copies)
            self.check()
        except (torch.AcceleratorError, RankError):
            raise  # the device, or another rank, is lost to this process; no later step could succeed
        except Exception as error:
            self.kv.lose_copies(copies)
            changed += self._fail(scheduled, error)
            return None
        return _RunningStep(scheduled, draw, now, only_decodes)

    def _advance(self, step: _RunningStep) -> None:
        """Counts a step that still runs as computed, and its draws as tokens whose ids are not known yet."""
        self.trace.phase("schedule")
        self.scheduler.advance(step.scheduled)
        step.is_advanced = True
        for row, request in enumerate(step.draw.num_drafted if step.draw is not None else ()):
            goes_on = request.pooling is None and len(request.output_token_ids) + 1 < request.max_output_tokens
            if goes_on and request.status is Status.RUNNING:
                request.seq.append_unknown(row)

    def _settle(self, step: _RunningStep) -> list[Request]:
        """Waits for what a step drew and hands it to its requests, but for those that have ended since. Returns those of which
        there is something to tell."""
        self.trace.phase("wait")
        try:
            sampled = step.draw.result() if step.draw is not None else Sampled([], [], [], [])
        except torch.AcceleratorError:
            raise
        except Exception as error:
            return self._fail(step.scheduled, error)
        self.trace.phase("outputs")
        if not step.is_advanced:
            self.scheduler.advance(step.scheduled)
        self._num_steps += 1
        now = time.monotonic()
        changed = []
        for i, request in enumerate(sampled.requests):
            if request.status is Status.FINISHED:
                continue
            if request.metrics.first_token_time is None:
                request.metrics.first_token_time = now
                if self.startup is not None and "first_token" not in self.startup.seconds:
                    self.startup.end(now - request.metrics.arrival_time)
            if request.pooling is not None:
                self._end_pooling(request)
                changed.append(request)
                continue
            if self.speculator is not None and sampled.num_drafted[i] > 0:
                self.speculator.record(request, sampled.num_drafted[i], len(sampled.token_ids[i]) - 1)
            self._extend(request, sampled.token_ids[i], sampled.logprobs[i])
            if request.params.output_kind != "final" or request.finish_reason is not None:
                changed.append(request)
        if self.config.debug_checks:
            self.kv.check()
            if self.speculator is not None:
                self.speculator.check()
        if self.speculator is not None and step.only_decodes:
            num_drafts = sum(step.scheduled.values()) - len(step.scheduled)
            self.speculator.record_step(len(step.scheduled), num_drafts, time.monotonic() - step.started)
        return changed

    def _fail(self, requests: Iterable[Request], error: Exception) -> list[Request]:
        """Ends all requests of a step that could not be computed. Nothing of it was cached, so the others go on."""
        failed = list(requests)
        logger.error("a step of %d requests failed; they end with an error", len(failed), exc_info=error)
        for request in failed:
            self.scheduler.finish(request, "error", f"{type(error).__name__}: {error}")
        return failed

    def _extend(self, request: Request, token_ids: list[int], logprobs: list[TokenLogprobs] | None) -> None:
        """Adds what a step gave, all but the last of them accepted drafts; what comes after its end is dropped."""
        group = self._owner[request]
        for i, token_id in enumerate(token_ids):
            if i > 0:
                self.scheduler.accept(request)
            if token_id < 0:
                self.scheduler.finish(request, "error", _why_no_token(request))
                break
            try:
                self._append(request, token_id)
            except Exception as error:  # of its text or its grammar; the others of the step are not to blame
                logger.error("request %r ends with an error", request.request_id, exc_info=error)
                self.scheduler.finish(request, "error", f"{type(error).__name__}: {error}")
                break
            self._num_generated_tokens += 1
            if logprobs is not None:
                request.logprobs.append(logprobs[i])
                group.cumulative_logprobs[request.index] += logprobs[i][token_id][0]
            if request.status is Status.FINISHED:
                break

    def _end_pooling(self, request: Request) -> None:
        if request.embedding is None or not all(map(math.isfinite, request.embedding)):
            request.embedding = None
            self.scheduler.finish(request, "error", "the hidden states are not finite")
        else:
            self.scheduler.finish(request, "stop")

    def _append(self, request: Request, token_id: int) -> None:
        """Adds a generated token and ends the request if this was its last."""
        if request.seq.has_unknown:
            request.seq.settle(token_id)
        else:
            request.seq.append(token_id)
        request.output_token_ids.append(token_id)
        if request.params.has_penalties:
            request.output_counts[token_id] += 1
        ended: tuple[FinishReason, int | str | None] | None = None
        grammar = request.grammar
        if token_id in request.stop_token_ids:
            ended = ("stop", token_id)  # the end token itself gives no text
            # A dead end, such as a character that no token spells, leaves nothing but the end token.
            if grammar is not None and token_id in self.tokenizer.eos_token_ids and not grammar.accepting:
                ended = ("error", grammar.error or DEAD_END)
        else:
            if grammar is not None:
                grammar.accept(token_id)
            may_stop = len(request.output_token_ids) >= request.params.min_tokens
            stop = self._owner[request].streams[request.index].push(token_id, may_stop)
            if stop is not None:
                ended = ("stop", stop)
            elif grammar is not None and (grammar.finished or grammar.error):
                ended = ("error", grammar.error) if grammar.error else ("stop", None)
            elif len(request.output_token_ids) >= request.max_output_tokens:
                ended = ("length", None)
        if ended is not None:
            self.scheduler.finish(request, *ended)

    def _give_all(self, requests: Sequence[Request]) -> list[RequestOutput]:
        # One that was complete when it came may have been aborted since.
        groups = {request.request_id: self._owner[request] for request in requests if request in self._owner}
        return [output for group in groups.values() if (output := self._give(group)) is not None]

    def _give(self, group: RequestGroup) -> RequestOutput | None:
        for request, stream in zip(group.requests, group.streams, strict=True):
            if request.status is Status.FINISHED:
                stream.finish()
                if self.speculator is not None:
                    self.speculator.release(request)
        if group.finished:
            group.metrics.finished_time = time.monotonic()
            self.trace.request(group)
            del self._groups[group.request_id]
            for request in group.requests:
                del self._owner[request]
        return self._processor.output(group)

    # ---- sleep ----

    def sleep(self, level: int = 1) -> None:
        """Gives memory back until `wake_up`: the KV cache, and with it all cached prefixes; of weights on a GPU, level 1 puts them
        into pinned host memory, level 2 gives them up, to be read from the files again.

        Parameters stay the same objects at level 1; at level 2 the model is another afterwards. Raises ValueError for another level,
        RuntimeError while there are requests, where several ranks share the model or a draft model guesses for it, and where the
        host has too little memory, AsleepError if it sleeps already.
        """
        if self.config.speculative is not None and self.config.speculative.model is not None:
            raise RuntimeError(
                f"sleep: there is a draft model, {self.config.speculative.model!r}, which does not sleep"
            )
        if self.runner.ranks is not None:
            raise RuntimeError(
                f"sleep: tensor_parallel_size is {self.runner.ranks.size}, allowed is 1: other ranks do not sleep"
            )
        if self._groups:
            raise RuntimeError(f"sleep: {len(self._groups)} requests are not finished, allowed are 0")
        self._bed.check(level)
        self._running_step = None  # of requests that were aborted
        self.kv.take_copies()  # of blocks that are gone
        self.kv.reset()
        self._bed.sleep(level)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Takes the memory that `sleep` gave back: of "weights", of "kv_cache", or all of it; requests are taken when both are
        there. Raises ValueError for another tag, and if the engine does not sleep. Who finds too little memory sleeps on."""
        self._bed.wake_up(tags)

    @property
    def is_sleeping(self) -> bool:
        return self._bed.level > 0

    @property
    def asleep(self) -> tuple[str, ...]:
        """Which of "weights" and "kv_cache" sleep."""
        return self._bed.asleep

    # ---- state ----

    def check(self) -> None:
        """Raises RankError if another rank is gone, which ends this engine."""
        if self.runner.ranks is not None:
            self.runner.ranks.check()

    def close(self) -> None:
        """Ends the other ranks and the trace, if there are any. No step is possible then."""
        self.trace.close()
        if self.runner.ranks is not None:
            self.runner.ranks.close()

    def has_unfinished_requests(self) -> bool:
        return bool(self._groups)

    def stats(self) -> EngineStats:
        speculator = self.speculator
        accepted = tuple(speculator.num_accepted_per_position) if speculator is not None else ()
        block_bytes = self.runner.kv_block_bytes
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=self.scheduler.num_waiting,
            num_steps=self._num_steps,
            num_preemptions=self.scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_prefix_queried_tokens=self.kv.num_queried_tokens,
            num_prefix_hit_tokens=self.kv.num_hit_tokens,
            num_kv_blocks=self.config.num_kv_blocks,
            num_usable_kv_blocks=self.kv.num_usable_blocks,
            num_drafts=speculator.num_drafts if speculator is not None else 0,
            num_draft_tokens=speculator.num_draft_tokens if speculator is not None else 0,
            num_accepted_tokens=sum(accepted),
            num_accepted_tokens_per_pos=accepted,
            num_host_kv_blocks=self.config.num_host_kv_blocks,
            num_used_host_kv_blocks=self.kv.host.num_used if self.kv.host is not None else 0,
            num_host_hit_tokens=self.kv.num_host_hit_tokens,
            num_bytes_to_host=self.kv.num_blocks_to_host * block_bytes,
            num_bytes_from_host=self.kv.num_blocks_from_host * block_bytes,
        )


def _why_no_token(request: Request) -> str:
    """What to say of a row of logits that nothing could be drawn from."""
    if request.grammar is None:
        return "the logits are not finite"
    return request.grammar.error or "the logits are not finite for any token that the grammar allows"
