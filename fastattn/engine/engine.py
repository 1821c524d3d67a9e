"""The engine: takes requests, runs steps, gives outputs. Single-threaded and deterministic."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from fastattn.engine.arrivals import Arrivals
from fastattn.engine.config import EngineConfig
from fastattn.engine.intake import Intake, Params, Prepared, Prompt, TokenLists
from fastattn.engine.kv_cache import KVCacheManager
from fastattn.engine.output_processor import OutputProcessor, RequestGroup
from fastattn.engine.outputs import RequestOutput
from fastattn.engine.progress import Progress
from fastattn.engine.ranks import RankError
from fastattn.engine.request import Needs, Request, Status
from fastattn.engine.runner import Runner
from fastattn.engine.sampler import Draw, Sampled
from fastattn.engine.scheduled import Scheduled
from fastattn.engine.scheduler import Scheduler
from fastattn.engine.sleep import AsleepError, Bed
from fastattn.engine.startup import Startup
from fastattn.engine.stats import EngineStats as EngineStats
from fastattn.engine.stats import collect_stats
from fastattn.models.decoder import DecoderModel
from fastattn.models.tokenizer import Tokenizer
from fastattn.speculative.speculator import Speculator

logger = logging.getLogger("fastattn.engine")


class EngineBusyError(RuntimeError):
    """The queue of waiting requests is full; try again later. num_waiting of limit requests wait already."""

    def __init__(self, num_waiting: int, limit: int) -> None:
        super().__init__(f"{num_waiting} requests are waiting, allowed are {limit}")
        self.num_waiting, self.limit = num_waiting, limit


@dataclass
class _RunningStep:
    """A step that was queued."""

    scheduled: Scheduled
    draw: Draw | None
    started: float
    is_advanced: bool = False

    @property
    def must_be_known(self) -> bool:
        """Its draws decide what the next one may be."""
        return bool(self.scheduled.batch.draw_needs & Needs.KNOWN_TOKENS)


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
        self._arrivals = Arrivals(config, tokenizer.eos_token_ids)
        self._processor = OutputProcessor(tokenizer)
        self._groups: dict[str, RequestGroup] = {}
        self._owner: dict[Request, RequestGroup] = {}
        self.progress = Progress(self.scheduler, self._owner, tokenizer.eos_token_ids)
        self._running_step: _RunningStep | None = None  # its draws are not known yet
        self._ended_early: list[Request] = []  # were complete when they came; the next step says so
        self.num_steps = self.num_prompt_tokens = 0

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
        requests = self._arrivals.make_requests(request_id, prepared, priority, tenant)
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

    def _resume(self, request: Request, token_ids: list[int]) -> None:
        """Takes a request to where it was after these tokens: the same state, with what was given out marked as given."""
        group = self._owner[request]
        for count, token_id in enumerate(token_ids):
            if request.status is Status.FINISHED:
                raise ValueError(
                    f"add_request: resume_token_ids[{request.index}] has {len(token_ids)} tokens, but this completion "
                    f"ended after {count} ({request.finish_reason})"
                )
            self.progress.append(request, token_id)
        stream = group.streams[request.index]
        self.progress.read_text(request, stream)
        if request.finish_reason == "error":
            raise ValueError(f"add_request: resume_token_ids[{request.index}] cannot be: {request.stop_reason}")
        request.num_resumed_tokens = len(token_ids)
        if request.status is Status.FINISHED:
            self._ended_early.append(request)
        group.given_chars[request.index], group.given_tokens[request.index] = stream.num_released, len(token_ids)

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
        for index in scheduled.batch.prefills:
            request = scheduled.requests[index]
            if request.metrics.first_scheduled_time is None:
                request.metrics.first_scheduled_time = now
            self.num_prompt_tokens += max(
                0, min(scheduled[request], request.num_prompt_tokens - request.seq.num_computed)
            )
        try:
            draw = self.runner.launch(scheduled, drafts, copies)
            self.check()
        except (torch.AcceleratorError, RankError):
            raise  # the device, or another rank, is lost to this process; no later step could succeed
        except Exception as error:
            self.kv.lose_copies(copies)
            changed += self._fail(scheduled, error)
            return None
        return _RunningStep(scheduled, draw, now)

    def _advance(self, step: _RunningStep) -> None:
        """Counts a step that still runs as computed, and its draws as tokens whose ids are not known yet."""
        self.trace.phase("schedule")
        self.scheduler.advance(step.scheduled)
        step.is_advanced = True
        step.scheduled.batch.append_unknown()

    def _settle(self, step: _RunningStep) -> list[Request]:
        """Waits for what a step drew and hands it to its requests, but for those that have ended since. Returns those of which
        there is something to tell."""
        self.trace.phase("wait")
        try:
            sampled = step.draw.result() if step.draw is not None else Sampled({}, [], None)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            return self._fail(step.scheduled, error)
        self.trace.phase("outputs")
        if not step.is_advanced:
            self.scheduler.advance(step.scheduled)
        self.num_steps += 1
        now = time.monotonic()
        # One by one only those of whom there is more to do than that they have a token more.
        rows: Iterable[int] = range(len(sampled.requests))
        told: list[int] = []
        if not sampled.has_drafts:
            rows, told, num_settled = step.scheduled.batch.settle(sampled.drawn)
            self.progress.num_generated_tokens += num_settled
        told += [row for row in rows if self._settle_one(sampled, row, now)]
        if self.config.debug_checks:
            self.kv.check()
            if self.speculator is not None:
                self.speculator.check()
        if self.speculator is not None and step.scheduled.batch.only_decodes:
            num_drafts = step.scheduled.batch.total_tokens - len(step.scheduled)
            self.speculator.record_step(len(step.scheduled), num_drafts, time.monotonic() - step.started)
        return [sampled.requests[row] for row in sorted(told)]

    def _settle_one(self, sampled: Sampled, index: int, now: float) -> bool:
        """Hands a request what was drawn for it. Returns whether there is something to tell."""
        request = sampled.requests[index]
        if request.status is Status.FINISHED:
            return False
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = now
            request.saw_first_token()
            if self.startup is not None and "first_token" not in self.startup.seconds:
                self.startup.end(now - request.metrics.arrival_time)
        if request.pooling is not None:
            self.progress.end_pooling(request)
            return True
        token_ids, logprobs = sampled.of(index)
        if self.speculator is not None and sampled.num_drafted[index] > 0:
            self.speculator.record(request, sampled.num_drafted[index], len(token_ids) - 1)
        self.progress.extend(request, token_ids, logprobs)
        return request.params.output_kind != "final" or request.finish_reason is not None

    def _fail(self, requests: Iterable[Request], error: Exception) -> list[Request]:
        """Ends all requests of a step that could not be computed. Nothing of it was cached, so the others go on."""
        failed = list(requests)
        logger.error("a step of %d requests failed; they end with an error", len(failed), exc_info=error)
        for request in failed:
            self.scheduler.finish(request, "error", f"{type(error).__name__}: {error}")
        return failed

    def _give_all(self, requests: Sequence[Request]) -> list[RequestOutput]:
        # One that was complete when it came may have been aborted since.
        groups = {request.request_id: self._owner[request] for request in requests if request in self._owner}
        return [output for group in groups.values() if (output := self._give(group)) is not None]

    def _give(self, group: RequestGroup) -> RequestOutput | None:
        for request, stream in zip(group.requests, group.streams, strict=True):
            self.progress.read_text(request, stream)
            if self.speculator is not None and request.status is Status.FINISHED:
                self.speculator.release(request)
        finished = group.finished
        if finished:
            group.metrics.finished_time = time.monotonic()
            self.trace.request(group)
            del self._groups[group.request_id]
            for request in group.requests:
                del self._owner[request]
        return self._processor.output(group, finished)

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
        return collect_stats(self)
