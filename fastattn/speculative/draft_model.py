"""A smaller model that guesses for a larger one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastattn import ops
from fastattn.engine.kv_cache import KVCacheManager
from fastattn.engine.request import Request
from fastattn.engine.runner import Runner
from fastattn.engine.sampling_params import SamplingParams
from fastattn.engine.scheduled import Scheduled
from fastattn.models.tokenizer import Tokenizer
from fastattn.speculative.proposer import Drafts

# The draft's draws must not be those that decide about them. Any number without a pattern: another key of the generator.
_DRAFT_SEED = 0x5851F42D4C957F2D


@dataclass
class _Shadow:
    """What the draft model knows of a request: ``own`` has the request's tokens, then guesses, in the draft's own blocks.

    num_agreed: tokens that were the request's when it was last looked at. num_remembered: blocks that are in the draft's
    prefix tree.
    """

    own: Request
    num_agreed: int = 0
    num_remembered: int = 0


class DraftModelProposer:
    """Runs the draft model on its own runner and KV cache, in as many small steps as tokens are wanted.

    A request is caught up with in the first of these steps: one token or two after a verification, its whole text when it
    is new or its blocks were given to another. What of that does not fit the step waits for the next proposal, and the
    request is not guessed for until then. Rejected guesses are overwritten, as in the target's cache.
    """

    def __init__(self, runner: Runner, vocab_size: int, is_probabilistic: bool) -> None:
        """vocab_size: the target's width of logits, which padding may make another than the draft's."""
        config = runner.config
        self.runner, self.vocab_size, self.is_probabilistic = runner, vocab_size, is_probabilistic
        self.kv = KVCacheManager(config.num_kv_blocks, config.block_size, config.enable_prefix_caching)
        self._shadows: dict[Request, _Shadow] = {}

    def propose(self, wanted: Mapping[Request, int]) -> Drafts:
        room = self.runner.config.max_model_len
        limits = {r: min(count, room - len(r.seq)) for r, count in wanted.items() if len(r.seq) < room}
        owners = {}
        for request, limit in limits.items():
            shadow = self._follow(request)
            # The last guess is not computed: nothing comes after it.
            if self._reserve(shadow.own, shadow.own.num_pending_tokens + limit - 1, wanted):
                owners[shadow.own] = request
        token_ids: dict[Request, list[int]] = {}
        rows: dict[Request, list[int]] = {}
        kept: list[torch.Tensor] = []
        num_rows = 0
        # Those who are nearly there first, so that a long text to catch up with holds nobody up.
        active = sorted(owners, key=lambda own: own.num_pending_tokens)
        while active:
            scheduled = self._fit(active)
            ended = [own for own, count in scheduled.items() if count == own.num_pending_tokens]
            drawn, logits = self._step(scheduled, len(ended))
            active = []
            for i, (own, token) in enumerate(zip(ended, drawn, strict=True)):
                if token < 0:  # logits that are not numbers
                    continue
                request = owners[own]
                own.seq.append(token)
                token_ids.setdefault(request, []).append(token)
                rows.setdefault(request, []).append(num_rows + i)
                if len(token_ids[request]) < limits[request]:
                    active.append(own)
            if self.is_probabilistic and ended:
                kept.append(logits)
                num_rows += len(ended)
        return Drafts(token_ids, torch.cat(kept), rows) if kept else Drafts(token_ids)

    def _follow(self, request: Request) -> _Shadow:
        """The shadow of a request with exactly its tokens; what is in the cache of them stays."""
        shadow = self._shadows.get(request)
        if shadow is None:
            shadow = self._shadows[request] = _Shadow(self._make_own(request))
        seq, length = shadow.own.seq, len(request.seq)
        guessed, known = seq.tokens(shadow.num_agreed), request.seq.tokens(shadow.num_agreed)
        num_right = next((i for i, (a, b) in enumerate(zip(guessed, known, strict=False)) if a != b), None)
        agreed = shadow.num_agreed + (min(len(guessed), len(known)) if num_right is None else num_right)
        seq.num_computed = min(seq.num_computed, agreed, length - 1)  # the last token's logits are wanted
        seq.truncate(agreed)
        seq.extend(request.seq.tokens(agreed))
        shadow.num_agreed = length
        if seq.num_blocks == 0:
            self.kv.attach_prefix(shadow.own)
            shadow.num_remembered = seq.num_blocks
        # Only what the target has said may be shared; guesses never were.
        if (num_blocks := seq.num_computed // self.kv.block_size) > shadow.num_remembered:
            self.kv.remember(shadow.own)
            shadow.num_remembered = num_blocks
        return shadow

    def _make_own(self, request: Request) -> Request:
        p = request.params
        greedy = not self.is_probabilistic or p.temperature == 0
        return Request(
            request_id=request.request_id,
            index=request.index,
            params=SamplingParams(temperature=0)
            if greedy
            else SamplingParams(temperature=p.temperature, top_p=p.top_p, top_k=p.top_k, min_p=p.min_p),
            num_prompt_tokens=request.num_prompt_tokens,
            max_output_tokens=request.max_output_tokens,
            seq=type(request.seq)([]),
            seed=request.seed ^ _DRAFT_SEED,
            arrival=request.arrival,
            priority=request.priority,
            salt=request.salt,
            stop_token_ids=request.stop_token_ids,
            metrics=request.metrics,
        )

    def _reserve(self, own: Request, num_tokens: int, wanted: Mapping[Request, int]) -> bool:
        """Room for so many more tokens, if need be at the cost of requests that nobody asks about now."""
        if self.kv.reserve(own, num_tokens):
            return True
        for request, shadow in self._shadows.items():
            if request not in wanted and shadow.own.seq.num_blocks > 0:
                self.kv.release(shadow.own)
                if self.kv.reserve(own, num_tokens):
                    return True
        return False

    def _fit(self, active: list[Request]) -> Scheduled:
        scheduled, room = Scheduled(), self.runner.config.max_num_batched_tokens
        for own in active:
            if (count := min(own.num_pending_tokens, room)) > 0:
                scheduled[own] = count
                room -= count
        return scheduled

    def _step(self, scheduled: Scheduled, num_ended: int) -> tuple[list[int], torch.Tensor]:
        """One token for each sequence whose tokens are all in the step, and the logits (num_ended, vocab_size) that it is
        from."""
        logits, batch = self.runner.forward(scheduled, num_ended)
        for own, count in scheduled.items():
            own.seq.num_computed += count
        logits = logits[:, : self.vocab_size]
        if (missing := self.vocab_size - logits.shape[1]) > 0:
            logits = F.pad(logits, (0, missing), value=float("-inf"))
        columns = (batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.seed, batch.sample_position)
        drawn: list[int] = ops.sample(logits, *columns).tolist()
        # A graph writes its next logits over these.
        return drawn, logits.clone() if self.is_probabilistic else logits

    def release(self, request: Request) -> None:
        if (shadow := self._shadows.pop(request, None)) is not None:
            self.kv.release(shadow.own)

    def check(self) -> None:
        self.kv.check()


def check_same_vocabulary(target: Tokenizer, draft: Tokenizer, name: str) -> None:
    """Raises ValueError unless a token id means the same text in both models. name: the draft's."""
    ours, theirs = target.vocabulary(), draft.vocabulary()
    if ours == theirs:
        return
    if differing := sorted(text for text in ours.keys() & theirs.keys() if ours[text] != theirs[text]):
        text = differing[0]
        how = f"{text!r} is token {theirs[text]} there and {ours[text]} here"
    else:
        text = min(ours.keys() ^ theirs.keys())
        how = f"{text!r} is only in the {'target' if text in ours else 'draft'}'s"
    raise ValueError(
        f"speculative config: draft model {name!r} has another vocabulary than the target, expected the same: "
        f"{len(theirs)} tokens there and {len(ours)} here, and {how}"
    )
