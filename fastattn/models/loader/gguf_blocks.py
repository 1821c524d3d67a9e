"""How GGUF files store numbers: the types' names and sizes, and the decoding of those that we read.

A row is a sequence of blocks, a block some numbers in few bits with what scales them. Decoding is plain torch, so it runs where the
bytes are; each product and sum is rounded on its own, as in ggml's reference, and so the numbers are the same everywhere. Formats:
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockType:
    """numbers: in a block. nbytes: of a block."""

    name: str
    numbers: int
    nbytes: int


BLOCK_TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    9: BlockType("Q8_1", 32, 40),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    15: BlockType("Q8_K", 256, 292),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
    40: BlockType("NVFP4", 64, 36),
    41: BlockType("Q1_0", 128, 18),
}

# Stored as numbers of torch's.
PLAIN_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def decode_blocks(data: Tensor, kind: BlockType) -> Tensor:
    """data (rows, bytes per row) uint8 → (rows, columns) fp32. kind: one of `QUANTIZED_TYPES`."""
    blocks = data.reshape(-1, kind.nbytes)
    return _DECODERS[kind.name](blocks).reshape(data.shape[0], -1)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 numbers at that byte of each block: (blocks, 1) fp32."""
    return blocks[:, at : at + 2].view(torch.float16).float()


def _nibbles(codes: Tensor) -> Tensor:
    """(…, n) bytes → (…, 2n): all low halves, then all high ones."""
    return torch.cat((codes & 15, codes >> 4), -1)


def _bits(codes: Tensor, shifts: Tensor, mask: int) -> Tensor:
    """(…, n) bytes → (…, shifts, n): the fields that begin at those bits."""
    return (codes.unsqueeze(-2) >> shifts[:, None]) & mask


def _shifts(codes: Tensor, step: int) -> Tensor:
    return torch.arange(0, 8, step, dtype=torch.uint8, device=codes.device)


def _high_bits(blocks: Tensor, at: int) -> Tensor:
    """The fifth bits of 32 numbers, a bit each in 4 bytes, where they belong in a byte."""
    bits = _bits(blocks[:, at : at + 4, None], _shifts(blocks, 1), 1)
    return bits.reshape(-1, 32) << 4


def _q4_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 2:]).float().sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:]).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 6:]) | _high_bits(blocks, 2)
    return codes.float().sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 8:]) | _high_bits(blocks, 4)
    return codes.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of the 8 groups of a Q4_K or Q5_K block, 6 bits each in 12 bytes: (blocks, 8, 1) fp32, times the block's own."""
    low, mid, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((low & 0x3F, (high & 0x0F) | ((low >> 2) & 0x30)), -1)
    minima = torch.cat((mid & 0x3F, (high >> 4) | ((mid >> 2) & 0x30)), -1)
    return (scales.float() * _half(blocks, 0))[..., None], (minima.float() * _half(blocks, 2))[..., None]


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks)
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return codes.float().mul_(scales).sub_(minima)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks)
    high = _bits(blocks[:, 16:48], _shifts(blocks, 1), 1) << 4
    codes = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) | high
    return codes.float().mul_(scales).sub_(minima)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 8, 32)
    high = _bits(blocks[:, 128:192].reshape(-1, 2, 32), _shifts(blocks, 2), 3).reshape(-1, 8, 32) << 4
    scales = blocks[:, 192:208].view(torch.int8).float() * _half(blocks, 208)
    return (low | high).reshape(-1, 16, 16).float().sub_(32).mul_(scales[..., None])


def _q2_k(blocks: Tensor) -> Tensor:
    scales, minima = (
        (blocks[:, :16] & 15).float() * _half(blocks, 80),
        (blocks[:, :16] >> 4).float() * _half(blocks, 82),
    )
    codes = _bits(blocks[:, 16:80].reshape(-1, 2, 32), _shifts(blocks, 2), 3).reshape(-1, 16, 16)
    return codes.float().mul_(scales[..., None]).sub_(minima[..., None])


def _q3_k(blocks: Tensor) -> Tensor:
    low = _bits(blocks[:, 32:96].reshape(-1, 2, 32), _shifts(blocks, 2), 3).reshape(-1, 16, 16)
    high = _bits(blocks[:, :32], _shifts(blocks, 1), 1).reshape(-1, 16, 16) << 2
    scales = _nibbles(blocks[:, 96:104]) | (_bits(blocks[:, 104:108], _shifts(blocks, 2), 3).reshape(-1, 16) << 4)
    scales = scales.float().sub_(32).mul_(_half(blocks, 108))
    return (low | high).float().sub_(4).mul_(scales[..., None])


# What codes of IQ4 stand for: closer together around 0, where most weights are.
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _iq4_values(codes: Tensor) -> Tensor:
    values = torch.tensor(_IQ4_VALUES, dtype=torch.float32, device=codes.device)
    return values.index_select(0, codes.reshape(-1).int()).reshape(codes.shape)


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _iq4_values(_nibbles(blocks[:, 2:])).mul_(_half(blocks, 0))


def _iq4_xs(blocks: Tensor) -> Tensor:
    high = _bits(blocks[:, 2:4, None], _shifts(blocks, 2), 3).reshape(-1, 8) << 4
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), -1).reshape(-1, 8)
    scales = (low | high).float().sub_(32).mul_(_half(blocks, 0))
    return _iq4_values(_nibbles(blocks[:, 8:].reshape(-1, 8, 16))).mul_(scales[..., None])


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
QUANTIZED_TYPES = tuple(_DECODERS)
