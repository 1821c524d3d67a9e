"""The state of one sequence that is being generated."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fastattn._runtime import TokenSequence
from fastattn.engine.outputs import FinishReason, RequestMetrics
from fastattn.engine.pooling_params import PoolingParams
from fastattn.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from fastattn.engine.grammar import Grammar


class Needs:
    """What a request asks of a step beyond the common, as bits; a batch has those of all its requests (`ScheduledBatch.needs`).

    OWN_LOGITS: draws from other logits than the model's, or wants to know some of them. KNOWN_TOKENS: its next draw depends on
    all tokens before it in a way that only the host can compute. PROMPT_LOGPROBS, POOLING: wants something of its prompt.
    CHANCE: its tokens are drawn at random.
    """

    OWN_LOGITS: Final = 1
    KNOWN_TOKENS: Final = 2
    PROMPT_LOGPROBS: Final = 4
    POOLING: Final = 8
    CHANCE: Final = 16


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """One of the `n` completions of a user's request. Only the scheduler changes `status`.

    seq holds prompt and output tokens, the KV blocks, and how many tokens are in the cache.
    after: the sibling that computes the shared prompt; this one waits until it has, and then finds it in the prefix cache.
    host_blocks: blocks of the second tier with the last of its computed tokens, until they are brought back.
    """

    request_id: str
    index: int
    params: SamplingParams
    num_prompt_tokens: int
    max_output_tokens: int
    seq: TokenSequence
    seed: int
    arrival: int  # a counter, not a clock: ties would make the order depend on the machine
    priority: int
    salt: bytes
    stop_token_ids: frozenset[int]
    metrics: RequestMetrics
    after: Request | None = None
    grammar: Grammar | None = None  # after the output tokens so far
    pooling: PoolingParams | None = None  # wants an embedding and no tokens
    embedding: list[float] | None = None
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    host_blocks: list[int] = field(default_factory=list)
    num_charged: int = 0  # tokens whose computation its tenant has paid for (policy "fair")
    num_resumed_tokens: int = 0  # the first output tokens, which another engine generated
    logprobs: list[dict[int, tuple[float, int]]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, tuple[float, int]] | None] = field(default_factory=list)
    output_counts: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        p = self.params
        # What is asked of every request in every step is told to the runtime once.
        known_tokens = self.grammar is not None or p.has_penalties
        bans_stop = p.min_tokens > 0 and bool(self.stop_token_ids)
        own_logits = known_tokens or bool(p.logit_bias) or bans_stop or p.logprobs is not None
        self.seq.needs = (
            Needs.OWN_LOGITS * own_logits
            | Needs.KNOWN_TOKENS * known_tokens
            | Needs.PROMPT_LOGPROBS * (p.prompt_logprobs is not None)
            | Needs.POOLING * (self.pooling is not None)
            | Needs.CHANCE * (p.temperature > 0)
        )
        self.seq.is_streamed = p.output_kind != "final"
        # Whether its text may end it; else it is made when somebody is shown it.
        self.reads_text = bool(p.stop_strings) or self.grammar is not None
        self.seq.set_ends(self.max_output_tokens, list(self.stop_token_ids))
        self.seq.set_sampling(float(p.temperature), max(p.top_k, 0), float(p.top_p), float(p.min_p), self.seed)

    def saw_first_token(self) -> None:
        """From now on the host looks at its tokens only if it has to; at the first it always does."""
        p = self.params
        self.seq.is_watched = self.reads_text or p.has_penalties or p.logprobs is not None or self.pooling is not None

    @property
    def output_token_ids(self) -> list[int]:
        """A copy of those that are known."""
        return self.seq.outputs()

    @property
    def num_output_tokens(self) -> int:
        return self.seq.num_outputs

    @property
    def num_pending_tokens(self) -> int:
        """Tokens whose KV is not in the cache yet: 1 while decoding, more while prefilling or after a preemption. Drafts
        (`seq.drafts`) come on top."""
        return self.seq.num_pending

    @property
    def is_prefilled(self) -> bool:
        return self.seq.num_computed >= self.num_prompt_tokens

    @property
    def needs_every_token(self) -> bool:
        """The whole prompt must be computed, whatever of it is cached: something is wanted of each of its tokens."""
        return self.params.prompt_logprobs is not None or (self.pooling is not None and self.pooling.pooling == "mean")

    @property
    def must_wait_for_sibling(self) -> bool:
        return self.after is not None and self.after.status is not Status.FINISHED and not self.after.is_prefilled

    @property
    def sort_key(self) -> tuple[int, int, int]:
        return (self.priority, self.arrival, self.index)
