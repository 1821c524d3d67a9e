"""The inputs of one step as tensors: one buffer on the host, one copy to the device, views into it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastattn._runtime import BatchBuilder, TokenSequence
from fastattn.nn import AttentionMetadata

_DTYPES = {"int32": torch.int32, "int64": torch.int64, "float32": torch.float32}


@dataclass(frozen=True)
class Batch:
    """Views, valid until the next step. n is the number of rows whose next token is wanted.

    token_ids (T,) int32; logits_indices (n,) int32: their rows among the T; the sampling columns are all (n,).
    """

    num_tokens: int
    num_seqs: int
    num_logits: int
    token_ids: torch.Tensor
    attention: AttentionMetadata
    logits_indices: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    sample_position: torch.Tensor


class BatchBuffers:
    """The step buffer on the host (pinned, for a GPU) and its twin on the device; all arrays stand at fixed places in both,
    so that a captured graph finds the next step's inputs where it found the last one's."""

    def __init__(
        self, device: torch.device, max_num_tokens: int, max_num_seqs: int, max_blocks_per_seq: int, block_size: int
    ) -> None:
        self.builder = BatchBuilder(max_num_tokens, max_num_seqs, max_blocks_per_seq, block_size)
        self.host = torch.zeros(self.builder.nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.device_buffer = self.host if device.type == "cpu" else torch.zeros_like(self.host, device=device)
        self._views = {}
        for name, (offset, dtype, shape) in self.builder.layout().items():
            torch_dtype = _DTYPES[dtype]
            count = torch.Size(shape).numel() * torch_dtype.itemsize
            self._views[name] = self.device_buffer[offset : offset + count].view(torch_dtype).view(shape)

    def fill(self, sequences: list[TokenSequence], num_tokens: list[int], pad_num_seqs: int = 0) -> Batch:
        """Writes the arrays for these sequences, ``num_tokens[i]`` of sequence i, and ``pad_num_seqs`` empty rows after them."""
        info = self.builder.build(self.host.data_ptr(), sequences, num_tokens, pad_num_seqs)
        if self.device_buffer is not self.host:
            self.device_buffer[: info.nbytes].copy_(self.host[: info.nbytes], non_blocking=True)
        return self.view(info.num_tokens, info.num_seqs, info.num_logits, info.max_seqlen_q)

    def view(self, num_tokens: int, num_seqs: int, num_logits: int, max_seqlen_q: int) -> Batch:
        v = self._views
        n = num_logits
        block_table = v["block_table"][:num_seqs]
        return Batch(
            num_tokens=num_tokens,
            num_seqs=num_seqs,
            num_logits=num_logits,
            token_ids=v["token_ids"][:num_tokens],
            attention=AttentionMetadata(
                positions=v["positions"][:num_tokens],
                slot_mapping=v["slot_mapping"][:num_tokens],
                cu_seqlens_q=v["cu_seqlens_q"][: num_seqs + 1],
                seqused_k=v["seqused_k"][:num_seqs],
                block_table=block_table,
                max_seqlen_q=max_seqlen_q,
            ),
            logits_indices=v["logits_indices"][:n],
            temperature=v["temperature"][:n],
            top_k=v["top_k"][:n],
            top_p=v["top_p"][:n],
            min_p=v["min_p"][:n],
            seed=v["seed"][:n],
            sample_position=v["sample_position"][:n],
        )
