"""So many requests through the engine on a CPU, with all that may happen to one, and nothing may be left of them:

    nice python -m tests.harness.engine_soak 1000000            the three kinds of engine in turn
    nice python -m tests.harness.engine_soak 100000 guessing

The forward pass is a sum over what the KV cache holds of a sequence, so every token of every answer has one right value, and
a block that was lost, mixed up or written too early gives another one. Requests come at random in bursts: prompts with shared
beginnings, several completions, stop strings, end tokens, priorities, tenants, resumed answers, aborts; the cache is too small
for them (preemptions, a tier in host memory), some steps fail, some requests find the queue full. Now and then all is drained,
the engine is checked, sleeps and wakes up, and Python's objects and the process' memory are counted: neither may grow.

Exit status 1, and what was wrong, at the first answer or count that is not as it should be.
"""

from __future__ import annotations

import gc
import logging
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from fastattn import nn, ops
from fastattn.engine.config import EngineConfig
from fastattn.engine.engine import Engine, EngineBusyError
from fastattn.engine.outputs import RequestOutput
from fastattn.engine.runner import Runner
from fastattn.engine.sampling_params import SamplingParams
from fastattn.models.decoder import DecoderModel, Sampling
from fastattn.speculative.config import SpeculativeConfig
from fastattn.speculative.costs import DraftBudget
from tests.engine import tiny

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "overlapped": {"async_scheduling": True, "policy": "fair", "num_host_kv_blocks": 100},
    "guessing": {
        "speculative": SpeculativeConfig(method="ngram", num_speculative_tokens=3, prompt_lookup_min=1, prompt_lookup_max=3),
        "policy": "priority",
        "num_host_kv_blocks": 100,
    },
}  # fmt: skip
SIZES = {
    "max_model_len": 128,
    "num_kv_blocks": 150,
    "block_size": 8,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 256,
    "max_num_waiting": 60,
}
LETTERS = [tiny._VOCAB[letter] for letter in "cdefgh"]  # no two of them are a token of their own
REQUESTS_BETWEEN_CHECKS = 5000
# What pools, lists and the allocator keep after a warm-up of some checks; a leak of one object a request is 5000 more each time.
MAX_MORE_BLOCKS, MAX_MORE_BYTES = 2000, 24 << 20


class SoakError(AssertionError):
    """What the engine did is not what it should."""


