"""From token ids to text: incremental detokenization, stop strings, and the outputs that a user sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from fastattn.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from fastattn.engine.request import Request, Status
from fastattn.engine.sampler import TokenLogprobs
from fastattn.models.tokenizer import Tokenizer


class TextStream:
    """The text of one completion as its tokens come, with what may turn out to be a stop string held back."""

    def __init__(
        self, tokenizer: Tokenizer, stop: tuple[str, ...], include_stop: bool, skip_special_tokens: bool
    ) -> None:
        self._decoder = tokenizer.stream(skip_special_tokens)
        self._stop, self._include_stop = stop, include_stop
        self._beginnings = [_Beginning(one) for one in stop]
        self.text = ""  # everything decoded so far, cut at a stop string
        self.num_released = 0  # characters of `text` that can no longer be part of a stop string
        self.num_tokens = 0  # that it is made of

    def push(self, token_id: int, may_stop: bool = True) -> str | None:
        """Adds a token. Returns the stop string that it completed, if any; `text` then ends there."""
        self.num_tokens += 1
        piece = self._decoder.step(token_id)
        if not piece:
            return None
        if not self._stop:
            self.text += piece
            self.num_released = len(self.text)
            return None
        before = len(self.text)
        self.text += piece
        found = []
        if may_stop:
            # One that ends in this piece began less than its own length before it. Another that ended earlier, when nothing might
            # stop, has been given out.
            places = [(self.text.find(stop, max(0, before - len(stop) + 1)), stop) for stop in self._stop]
            found = [place for place in places if place[0] >= 0]
        if found:
            at, stop = min(found)
            self.text = self.text[: at + len(stop) if self._include_stop else at]
            self.num_released = len(self.text)
            return stop
        for beginning in self._beginnings:
            beginning.push(piece)
        self.num_released = len(self.text) - max(beginning.length for beginning in self._beginnings)
        return None

    def catch_up(self, token_ids: Sequence[int]) -> None:
        """Adds tokens that came while nobody looked at the text, which has no stop strings."""
        self.num_tokens += len(token_ids)
        self.text += self._decoder.steps(token_ids)
        self.num_released = len(self.text)

    def finish(self) -> None:
        """No more tokens: nothing is held back any longer."""
        self.num_released = len(self.text)


class _Beginning:
    """The longest end of a text that begins a stop string and is not all of it. A step a character, as Knuth, Morris and Pratt
    search: a client may send sixteen stop strings of thousands, and a look at each beginning of them is milliseconds a token."""

    def __init__(self, stop: str) -> None:
        self._stop, self._borders = stop, _borders(stop)
        self.length = 0

    def push(self, piece: str) -> None:
        stop, borders, length = self._stop, self._borders, self.length
        for char in piece:
            while length and stop[length] != char:
                length = borders[length - 1]
            length += stop[length] == char
            if length == len(stop):
                length = borders[-1]
        self.length = length


@lru_cache(maxsize=64)
def _borders(text: str) -> tuple[int, ...]:
    """For each beginning of the text, how long its longest end is that begins it too."""
    found, length = [0], 0
    for char in text[1:]:
        while length and text[length] != char:
            length = found[length - 1]
        length += text[length] == char
        found.append(length)
    return tuple(found)


@dataclass
class RequestGroup:
    """A user's request: its prompt and its `n` sequences, and how much of each was already given out."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    requests: list[Request]
    streams: list[TextStream]
    metrics: RequestMetrics
    given_chars: list[int] = field(init=False)
    given_tokens: list[int] = field(init=False)
    cumulative_logprobs: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.given_chars = [0] * len(self.requests)
        self.given_tokens = [0] * len(self.requests)
        self.cumulative_logprobs = [0.0] * len(self.requests)

    @property
    def finished(self) -> bool:
        return not [request for request in self.requests if request.status is not Status.FINISHED]


class OutputProcessor:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def make_stream(self, request: Request) -> TextStream:
        p = request.params
        return TextStream(self._tokenizer, p.stop_strings, p.include_stop_str_in_output, p.skip_special_tokens)

    def output(self, group: RequestGroup, finished: bool) -> RequestOutput | None:
        """What is new for the user, or None if they asked only for the end and it is not there yet."""
        first = group.requests[0]
        kind = first.params.output_kind
        if kind == "final" and not finished:
            return None
        outputs = [self._completion(group, i, delta=kind == "delta") for i in range(len(group.requests))]
        return RequestOutput(
            request_id=group.request_id,
            prompt=group.prompt,
            prompt_token_ids=group.prompt_token_ids,
            outputs=outputs,
            finished=finished,
            metrics=group.metrics,
            num_cached_tokens=first.num_cached_tokens,
            prompt_logprobs=None if first.params.prompt_logprobs is None else self._prompt_logprobs(first),
            embedding=first.embedding,
        )

    def _completion(self, group: RequestGroup, index: int, delta: bool) -> CompletionOutput:
        request, stream = group.requests[index], group.streams[index]
        from_char, from_token = (group.given_chars[index], group.given_tokens[index]) if delta else (0, 0)
        token_ids = request.seq.outputs(from_token)
        group.given_chars[index], group.given_tokens[index] = stream.num_released, from_token + len(token_ids)
        logprobs = None
        if request.params.logprobs is not None:
            # Those of resumed tokens went with the engine that drew them.
            from_row = max(0, from_token - request.num_resumed_tokens)
            logprobs = [self._describe(row) for row in request.logprobs[from_row:]]
        return CompletionOutput(
            index=index,
            text=stream.text[from_char : stream.num_released],
            token_ids=token_ids,
            cumulative_logprob=group.cumulative_logprobs[index] if logprobs is not None else None,
            logprobs=logprobs,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
        )

    def _prompt_logprobs(self, request: Request) -> list[dict[int, Logprob] | None] | None:
        if not request.is_prefilled and request.status is not Status.FINISHED:
            return None
        return [None if row is None else self._describe(row) for row in request.prompt_logprobs]

    def _describe(self, row: TokenLogprobs) -> dict[int, Logprob]:
        return {token: Logprob(value, rank, self._tokenizer.token_text(token)) for token, (value, rank) in row.items()}
