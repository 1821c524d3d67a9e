"""Runs the model: owns the weights' device, the KV cache's memory and the step buffers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

import torch

from fastattn import ops
from fastattn._runtime import ScheduledBatch
from fastattn.engine.batch import Batch, BatchBuffers, Step, decode_shapes
from fastattn.engine.config import EngineConfig
from fastattn.engine.decode_shapes import DecodeShape
from fastattn.engine.graphs import DecodeGraphs
from fastattn.engine.host_memory import pin
from fastattn.engine.kv_cache import BlockCopy, Route
from fastattn.engine.kv_scales import warn_of_ones
from fastattn.engine.pooler import Pooler
from fastattn.engine.query_groups import group_size, in_groups
from fastattn.engine.ranks import RankGroup
from fastattn.engine.request import Needs, Request
from fastattn.engine.sampler import Draw, Sampler, token_logprobs
from fastattn.engine.scheduled import Scheduled
from fastattn.engine.trace import NO_TRACE, NoTrace
from fastattn.models.decoder import DecoderModel
from fastattn.nn import KVMemory, kv_cache_format

if TYPE_CHECKING:
    from fastattn.speculative.proposer import Drafts

logger = logging.getLogger("fastattn.engine")

# Static scales from fewer tokens are likely to be too small for what comes later.
_FEW_TOKENS = 128
# What sequences begin with is read once for all of them where that spares so many bytes of each layer's cache: an H200 reads
# them in 50 µs, and the two launches more take 15. Fewer sequences leave a tile of queries empty.
_CASCADE_BYTES = 200_000_000
_CASCADE_SEQS = 8


# Of a greedy step with so many rows tokens are drawn where the model is computed, in its CUDA graph too. For as many the head
# writes no logits (`ops.lm_head_sample`): 1.01 to 1.05 times as fast as `linear` and `sample` with 1 and 16 rows, 0.94 to 0.97
# with 64 (bench/results/lm_head.md). More rows would want more graphs, and gain nothing.
MOST_GREEDY_ROWS = 32


@dataclass(frozen=True)
class Computed:
    """What a step's forward pass gave: logits (num_logits, vocab_size), or of a greedy step token_ids (num_logits) int32;
    extra_logits: those of each run of `Step.extra_rows`; hidden (T, hidden_size), None where a graph was replayed."""

    logits: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    extra_logits: Sequence[torch.Tensor] = ()
    hidden: torch.Tensor | None = None


class Runner:
    """Computes one step at a time: ``launch({request: number of tokens}, drafts, copies)`` → what it will draw.

    A step is first a message (`Step` and the step buffer) and then a computation that needs nothing else, ``compute``: so the
    ranks of a group can repeat it, each with its part of the model.
    """

    def __init__(
        self,
        model: DecoderModel,
        config: EngineConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        step_memory: torch.Tensor | None = None,
        ranks: RankGroup | None = None,
        kv_scales: torch.Tensor | None = None,
        trace: NoTrace = NO_TRACE,
    ) -> None:
        """step_memory: the step buffer that all ranks of a group see. ranks: the others, for rank 0. kv_scales: what
        `load_kv_scales` gave; without them static scales are calibrated in the first step."""
        self.model, self.config, self.device, self.ranks, self.trace = model, config, device, ranks, trace
        if config.batch_invariant != model.batch_invariant:
            raise ValueError(
                f"Runner: config.batch_invariant is {config.batch_invariant}, expected the model's, {model.batch_invariant}"
            )
        c = model.config
        self.kv_memory = KVMemory(
            kv_cache_format(config.kv_cache_dtype, dtype, c.head_dim, config.kv_cache_scales),
            c.num_layers,
            config.num_kv_blocks,
            config.block_size,
            model.num_kv_heads,
            c.head_dim,
            device,
            kv_scales,
        )
        self.kv_cache = self.kv_memory.layers
        self.host_blocks = self.kv_memory.on_host(config.num_host_kv_blocks)
        if device.type == "cuda":
            for tensor in self.host_blocks:
                pin(tensor)
        self._calibrates = self.kv_memory.form.calibrated
        self._group_size: int | None = None  # of queries that come to attention together; None: those of a sequence
        if config.batch_invariant:
            form = self.kv_memory.form
            self._group_size = group_size(c.num_heads // c.num_kv_heads, c.sliding_window, form.has_token_scales)
        self.buffers = BatchBuffers(device, config, step_memory, mixes_keys=self.kv_memory.form.mixes_keys)
        self._cascade_keys: int | None = None  # that a cascade must spare
        if not (config.disable_cascade_attn or config.batch_invariant or c.sliding_window):
            per_key = self.kv_memory.form.bytes_per_token(1, model.num_kv_heads, c.head_dim)
            self._cascade_keys = -(-_CASCADE_BYTES // per_key)
        self.sampler = Sampler()
        self.pooler = Pooler()
        self.graphs: DecodeGraphs | None = None
        if device.type == "cuda" and config.use_cuda_graphs:
            self.graphs = DecodeGraphs(self._decode, decode_shapes(config))
            model.tp.captured(self.graphs.drop)

    @torch.inference_mode()
    def launch(
        self, scheduled: Scheduled, drafts: Drafts | None = None, copies: Sequence[BlockCopy] = ()
    ) -> Draw | None:
        """Queues a step, after the one before it. Tokens of that one that the host does not know yet are taken from the device
        (`TokenSequence.append_unknown`). None: nobody's next token comes of it."""
        self.trace.phase("build")
        step = self._fill(scheduled, self._is_greedy(scheduled))
        self.trace.phase("launch")
        needs = scheduled.batch.needs
        wanted = _prompt_rows(scheduled) if needs & Needs.PROMPT_LOGPROBS else []
        rows = tuple((first, len(targets)) for _, first, targets in wanted)
        if rows or copies:
            step = replace(step, extra_rows=rows, copies=tuple(copies))
        computed = self.compute(step)
        for (request, _, targets), logits in zip(wanted, computed.extra_logits, strict=True):
            ids = torch.tensor(targets, dtype=torch.int32, device=self.device)
            request.prompt_logprobs += token_logprobs(logits, ids, [request.params.prompt_logprobs or 0] * len(targets))
        if needs & Needs.POOLING:
            assert computed.hidden is not None
            self.pooler.pool(computed.hidden, scheduled)
        self.trace.phase("sample")
        num_drafted = scheduled.num_drafted
        if not num_drafted:
            return None
        # Without the rows that only fill up a graph.
        num_rows = scheduled.num_rows
        if computed.token_ids is not None:
            return Draw(num_drafted, computed.token_ids[:num_rows], None)
        assert computed.logits is not None
        batch = self._columns(step, num_rows)
        draw = self.sampler.launch(computed.logits[:num_rows], batch, num_drafted, scheduled.batch.draw_needs, drafts)
        self._tell(draw.token_ids)
        return draw

    @staticmethod
    def _is_greedy(scheduled: Scheduled) -> bool:
        """Whether nothing is wanted of the step's few rows but the token of the largest logit of each."""
        draws, needs = scheduled.num_drafted, scheduled.batch.draw_needs
        few = 0 < len(draws) == scheduled.num_rows <= MOST_GREEDY_ROWS
        return few and not needs & (Needs.OWN_LOGITS | Needs.CHANCE)

    def _tell(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Puts what a step drew where the next one looks up the tokens that the host does not know yet."""
        if self.buffers.drawn is not None:
            self.buffers.drawn[: token_ids.shape[0]].copy_(token_ids)
        return token_ids

    @torch.inference_mode()
    def forward(self, scheduled: Scheduled, num_rows: int) -> tuple[torch.Tensor, Batch]:
        """Logits (num_rows, vocab_size) of the sequences whose tokens are all in the step, and the columns to draw from
        them with; valid until the next step."""
        step = self._fill(scheduled)
        logits = self.compute(step).logits
        assert logits is not None
        return logits[:num_rows], self._columns(step, num_rows)

    def _columns(self, step: Step, num_rows: int) -> Batch:
        return self.buffers.view(step.num_tokens, step.num_seqs, num_rows, step.max_seqlen_q, step.cascade)

    @property
    def kv_block_bytes(self) -> int:
        """Of a block on all ranks, each counted as rank 0, which has the most."""
        num_ranks = 1 if self.ranks is None else self.ranks.size
        return self.kv_memory.nbytes // self.config.num_kv_blocks * num_ranks

    def compute(self, step: Step) -> Computed:
        """The forward pass of the step that lies in the host's buffer, on all ranks."""
        with self.trace.device_span(
            "capture" if step.capture else "step",
            tokens=step.num_tokens,
            sequences=step.num_seqs,
            graph=step.graph,
            cascade=step.cascade,
        ):
            if self.ranks is None:
                return self.compute_part(step)
            return self.ranks.run(step, lambda: self.compute_part(step))

    def follow(self, message: bytes) -> None:
        """The part of a rank other than 0. Returns when the host's buffer may be overwritten."""
        self.compute_part(Step.from_bytes(message))
        self.buffers.wait()

    @torch.inference_mode()
    def compute_part(self, step: Step) -> Computed:
        """This rank's part of the forward pass."""
        batch = self.buffers.load(step)
        if self._group_size is not None and step.max_seqlen_q > 1:
            attention = in_groups(batch.attention, *self.buffers.lengths(step), self._group_size)
            batch = replace(batch, attention=attention)
        if step.copies:
            self._copy_blocks(step.copies)
        if step.graph:
            assert self.graphs is not None
            graph = self.graphs.capture(step.shape, batch) if step.capture else self.graphs.get(step.shape)
            result = graph.replay()
            return Computed(token_ids=result) if step.greedy else Computed(result)
        if self._calibrates:
            hidden = self._calibrate(batch)
        else:
            hidden = self._hidden(batch)
        extra = [self.model.logits(hidden[first : first + count]) for first, count in step.extra_rows]
        rows = hidden[batch.logits_indices]
        if step.greedy:
            token_ids = self._tell(self.model.greedy(rows, batch.sampling))
            return Computed(token_ids=token_ids, extra_logits=extra, hidden=hidden)
        return Computed(self.model.logits(rows), extra_logits=extra, hidden=hidden)

    def _copy_blocks(self, copies: Sequence[tuple[int, int, int, int]]) -> None:
        """One launch for each route, in the order of the stream like all that reads and writes the cache: no copy waits on the
        host for another."""
        rows = torch.tensor(copies, dtype=torch.int32)
        table = (rows.pin_memory() if self.device.type == "cuda" else rows).to(self.device, non_blocking=True)
        blocks, end = self.kv_memory.by_layer, 0
        for route, of_route in groupby(copies, key=itemgetter(3)):
            start, end = end, end + sum(1 for _ in of_route)
            pairs = table[start:end, :2]
            if route == Route.WITHIN:
                ops.copy_blocks(self.kv_memory.by_token, pairs, table[start:end, 2].contiguous())
            elif route == Route.TO_HOST:
                ops.swap_blocks(blocks, self.host_blocks, pairs)
            else:
                ops.swap_blocks(self.host_blocks, blocks, pairs)

    def _fill(self, scheduled: Scheduled, greedy: bool = False) -> Step:
        """The step in the host's buffer: in the shape of a graph if it can have one, recorded if it is new, or as it is."""
        num_shared_blocks = self._num_shared_blocks(scheduled.batch)
        shape = self._graph_shape(scheduled.batch, num_shared_blocks > 0, greedy)
        if shape is not None and self.graphs is not None and shape not in self.graphs:
            self._record(shape)
        return self.buffers.fill_batch(scheduled.batch, shape, num_shared_blocks, greedy)

    def _record(self, shape: DecodeShape) -> None:
        """A step of padding alone is harmless to run and to record, but for what it draws: that of the last step is still wanted."""
        drawn = self.buffers.drawn
        kept = None if drawn is None else drawn.clone()
        self.compute(replace(self.buffers.fill([], [], shape), capture=True))
        if drawn is not None and kept is not None:
            drawn.copy_(kept)

    def _num_shared_blocks(self, batch: ScheduledBatch) -> int:
        """Blocks that all sequences begin with, if it is worth to read them once. Only of decode steps: where a prompt is computed
        attention is a small part."""
        if self._cascade_keys is None or not batch.only_decodes or self._calibrates:
            return 0
        return batch.num_shared_blocks(self.config.block_size, self._cascade_keys, _CASCADE_SEQS)

    def _graph_shape(self, batch: ScheduledBatch, cascade: bool, greedy: bool) -> DecodeShape | None:
        if self.graphs is None or len(batch) == 0 or self._calibrates:
            return None
        if not batch.only_decodes or batch.needs & (Needs.PROMPT_LOGPROBS | Needs.POOLING):
            return None
        shape = self.graphs.shapes.fit(len(batch), batch.total_tokens)
        return shape if shape is None else replace(shape, cascade=cascade, greedy=greedy)

    def _hidden(self, batch: Batch) -> torch.Tensor:
        hidden: torch.Tensor = self.model(batch.token_ids, batch.attention, self.kv_cache, batch.drawn)
        return hidden

    def _calibrate(self, batch: Batch) -> torch.Tensor:
        """Hidden states of the first step, which sets the static scales of the KV cache. If it fails, the next one does."""
        hidden = self._hidden(replace(batch, attention=replace(batch.attention, calibrate=True)))
        self._calibrates = False
        if self.model.tp.rank == 0:
            if batch.num_tokens < _FEW_TOKENS:
                logger.warning(
                    "the KV cache's scales were calibrated on %d tokens only, and are fixed now: "
                    "let a longer text be the first, or use kv_cache_scales='dynamic'",
                    batch.num_tokens,
                )
            assert self.kv_memory.scales is not None
            warn_of_ones(self.kv_memory.scales, "calibrated on zeros")
        return hidden

    def _decode(self, batch: Batch, greedy: bool, out: torch.Tensor | None) -> torch.Tensor:
        """A decode step: each sequence has its last token and drafts, so every row wants logits; or a token, if it is greedy."""
        inputs = (batch.token_ids, batch.attention, self.kv_cache, batch.drawn)
        if greedy:
            return self._tell(self.model.decode_greedy(*inputs, batch.sampling))
        return self.model.decode(*inputs, out)


def _prompt_rows(scheduled: Scheduled) -> list[tuple[Request, int, list[int]]]:
    """Whose prompt tokens are predicted in this step: (request, first row that predicts one, the tokens)."""
    wanted = []
    row = 0
    for request, num_tokens in scheduled.items():
        start, known = request.seq.num_computed, request.prompt_logprobs
        if request.params.prompt_logprobs is not None:
            if not known:
                known.append(None)  # nothing predicts the first token
            # A preempted request comes past its prompt again; what is known is not reported twice.
            end = min(start + num_tokens + 1, request.num_prompt_tokens)
            if end > len(known):
                wanted.append((request, row + len(known) - 1 - start, request.seq.tokens(len(known), end)))
        row += num_tokens
    return wanted
