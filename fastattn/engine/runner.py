"""Runs the model: owns the weights' device, the KV cache's memory and the step buffers."""

from __future__ import annotations

import torch

from fastattn.engine.batch import Batch, BatchBuffers
from fastattn.engine.config import EngineConfig
from fastattn.engine.graphs import DecodeGraphs
from fastattn.engine.request import Request
from fastattn.engine.sampler import Sampled, Sampler, token_logprobs
from fastattn.models.decoder import DecoderModel


class Runner:
    """Computes one step at a time: ``execute({request: number of tokens})`` → sampled tokens."""

    def __init__(self, model: DecoderModel, config: EngineConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.config, self.device = model, config, device
        c = model.config
        # Layout, here and nowhere else: (layer, k or v, block, token in block, KV head, head dim). Uninitialized on purpose:
        # no operator reads a slot that was not written.
        self.kv_memory = torch.empty(
            (c.num_layers, 2, config.num_kv_blocks, config.block_size, c.num_kv_heads, c.head_dim),
            dtype=dtype,
            device=device,
        )
        self.kv_cache = [(layer[0], layer[1]) for layer in self.kv_memory]
        self.buffers = BatchBuffers(
            device, config.max_num_batched_tokens, config.max_num_seqs, config.max_blocks_per_seq, config.block_size
        )
        self.sampler = Sampler()
        self.graphs: DecodeGraphs | None = None
        if device.type == "cuda" and config.use_cuda_graphs:
            self.graphs = DecodeGraphs(self._forward, self.buffers, config.max_num_seqs)

    @torch.inference_mode()
    def execute(self, scheduled: dict[Request, int]) -> Sampled:
        requests, num_tokens = list(scheduled), list(scheduled.values())
        sequences = [r.seq for r in requests]
        decodes = all(r.num_pending_tokens == 1 and r.params.prompt_logprobs is None for r in requests)
        graph = self.graphs.find(len(requests)) if self.graphs is not None and decodes else None
        if graph is not None:
            batch = self.buffers.fill(sequences, num_tokens, graph.num_seqs - len(requests))
            logits = graph.replay()
        else:
            batch = self.buffers.fill(sequences, num_tokens)
            hidden = self._hidden(batch)
            self._prompt_logprobs(hidden, scheduled)
            logits = self.model.logits(hidden[batch.logits_indices])
        sampling = [r for r, n in scheduled.items() if n == r.num_pending_tokens]
        if not sampling:
            return Sampled([], [], [])
        if len(sampling) < batch.num_logits:  # rows that only fill up a graph
            batch = self.buffers.view(batch.num_tokens, batch.num_seqs, len(sampling), 1)
        return self.sampler.sample(logits[: len(sampling)], batch, sampling)

    def _hidden(self, batch: Batch) -> torch.Tensor:
        hidden: torch.Tensor = self.model(batch.token_ids, batch.attention, self.kv_cache)
        return hidden

    def _forward(self, batch: Batch) -> torch.Tensor:
        """A decode step: each sequence has one token, so every row wants logits."""
        return self.model.logits(self._hidden(batch))

    def _prompt_logprobs(self, hidden: torch.Tensor, scheduled: dict[Request, int]) -> None:
        row = 0
        for request, num_tokens in scheduled.items():
            start, count, known = request.seq.num_computed, request.params.prompt_logprobs, request.prompt_logprobs
            if count is not None:
                if not known:
                    known.append(None)  # nothing predicts the first token
                # A preempted request comes past its prompt again; what is known is not reported twice.
                end = min(start + num_tokens + 1, request.num_prompt_tokens)
                if end > len(known):
                    targets = request.seq.tokens(len(known), end)
                    rows = hidden[row + len(known) - 1 - start : row + end - 1 - start]
                    ids = torch.tensor(targets, dtype=torch.int32, device=self.device)
                    known += token_logprobs(self.model.logits(rows), ids, [count] * len(targets))
            row += num_tokens
