"""The inputs of one step: a few sizes, one buffer on the host, one copy to the device, tensors that are views into it."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import torch

from fastattn._runtime import BatchBuilder, ScheduledBatch, TokenSequence
from fastattn.engine.config import EngineConfig
from fastattn.engine.decode_shapes import DecodeShape, DecodeShapes
from fastattn.models.decoder import Sampling
from fastattn.nn import AttentionMetadata
from fastattn.ops import CascadeLevel

_DTYPES = {"int32": torch.int32, "int64": torch.int64, "float32": torch.float32}
_STEP = struct.Struct("<10q")
_ROWS = struct.Struct("<2q")
_COPY = struct.Struct("<4i")
_MAX_BATCHES = 256  # of which views are kept


@dataclass(frozen=True)
class Step:
    """A step as a message: with the bytes of the step buffer it is all that a rank must know to compute its part.

    nbytes: of the step buffer that are in use. cascade: what all sequences begin with is read once (`CascadeLevel`). greedy: each
    row's temperature is 0, and its token is all that is wanted of it. graph: replay the CUDA graph of this shape, recording it
    first with ``capture``. extra_rows: (first row, count) runs among the tokens whose logits are wanted on top of those that
    `logits_indices` names. copies: (from, to, tokens, `Route`) of KV blocks, to be made first, in this order.
    """

    num_tokens: int
    num_seqs: int
    num_logits: int
    max_seqlen_q: int
    nbytes: int
    cascade: bool = False
    greedy: bool = False
    graph: bool = False
    capture: bool = False
    extra_rows: tuple[tuple[int, int], ...] = ()
    copies: tuple[tuple[int, int, int, int], ...] = ()

    def to_bytes(self) -> bytes:
        sizes = (self.num_tokens, self.num_seqs, self.num_logits, self.max_seqlen_q, self.nbytes)
        rows = b"".join(_ROWS.pack(*rows) for rows in self.extra_rows)
        copies = b"".join(_COPY.pack(*copy) for copy in self.copies)
        flags = (self.cascade, self.greedy, self.graph, self.capture)
        return _STEP.pack(*sizes, *flags, len(self.extra_rows)) + rows + copies

    @classmethod
    def from_bytes(cls, message: bytes) -> Step:
        tokens, seqs, logits, max_seqlen_q, nbytes, *flags, num_rows = _STEP.unpack_from(message)
        end = _STEP.size + num_rows * _ROWS.size
        rows = tuple((first, count) for first, count in _ROWS.iter_unpack(message[_STEP.size : end]))
        copies = tuple(_COPY.iter_unpack(message[end:]))
        cascade, greedy, graph, capture = map(bool, flags)
        return cls(tokens, seqs, logits, max_seqlen_q, nbytes, cascade, greedy, graph, capture, rows, copies)

    @property
    def shape(self) -> DecodeShape:
        return DecodeShape(self.num_seqs, self.num_tokens, self.max_seqlen_q, self.cascade, self.greedy)


@dataclass(frozen=True)
class Batch:
    """Views, valid until the next step. n is the number of rows whose next token is wanted.

    token_ids (T,) int32; drawn int32: what the step before drew, which ids below 0 stand for, None if the host
    knows all; logits_indices (n,) int32: the
    rows among the T; the sampling columns are all (n,).
    """

    num_tokens: int
    num_seqs: int
    num_logits: int
    token_ids: torch.Tensor
    drawn: torch.Tensor | None
    attention: AttentionMetadata
    logits_indices: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    sample_position: torch.Tensor

    @property
    def sampling(self) -> Sampling:
        return self.temperature, self.top_k, self.top_p, self.min_p, self.seed, self.sample_position


def decode_shapes(config: EngineConfig) -> DecodeShapes:
    return DecodeShapes(config.max_num_seqs, config.max_logits_per_seq, config.max_num_batched_tokens)


def step_builder(config: EngineConfig) -> BatchBuilder:
    """What writes the step buffer, and says where in it everything stands."""
    return BatchBuilder(
        config.max_num_batched_tokens,
        decode_shapes(config).max_num_seqs,
        config.max_blocks_per_seq,
        config.block_size,
        config.max_logits_per_seq,
    )


class BatchBuffers:
    """The step buffer on the host (pinned, for a GPU) and its twin on the device; all arrays stand at fixed places in both,
    so that a captured graph finds the next step's inputs where it found the last one's."""

    def __init__(
        self,
        device: torch.device,
        config: EngineConfig,
        host: torch.Tensor | None = None,
        *,
        mixes_keys: bool = False,
    ) -> None:
        """host: the memory to build in, uint8, if it is another's (ranks share it). mixes_keys: as the KV cache's
        (`KVCacheFormat`)."""
        self._mixes_keys = mixes_keys
        self.builder = step_builder(config)
        if host is None:
            host = torch.zeros(self.builder.nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.host = host
        self._host_address = host.data_ptr()
        self.device_buffer = self.host if device.type == "cpu" else torch.zeros_like(self.host, device=device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._views = {}
        self._batches: dict[tuple[int, int, int, int, bool], Batch] = {}  # by their sizes
        for name, (offset, dtype, shape) in self.builder.layout().items():
            torch_dtype = _DTYPES[dtype]
            count = torch.Size(shape).numel() * torch_dtype.itemsize
            self._views[name] = self.device_buffer[offset : offset + count].view(torch_dtype).view(shape)
        self.drawn: torch.Tensor | None = None
        if config.async_scheduling:
            self.drawn = torch.zeros(decode_shapes(config).max_num_seqs, dtype=torch.int32, device=device)

    def fill(self, sequences: list[TokenSequence], num_tokens: list[int], shape: DecodeShape | None = None) -> Step:
        """Writes the host's arrays for these sequences, ``num_tokens[i]`` of sequence i. shape: of the graph that will compute
        them; what is missing to it is made up by sequences that write nothing and see nothing."""
        return self.fill_batch(ScheduledBatch(sequences, num_tokens), shape)

    def fill_batch(
        self,
        batch: ScheduledBatch,
        shape: DecodeShape | None = None,
        num_shared_blocks: int = 0,
        greedy: bool = False,
    ) -> Step:
        """As `fill`, of what the scheduler gave. num_shared_blocks: that all sequences begin with and that are to be read once,
        in a shape that is a cascade if there is a shape. greedy: see `Step`; of a shape that is so if there is a shape."""
        self.wait()
        pad = (0, 0) if shape is None else (shape.num_seqs - len(batch), shape.num_tokens - batch.total_tokens)
        cascade = num_shared_blocks > 0 if shape is None else shape.cascade
        info = self.builder.build(self._host_address, batch, *pad, cascade, num_shared_blocks)
        max_seqlen_q = info.max_seqlen_q if shape is None else shape.max_seqlen_q
        sizes = (info.num_tokens, info.num_seqs, info.num_logits, max_seqlen_q, info.nbytes)
        return Step(*sizes, cascade, greedy if shape is None else shape.greedy, shape is not None)

    def load(self, step: Step) -> Batch:
        """Brings what was filled to the device, in the order of its stream."""
        if self._copied is not None:
            self.device_buffer[: step.nbytes].copy_(self.host[: step.nbytes], non_blocking=True)
            self._copied.record()
        return self.view(step.num_tokens, step.num_seqs, step.num_logits, step.max_seqlen_q, step.cascade)

    def lengths(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """What was filled: cu_seqlens_q (num_seqs + 1) and seqused_k (num_seqs), int32, on the host."""
        sizes = {"cu_seqlens_q": step.num_seqs + 1, "seqused_k": step.num_seqs}
        offsets = {name: offset for name, (offset, _, _) in self.builder.layout().items()}
        starts, used = (self.host[offsets[name] :][: 4 * n].view(torch.int32).numpy() for name, n in sizes.items())
        return starts, used

    def wait(self) -> None:
        """Returns when the host's buffer may be overwritten: a step without a token to sample does not wait for its copy."""
        if self._copied is not None:
            self._copied.synchronize()

    def view(self, num_tokens: int, num_seqs: int, num_logits: int, max_seqlen_q: int, cascade: bool) -> Batch:
        """The arrays of a step of these sizes. Decode steps have the same ones again and again, and fifteen views cost more than
        all else that the host does for such a step."""
        sizes = (num_tokens, num_seqs, num_logits, max_seqlen_q, cascade)
        batch = self._batches.get(sizes)
        if batch is None:
            if len(self._batches) == _MAX_BATCHES:
                self._batches.clear()
            batch = self._batches[sizes] = self._view(*sizes)
        return batch

    def _view(self, num_tokens: int, num_seqs: int, num_logits: int, max_seqlen_q: int, cascade: bool) -> Batch:
        v = self._views
        n = num_logits
        shared: CascadeLevel | None = None
        if cascade:
            row = slice(num_seqs, num_seqs + 1)
            ends = v["cu_seqlens_q"][num_seqs + 1 : num_seqs + 3]
            shared = CascadeLevel(ends, v["seqused_k"][row], v["block_table"][row], num_tokens)
        return Batch(
            num_tokens=num_tokens,
            num_seqs=num_seqs,
            num_logits=num_logits,
            token_ids=v["token_ids"][:num_tokens],
            drawn=self.drawn,
            attention=AttentionMetadata(
                positions=v["positions"][:num_tokens],
                slot_mapping=v["slot_mapping"][:num_tokens],
                cu_seqlens_q=v["cu_seqlens_q"][: num_seqs + 1],
                seqused_k=v["seqused_k"][:num_seqs],
                block_table=v["block_table"][:num_seqs],
                max_seqlen_q=max_seqlen_q,
                shared=shared,
                mixes_keys=self._mixes_keys,
            ),
            logits_indices=v["logits_indices"][:n],
            temperature=v["temperature"][:n],
            top_k=v["top_k"][:n],
            top_p=v["top_p"][:n],
            min_p=v["min_p"][:n],
            seed=v["seed"][:n],
            sample_position=v["sample_position"][:n],
        )