class HashModel(torch.nn.Module):
    """Next token: a hash of the sums, over all tokens of the sequence, of what their places in the cache hold. Every so many
    calls it raises RuntimeError."""

    num_kv_heads, tp, batch_invariant = 1, nn.ALONE, False

    def __init__(self, seed: int, calls_between_faults: int) -> None:
        super().__init__()
        self.config = replace(
            tiny.CONFIG, num_layers=1, layer_is_sliding=(False,), num_heads=1, num_kv_heads=1, head_dim=8
        )
        shape = (SIZES["max_model_len"], self.config.vocab_size)
        generator = torch.Generator().manual_seed(seed)
        # Sums of 128 such numbers are exact in fp32.
        self.tables = [torch.randint(1, 2**14, shape, generator=generator).float() for _ in range(2)]
        self.lists: list[list[list[int]]] = [[[int(x) for x in row] for row in table.tolist()] for table in self.tables]
        self.letters = torch.tensor([*LETTERS, tiny.EOS])
        self.calls_between_faults, self.num_calls = calls_between_faults, 0

    def forward(
        self, token_ids: torch.Tensor, meta: nn.AttentionMetadata, kv_cache: Any, drawn: torch.Tensor | None = None
    ) -> torch.Tensor:
        """→ (T, 1) fp32: the index in `letters` of the token that comes next."""
        self.num_calls += 1
        if self.num_calls % self.calls_between_faults == 0:
            raise RuntimeError("a fault that was planted")
        ids = token_ids.long()
        if drawn is not None:
            ids = torch.where(ids < 0, drawn[(-1 - ids).clamp(min=0)].long(), ids)
            ids.clamp_(min=0)  # of a sequence that has ended
        positions, slots = meta.positions.long(), meta.slot_mapping.long()
        sequence = torch.repeat_interleave(meta.cu_seqlens_q.diff().long())
        # (S, longest) slots of each sequence; what is past its end is not looked at.
        longest = int(meta.seqused_k.max())
        place = torch.arange(longest)
        block_size = kv_cache[0][0].shape[1]
        held = meta.block_table.long()[:, place // block_size] * block_size + place % block_size
        valid = place < meta.seqused_k[:, None]
        held.masked_fill_(~valid, 0)
        sums = []
        for cache, table in zip(kv_cache[0][:2], self.tables, strict=True):
            flat = cache.view(-1, cache.shape[-1])
            flat[slots] = table[positions, ids][:, None]
            before = flat[:, -1][held].masked_fill_(~valid, 0).cumsum(1)
            sums.append(before[sequence, positions].long())
        return _hash(*sums).float()[:, None]

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """One token has all of the probability, at any temperature."""
        logits = torch.full((hidden.shape[0], self.config.vocab_size), -1e6)
        return logits.scatter_(1, self.letters[hidden.long()], 0.0)

    def greedy(self, hidden: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        return ops.sample(self.logits(hidden), *sampling)

    def answer(self, prompt: Sequence[int], max_tokens: int, ignore_eos: bool) -> list[int]:
        """The tokens that come after a prompt, the end token among them."""
        first, second = (sum(row[t] for row, t in zip(table, prompt, strict=False)) for table in self.lists)
        tokens: list[int] = []
        for position in range(len(prompt), len(prompt) + max_tokens):
            index = _hash(first, second)
            tokens.append(tiny.EOS if index == len(LETTERS) else LETTERS[index])
            if index == len(LETTERS) and not ignore_eos:
                break
            first, second = (
                s + table[position][tokens[-1]] for s, table in zip((first, second), self.lists, strict=True)
            )
        return tokens


def _hash(first: Any, second: Any) -> Any:
    """Of sums, numbers or tensors: an index of `LETTERS`, or once in 41 times their number."""
    mixed = (first * 31 + second * 17) % 8191
    is_end = mixed % 41 == 0
    return mixed % len(LETTERS) * (1 - is_end * 1) + is_end * len(LETTERS)


@dataclass
class Wanted:
    """A request that was taken, and what must come of it. spoken: `text` with the stop string that ends it, whose beginning an
    aborted request gives out."""

    tokens: list[int]
    text: str
    spoken: str
    reason: tuple[str, int | str | None]
    n: int
    given: list[list[int]]
    texts: list[str]
    is_delta: bool


@dataclass
class Soak:
    """One engine, and what was sent to it."""

    kind: str
    seed: int = 0
    calls_between_faults: int = 5003
    counts: Counter[str] = field(default_factory=Counter)
    warm: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.model = HashModel(self.seed, self.calls_between_faults)
        config = EngineConfig(**(SIZES | KINDS[self.kind]))
        runner = Runner(cast(DecoderModel, self.model), config, torch.device("cpu"), torch.float32)
        speculator = tiny.make_speculator(config, cast(DecoderModel, self.model), None)
        self.engine = Engine(
            runner, config, tiny.make_tokenizer(), speculator, reload=lambda: cast(DecoderModel, self.model)
        )
        self.alive: dict[str, Wanted] = {}
        self.beginnings = [self._letters(self.rng.randint(4, 48)) for _ in range(60)]

    def run(
        self, num_requests: int, between_checks: int = REQUESTS_BETWEEN_CHECKS, warm_checks: int = 4
    ) -> Counter[str]:
        """Returns how often what happened. Raises SoakError."""
        due = between_checks
        while self.counts["taken"] < num_requests:
            self._arrivals(num_requests)
            self._aborts()
            self._step()
            if self.counts["taken"] >= min(due, num_requests):
                due += between_checks
                self._check(warm_checks)
        return self.counts

    # ---- what is sent ----

    def _letters(self, count: int) -> list[int]:
        return self.rng.choices(LETTERS, k=count)

    def _arrivals(self, num_requests: int) -> None:
        """Bursts and lulls: from none to more than a step can take."""
        self.counts["steps"] += 1
        rate = 6.0 * (1 + math.sin(self.counts["steps"] / 150))
        for _ in range(int(self.rng.expovariate(1) * rate + 0.5)):
            if self.counts["taken"] < num_requests:
                self._add()

    def _add(self) -> None:
        rng, name = self.rng, str(self.counts["taken"])
        prompt = (rng.choice(self.beginnings) + self._letters(rng.randint(0, 12)))[: rng.randint(1, 56)]
        max_tokens = rng.choice((1, 2, 3, 4, 5, 8, 8, 12, 40))
        params = SamplingParams(
            n=rng.choice((1, 1, 1, 1, 1, 1, 1, 3)),
            temperature=rng.choice((0.0, 1.0)),
            top_p=rng.choice((1.0, 0.9)),
            max_tokens=max_tokens,
            ignore_eos=rng.random() < 0.3,
            stop=rng.choice((None, None, ["cde", "hh"])),
            output_kind=rng.choice(("delta", "cumulative", "final")),
        )
        wanted = self._wanted(prompt, params)
        resumed = None
        if rng.random() < 0.05 and params.n == 1:
            resumed = [wanted.tokens[: rng.randint(0, len(wanted.tokens))]]
            if wanted.is_delta:
                wanted.given = [list(resumed[0])]
                wanted.texts = [""]  # its text begins within the answer
        try:
            self.engine.add_request(
                name,
                {"prompt_token_ids": prompt},
                params,
                priority=rng.randrange(3),
                tenant=rng.choice(("", "a", "b")),
                resume_token_ids=resumed,
            )
        except EngineBusyError:
            self.counts["refused"] += 1
            return
        self.alive[name] = wanted
        self.counts["taken"] += 1
        self.counts["resumed"] += resumed is not None

    def _wanted(self, prompt: list[int], params: SamplingParams) -> Wanted:
        assert params.max_tokens is not None
        tokens = self.model.answer(prompt, params.max_tokens, params.ignore_eos)
        reason: tuple[str, int | str | None] = ("length", None)
        if tokens[-1] == tiny.EOS and not params.ignore_eos:
            reason = ("stop", tiny.EOS)
        text = spoken = ""
        letters = dict(zip(LETTERS, "cdefgh", strict=True))
        for count, token in enumerate(tokens, 1):
            text = spoken = text + letters.get(token, "")  # the end token has no text
            found = next((stop for stop in params.stop_strings if text.endswith(stop)), None)
            if found is not None and token != tiny.EOS:
                tokens, text, reason = tokens[:count], text[: -len(found)], ("stop", found)
                break
        empty: list[list[int]] = [[] for _ in range(params.n)]
        return Wanted(tokens, text, spoken, reason, params.n, empty, [""] * params.n, params.output_kind == "delta")

    def _aborts(self) -> None:
        if self.alive and self.rng.random() < 0.15:
            name = self.rng.choice(list(self.alive))
            output = self.engine.abort_request(name)
            _expect(output is not None and output.finished, f"request {name} was aborted and is not finished: {output}")
            assert output is not None
            self._look_at(output)

    # ---- what comes back ----

    def _step(self) -> None:
        for output in self.engine.step():
            self._look_at(output)

    def _look_at(self, output: RequestOutput) -> None:
        name = output.request_id
        wanted = self.alive.get(name)
        _expect(wanted is not None, f"an output of request {name}, which had ended")
        assert wanted is not None
        for completion in output.outputs:
            i = completion.index
            if wanted.is_delta:
                wanted.given[i] += completion.token_ids
                wanted.texts[i] += completion.text
            else:
                wanted.given[i], wanted.texts[i] = list(completion.token_ids), completion.text
            given, reason = wanted.given[i], completion.finish_reason
            what = f"request {name}, completion {i}: {given}, {wanted.texts[i]!r}, {reason!r}, expected {wanted}"
            _expect(given == wanted.tokens[: len(given)], what)
            if reason in ("abort", "error"):
                _expect(wanted.texts[i] in wanted.spoken, what)
                planted = reason == "abort" or "a fault that was planted" in str(completion.stop_reason)
                _expect(planted, f"{what}: {completion.stop_reason}")
            elif reason is not None:
                _expect(given == wanted.tokens and (reason, completion.stop_reason) == wanted.reason, what)
                _expect(wanted.text.endswith(wanted.texts[i]), what)
            else:
                _expect(wanted.texts[i] in wanted.text, what)
            if output.finished:
                _expect(reason is not None, f"{what}: finished without a reason")
                self.counts[str(reason)] += 1
        if output.finished:
            del self.alive[name]
            self.counts["ended"] += 1

    # ---- what is left ----

    def _check(self, warm_checks: int) -> None:
        for _ in range(10_000):
            if not self.engine.has_unfinished_requests():
                break
            self._step()
        _expect(not self.alive, f"{len(self.alive)} requests never ended: {list(self.alive)[:5]}")
        _expect(self.counts["ended"] == self.counts["taken"], f"{self.counts}")
        tiny.assert_idle(self.engine)
        kv = self.engine.kv
        if kv.host is not None:
            kv.take_copies()  # of what was evicted for the last step, if it failed to be let in
            _expect(kv.host.num_used <= self.engine.config.num_host_kv_blocks, "more host blocks than there are")
        self.counts["checks"] += 1
        self.engine.sleep(1 + self.counts["checks"] % 2)
        _expect(
            kv.pool.num_free == self.engine.config.num_kv_blocks, f"{kv.pool.num_free} blocks are free of a sleeper"
        )
        _expect(kv.host is None or kv.host.num_used == 0, "host blocks are held for a sleeper")
        self.engine.wake_up()
        stats = self.engine.stats()
        self.counts["preemptions"], self.counts["host hits"] = stats.num_preemptions, stats.num_host_hit_tokens
        self.counts["prefix hits"], self.counts["accepted"] = stats.num_prefix_hit_tokens, stats.num_accepted_tokens
        self.counts["tokens"] = stats.num_generated_tokens
        self._count_memory(warm_checks)

    def _count_memory(self, warm_checks: int) -> None:
        self.engine.runner.buffers._batches.clear()  # up to 256 sizes of steps, as they come
        if (speculator := self.engine.speculator) is not None and speculator._budget is not None:
            # What steps took, by their sizes in quarters of octaves: hundreds of entries, the last after 100,000 requests.
            speculator._budget = DraftBudget(speculator.config.num_speculative_tokens)
        gc.collect()
        now = sys.getallocatedblocks(), _resident_bytes()
        if self.counts["checks"] <= warm_checks or self.warm is None:
            self.warm = now
        blocks, resident = now[0] - self.warm[0], now[1] - self.warm[1]
        self.counts["more Python blocks"], self.counts["more KiB"] = blocks, resident >> 10
        _expect(blocks <= MAX_MORE_BLOCKS, f"Python holds {blocks} more blocks than after the warm-up, {self.counts}")
        _expect(
            resident <= MAX_MORE_BYTES, f"the process has {resident} bytes more than after the warm-up, {self.counts}"
        )


def _expect(is_so: bool, what: str) -> None:
    if not is_so:
        raise SoakError(what)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main(arguments: list[str], say: Callable[[str], None] = print) -> int:
    if len(arguments) not in (1, 2) or not arguments[0].isdigit() or (arguments[1:] and arguments[1] not in KINDS):
        raise SystemExit(__doc__)
    torch.set_num_threads(1)
    logging.getLogger("fastattn.engine").setLevel(logging.CRITICAL)  # of every fault that is planted
    kinds = arguments[1:] or list(KINDS)
    for kind in kinds:
        began = time.monotonic()
        try:
            counts = Soak(kind).run(int(arguments[0]) // len(kinds))
        except SoakError as error:
            say(f"{kind}: {error}")
            return 1
        say(f"{kind}: {time.monotonic() - began:.0f} s, {dict(counts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
