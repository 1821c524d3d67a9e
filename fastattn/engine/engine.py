"""The engine: takes requests, runs steps, gives outputs. Single-threaded and deterministic."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
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
from fastattn.engine.sampler import TokenLogprobs
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
    of them were right; num_accepted_tokens_per_pos: how often the first, second, … guess was.
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
        self.config = config
        self.speculator = speculator
        self.tokenizer = tokenizer
        self.runner = runner
        self.startup = startup
        self._bed = Bed(runner, reload)
        self.kv = KVCacheManager(config.num_kv_blocks, config.block_size, config.enable_prefix_caching)
        self.scheduler = Scheduler(config, self.kv)
        self._intake = Intake(config, tokenizer, runner.model.config.vocab_size)
        self._processor = OutputProcessor(tokenizer)
        self._groups: dict[str, RequestGroup] = {}
        self._owner: dict[Request, RequestGroup] = {}
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
        """Runs one step and returns what is new for each request in it; [] if there is nothing to do."""
        ended, self._ended_early = self._ended_early, []
        drafts = None
        if self.speculator is not None:
            try:
                drafts = self.speculator.propose(self.scheduler.running)
            except torch.AcceleratorError:
                raise
            except Exception as error:
                return self._fail(dict.fromkeys(self.scheduler.running, 0), error, ended)
        now = time.monotonic()
        scheduled = self.scheduler.schedule()
        copies = self.kv.take_copies()
        if not scheduled:
            self.check()
            return self._give_all(ended)
        num_seqs, num_drafts = len(scheduled), sum(scheduled.values()) - len(scheduled)
        only_decodes = all(r.num_pending_tokens == 1 for r in scheduled)
        for request, num_tokens in scheduled.items():
            if request.metrics.first_scheduled_time is None:
                request.metrics.first_scheduled_time = now
            self._num_prompt_tokens += max(0, min(num_tokens, request.num_prompt_tokens - request.seq.num_computed))
        try:
            sampled = self.runner.execute(scheduled, drafts, copies)
            self.check()
        except (torch.AcceleratorError, RankError):
            raise  # the device, or another rank, is lost to this process; no later step could succeed
        except Exception as error:
            return self._fail(scheduled, error, ended)
        self.scheduler.advance(scheduled)
        self._num_steps += 1
        started, now = now, time.monotonic()
        for i, request in enumerate(sampled.requests):
            if request.metrics.first_token_time is None:
                request.metrics.first_token_time = now
                if self.startup is not None and "first_token" not in self.startup.seconds:
                    self.startup.end(now - request.metrics.arrival_time)
            if request.pooling is not None:
                self._end_pooling(request)
                continue
            if self.speculator is not None and sampled.num_drafted[i] > 0:
                self.speculator.record(request, sampled.num_drafted[i], len(sampled.token_ids[i]) - 1)
            self._extend(request, sampled.token_ids[i], sampled.logprobs[i])
        if self.config.debug_checks:
            self.kv.check()
            if self.speculator is not None:
                self.speculator.check()
        outputs = self._give_all([*ended, *sampled.requests])
        if self.speculator is not None and only_decodes:
            self.speculator.record_step(num_seqs, num_drafts, time.monotonic() - started)
        return outputs

    def _fail(self, scheduled: Mapping[Request, int], error: Exception, ended: list[Request]) -> list[RequestOutput]:
        """Ends all requests of a step that could not be computed. Nothing of it was cached, so the others go on."""
        logger.error("a step of %d requests failed; they end with an error", len(scheduled), exc_info=error)
        for request in scheduled:
            self.scheduler.finish(request, "error", f"{type(error).__name__}: {error}")
        return self._give_all([*ended, *scheduled])

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
            del self._groups[group.request_id]
            for request in group.requests:
                del self._owner[request]
        return self._processor.output(group)

    # ---- sleep ----

    def sleep(self, level: int = 1) -> None:
        """Gives memory back until `wake_up`: the KV cache, and with it all cached prefixes; of weights on a GPU, level 1 puts them
        into pinned host memory, level 2 gives them up, to be read from the files again.

        Parameters stay the same objects at level 1; at level 2 the model is another afterwards. Raises ValueError for another level,
        RuntimeError while there are requests, where several ranks share the model or a draft model guesses for it, AsleepError if
        it sleeps already.
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
        self._bed.sleep(level)
        self.kv.reset()

    def wake_up(self) -> None:
        """Takes the memory that `sleep` gave back. Raises ValueError if the engine does not sleep."""
        self._bed.wake_up()

    @property
    def is_sleeping(self) -> bool:
        return self._bed.level > 0

    # ---- state ----

    def check(self) -> None:
        """Raises RankError if another rank is gone, which ends this engine."""
        if self.runner.ranks is not None:
            self.runner.ranks.check()

    def close(self) -> None:
        """Ends the other ranks, if there are any. No step is possible then."""
        if self.runner.ranks is not None:
            self.runner.ranks.close()

    def has_unfinished_requests(self) -> bool:
        return bool(self._groups)

    def stats(self) -> EngineStats:
        speculator = self.speculator
        accepted = tuple(speculator.num_accepted_per_position) if speculator is not None else ()
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
        )


def _why_no_token(request: Request) -> str:
    """What to say of a row of logits that nothing could be drawn from."""
    if request.grammar is None:
        return "the logits are not finite"
    return request.grammar.error or "the logits are not finite for any token that the grammar allows"
