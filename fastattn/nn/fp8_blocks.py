"""FP8 weights with a scale for each 128 × 128 block, as DeepSeek-V3's and Qwen3's checkpoints have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastattn import ops
from fastattn.nn.module import Weight, Weights, fixed_parameter
from fastattn.nn.quantized import FLOATS, Piece, QuantizedWeight, Rows, Scheme
from fastattn.nn.shard import Shard
from fastattn.reference import linear as dense
from fastattn.reference import quantized as reference
from fastattn.reference.quantized import FP8_BLOCK


@dataclass(frozen=True)
class Fp8BlockScheme:
    """W8A8 in e4m3: weights with a scale for 128 × 128 of a matrix; activations are rounded as they come, with a scale for 128
    columns of a token. scale_name: of the scales in the checkpoint, which weights are multiplied by."""

    scale_name: str = "weight_scale_inv"

    def weight(self, rows: int, columns: int, pieces: Sequence[Piece]) -> QuantizedWeight:
        return Fp8BlockWeight(rows, columns, self)

    def __str__(self) -> str:
        return "FP8 (W8A8), blocks of 128 x 128"


def can_merge(scheme: Scheme | None, pieces: Sequence[Piece]) -> bool:
    """Whether pieces that are stored so can be one matrix: with scales of blocks, each must begin where a block does."""
    return not isinstance(scheme, Fp8BlockScheme) or all(piece.rows.start % FP8_BLOCK == 0 for piece in pieces)


def _blocks(piece: Piece) -> Shard | None:
    """The shard of a tensor that has an entry for 128 rows, or columns, of the piece's matrix; the last may be for fewer."""
    shard = piece.shard
    if shard.length == shard.total:
        return None
    end = shard.start + shard.length
    if shard.start % FP8_BLOCK or (end % FP8_BLOCK and end != shard.total):
        what = "rows" if shard.dim == 0 else "columns"
        raise ValueError(
            f"{piece.name}: this rank's part is {shard.start} to {end} of {shard.total}, expected multiples of {FP8_BLOCK} {what}, "
            "a block; allowed is a tensor_parallel_size that cuts there"
        )
    return Shard(shard.dim, shard.start // FP8_BLOCK, -(-shard.length // FP8_BLOCK), -(-shard.total // FP8_BLOCK))


class Fp8BlockWeight(QuantizedWeight):
    fixed_dtypes = frozenset({"scale"})
    takes_activation = True

    def __init__(self, rows: int, columns: int, scheme: Fp8BlockScheme) -> None:
        super().__init__(rows, columns)
        self.scale_name = scheme.scale_name
        self.codes = fixed_parameter(torch.uint8, rows, columns)  # the bits of e4m3
        self.scale = fixed_parameter(torch.float32, -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))

    def stored(self, piece: Piece) -> Weights:
        yield Weight(f"{piece.name}.weight", self.codes[piece.rows], piece.shard, ("F8_E4M3",))
        yield Weight(f"{piece.name}.{self.scale_name}", self.scale[_block_rows(piece)], _blocks(piece), FLOATS)

    def finish(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            values = self.scale[_block_rows(piece)]
            wrong = values[~(values > 0) | values.isinf()]
            if wrong.numel():
                raise ValueError(
                    f"{piece.name}.{self.scale_name} has {float(wrong[0])}, expected finite numbers above 0"
                )

    def forward(self, x: Rows, bias: torch.Tensor | None, activation: str | None = None) -> torch.Tensor:
        assert isinstance(x, torch.Tensor)
        if self.packed is not None:
            return self.packed_forward(x, bias, activation)
        q, scale = ops.quantize_fp8_groups(x, activation=activation)
        return ops.fp8_block_linear(q, scale, self.codes.view(q.dtype), self.scale, bias, out_dtype=x.dtype)

    def dense_parts(self) -> list[torch.Tensor]:
        return [reference.fp8_block_weight(self.codes.view(torch.float8_e4m3fn), self.scale)]

    def packed_forward(self, x: Rows, bias: torch.Tensor | None, activation: str | None = None) -> torch.Tensor:
        assert self.packed is not None and isinstance(x, torch.Tensor)
        rows = reference.fp8_group_rows(*ops.quantize_fp8_groups(x, activation=activation))
        sums = dense.packed_linear(rows, self.packed[0], None)
        return reference.round_sums(sums, bias, x.dtype)


def _block_rows(piece: Piece) -> slice:
    return slice(piece.rows.start // FP8_BLOCK, -(-piece.rows.stop // FP8_BLOCK))
