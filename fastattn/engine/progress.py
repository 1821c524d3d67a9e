"""What a token does to its request: text, limits, ends."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from fastattn.engine.grammar import DEAD_END
from fastattn.engine.output_processor import RequestGroup, TextStream
from fastattn.engine.outputs import FinishReason
from fastattn.engine.request import Request, Status
from fastattn.engine.sampler import TokenLogprobs
from fastattn.engine.scheduler import Scheduler

logger = logging.getLogger("fastattn.engine")


class Progress:
    """Adds to requests what was drawn for them, and ends those for which it was the last."""

    def __init__(
        self, scheduler: Scheduler, owner: Mapping[Request, RequestGroup], eos_token_ids: tuple[int, ...]
    ) -> None:
        """owner: whose text a request's tokens are, of all that are not finished."""
        self._scheduler, self._owner, self._eos_token_ids = scheduler, owner, eos_token_ids
        self.num_generated_tokens = 0

    def extend(self, request: Request, token_ids: list[int], logprobs: list[TokenLogprobs] | None) -> None:
        """Adds what a step gave, all but the last of them accepted drafts; what comes after its end is dropped."""
        group = self._owner[request]
        for i, token_id in enumerate(token_ids):
            if i > 0:
                self._scheduler.accept(request)
            if token_id < 0:
                self._scheduler.finish(request, "error", _why_no_token(request))
                break
            try:
                self.append(request, token_id)
            except Exception as error:  # of its text or its grammar; the others of the step are not to blame
                logger.error("request %r ends with an error", request.request_id, exc_info=error)
                self._scheduler.finish(request, "error", f"{type(error).__name__}: {error}")
                break
            self.num_generated_tokens += 1
            if logprobs is not None:
                request.logprobs.append(logprobs[i])
                group.cumulative_logprobs[request.index] += logprobs[i][token_id][0]
            if request.status is Status.FINISHED:
                break

    def end_pooling(self, request: Request) -> None:
        if request.embedding is None or not all(map(math.isfinite, request.embedding)):
            request.embedding = None
            self._scheduler.finish(request, "error", "the hidden states are not finite")
        else:
            self._scheduler.finish(request, "stop")

    def append(self, request: Request, token_id: int) -> None:
        """Adds a generated token and ends the request if this was its last."""
        if request.seq.has_unknown:
            request.seq.settle(token_id)
        else:
            request.seq.append(token_id)
        if request.params.has_penalties:
            request.output_counts[token_id] += 1
        ended: tuple[FinishReason, int | str | None] | None = None
        grammar = request.grammar
        if token_id in request.stop_token_ids:
            ended = ("stop", token_id)  # the end token itself gives no text
            # A dead end, such as a character that no token spells, leaves nothing but the end token.
            if grammar is not None and token_id in self._eos_token_ids and not grammar.accepting:
                ended = ("error", grammar.error or DEAD_END)
        else:
            if grammar is not None:
                grammar.accept(token_id)
            stop = None
            if request.reads_text:
                may_stop = request.num_output_tokens >= request.params.min_tokens
                stop = self._owner[request].streams[request.index].push(token_id, may_stop)
            if stop is not None:
                ended = ("stop", stop)
            elif grammar is not None and (grammar.finished or grammar.error):
                ended = ("error", grammar.error) if grammar.error else ("stop", None)
            elif request.num_output_tokens >= request.max_output_tokens:
                ended = ("length", None)
        if ended is not None:
            self._scheduler.finish(request, *ended)

    def read_text(self, request: Request, stream: TextStream) -> None:
        """Brings the text up to the tokens, whether it was read while they came or not."""
        if not request.reads_text:
            token_ids = request.seq.outputs(stream.num_tokens)
            if token_ids and token_ids[-1] in request.stop_token_ids:  # it ended with that
                token_ids.pop()
            try:
                if len(token_ids) == 1:
                    stream.push(token_ids[0])
                else:
                    stream.catch_up(token_ids)
            except Exception as error:  # the others of the step are not to blame
                logger.error("request %r ends with an error", request.request_id, exc_info=error)
                self._scheduler.finish(request, "error")
                request.finish_reason, request.stop_reason = "error", f"{type(error).__name__}: {error}"
        if request.status is Status.FINISHED:
            stream.finish()


def _why_no_token(request: Request) -> str:
    """What to say of a row of logits that nothing could be drawn from."""
    if request.grammar is None:
        return "the logits are not finite"
    return request.grammar.error or "the logits are not finite for any token that the grammar allows"
