"""INT4 weights with 16-bit activations, from the layouts of three families of tools: compressed-tensors', GPTQ's and AWQ's.

    here              codes (N, K / 8): a row's columns in a word, the first in its lowest bits    scale (N, G)
    compressed-tensors the same
    GPTQ              qweight (K / 8, N): the same words, transposed                               scales (G, N)
    AWQ               qweight (K, N / 8): rows in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7      scales (G, N)

N rows (outputs), K columns (inputs), G groups of columns. What has another order is read into the memory where it will stay, which has
the same size, and put in order there, one matrix after the other.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastattn import ops
from fastattn.nn.four_bits import FourBitWeight
from fastattn.nn.module import Weight, Weights, empty_parameter, fixed_parameter
from fastattn.nn.quantized import FLOATS, Piece, QuantizedWeight, Rows
from fastattn.nn.shard import Shard
from fastattn.reference import linear as dense
from fastattn.reference import quantize, w4_tiles
from fastattn.reference import quantized as reference


@dataclass(frozen=True)
class Int4Scheme:
    """W4A16: INT4 weights with a scale, and a zero point unless symmetric, for each group_size columns (None: for the row)."""

    group_size: int | None
    symmetric: bool

    def weight(self, rows: int, columns: int, pieces: Sequence[Piece]) -> QuantizedWeight:
        return PackedInt4Weight(rows, columns, pieces, self)

    def __str__(self) -> str:
        groups = "rows" if self.group_size is None else f"groups of {self.group_size}"
        return f"INT4 (W4A16), {groups}{'' if self.symmetric else ', zero points'}"


@dataclass(frozen=True)
class GptqScheme(Int4Scheme):
    """zero_minus_one: zero points are stored one too low, as all but the format's second version do. ordered: columns are in groups
    by g_idx (desc_act), so that x's are put in their order before each product."""

    zero_minus_one: bool = True
    ordered: bool = False

    def weight(self, rows: int, columns: int, pieces: Sequence[Piece]) -> QuantizedWeight:
        return GptqWeight(rows, columns, pieces, self)

    def __str__(self) -> str:
        return f"{super().__str__()}{', columns in the order of g_idx' if self.ordered else ''} (GPTQ)"


@dataclass(frozen=True)
class AwqScheme(Int4Scheme):
    def weight(self, rows: int, columns: int, pieces: Sequence[Piece]) -> QuantizedWeight:
        return AwqWeight(rows, columns, pieces, self)

    def __str__(self) -> str:
        return f"{super().__str__()} (AWQ)"


class Int4Weight(FourBitWeight):
    packed_away = frozenset({"codes", "scale", "zero_point", "order"})

    def __init__(self, rows: int, columns: int, scheme: Int4Scheme) -> None:
        super().__init__(rows, columns)
        self.group_size = scheme.group_size or max(columns, 1)
        self.is_grouped = scheme.group_size is not None
        self.num_groups = -(-columns // self.group_size)
        self.codes = fixed_parameter(torch.int32, rows, -(-columns // 8))
        self.scale = empty_parameter(rows, self.num_groups)
        self.zero_point = None if scheme.symmetric else fixed_parameter(torch.int8, rows, self.num_groups)
        self.order: torch.nn.Parameter | None = None  # (K) int32: which column of x each of ours is multiplied with

    @property
    def fits_tiles(self) -> bool:
        whole = self.group_size % w4_tiles.COLUMNS == 0 or self.num_groups == 1
        return super().fits_tiles and whole

    def as_stored(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.in_tiles:
            state["codes"] = w4_tiles.unpack_tiles(state["codes"], self.tile_order)
        return state

    def as_packed(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.in_tiles:
            state["codes"] = w4_tiles.pack_tiles(state["codes"], self.tile_order)
        return state

    def groups(self, piece: Piece) -> Shard | None:
        """The shard of a tensor that has an entry for a group of columns."""
        return piece.columns(self.group_size, "a group") if self.is_grouped or piece.shard.dim == 0 else None

    @abstractmethod
    def stored(self, piece: Piece) -> Weights: ...

    def forward(self, x: Rows, bias: torch.Tensor | None) -> torch.Tensor:
        assert isinstance(x, torch.Tensor)
        if self.packed is not None:
            return self.packed_forward(x, bias)
        if self.order is not None:
            x = x.index_select(-1, self.order)
        return ops.int4_linear(x, self.codes, self.scale, self.group_size, self.zero_point, bias)

    def dense_parts(self) -> list[torch.Tensor]:
        weight = reference.int4_weight(self.codes, self.scale, self.zero_point, self.group_size, self.columns).float()
        return [weight if self.order is None else weight[:, self.order.long().argsort()]]

    def packed_forward(self, x: Rows, bias: torch.Tensor | None) -> torch.Tensor:
        assert self.packed is not None and isinstance(x, torch.Tensor)
        out = dense.packed_linear(x.float(), self.packed[0], None if bias is None else bias.float())
        return out.to(x.dtype)


class PackedInt4Weight(Int4Weight):
    """As compressed-tensors has it (pack-quantized)."""

    staged = frozenset({"shapes"})

    def __init__(self, rows: int, columns: int, pieces: Sequence[Piece], scheme: Int4Scheme) -> None:
        super().__init__(rows, columns, scheme)
        # What the checkpoint has beside, read whole and gone after `finish`: shapes, and zero points packed along the rows.
        self.shapes: torch.nn.Parameter | None = fixed_parameter(torch.int64, len(pieces), 2)
        words = [] if scheme.symmetric else [-(-piece.num_rows // 8) for piece in pieces]
        self.packed_zero_points = torch.nn.ParameterList(
            fixed_parameter(torch.int32, n, self.num_groups) for n in words
        )

    def stored(self, piece: Piece) -> Weights:
        yield Weight(
            f"{piece.name}.weight_packed", self.codes[piece.rows], piece.columns(8, "codes to a word"), ("I32",)
        )
        groups = self.groups(piece)
        yield Weight(f"{piece.name}.weight_scale", self.scale[piece.rows], groups, FLOATS)
        assert self.shapes is not None
        yield Weight(f"{piece.name}.weight_shape", self.shapes[piece.index], None, ("I64", "I32"))
        if self.zero_point is None:
            return
        shard = groups if piece.shard.dim == 1 else piece.packed_rows(8, "zero points to a word")
        yield Weight(f"{piece.name}.weight_zero_point", self.packed_zero_points[piece.index], shard, ("I32",))

    def finish(self, pieces: Sequence[Piece]) -> None:
        assert self.shapes is not None
        for piece, shape in zip(pieces, self.shapes.tolist(), strict=True):
            total = piece.shard.total
            expected = [total, self.columns] if piece.shard.dim == 0 else [piece.num_rows, total]
            if shape != expected:
                raise ValueError(f"{piece.name}.weight_shape is {shape}, expected {expected}")
        if self.zero_point is not None:
            for piece in pieces:
                words = self.packed_zero_points[piece.index]
                self.zero_point[piece.rows] = quantize.unpack_int4_zero_points(words, piece.num_rows)
        self.shapes, self.packed_zero_points = None, torch.nn.ParameterList()


class ColumnsFirstInt4Weight(Int4Weight):
    """As GPTQ's and AWQ's tools have it: the transpose of ours, zero points packed along the rows."""

    def __init__(self, rows: int, columns: int, pieces: Sequence[Piece], scheme: Int4Scheme) -> None:
        super().__init__(rows, columns, scheme)
        words = [piece.num_rows // 8 for piece in pieces]
        self.packed_zero_points = torch.nn.ParameterList(
            fixed_parameter(torch.int32, self.num_groups, n) for n in words
        )

    def stored(self, piece: Piece) -> Weights:
        if self.columns % 8 or piece.num_rows % 8:
            raise ValueError(
                f"{piece.name}: this rank's part is {piece.num_rows} x {self.columns}, expected multiples of 8, codes to a word"
            )
        yield self._stored_codes(piece)
        by_rows, groups = piece.shard.dim == 0, self.groups(piece)
        scale = self.scale[piece.rows].view(self.num_groups, piece.num_rows)
        yield Weight(f"{piece.name}.scales", scale, _transposed(groups), FLOATS)
        zeros = piece.packed_rows(8, "zero points to a word") if by_rows else groups
        yield Weight(f"{piece.name}.qzeros", self.packed_zero_points[piece.index], _transposed(zeros), ("I32",))

    @abstractmethod
    def _stored_codes(self, piece: Piece) -> Weight: ...

    @abstractmethod
    def _codes(self, stored: torch.Tensor, piece: Piece) -> torch.Tensor:
        """(N, K / 8), of what was read in its place."""

    @abstractmethod
    def _zeros(self, words: torch.Tensor) -> torch.Tensor:
        """(G, N / 8) int32 → (G, N) uint8, the unsigned code of 0."""

    def finish(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            codes, scale = self.codes[piece.rows], self.scale[piece.rows]
            codes.copy_(self._codes(codes, piece))
            scale.copy_(scale.view(self.num_groups, piece.num_rows).t().clone())
            zeros = self._zeros(self.packed_zero_points[piece.index]).t()
            if self.zero_point is not None:
                self.zero_point[piece.rows] = zeros.to(torch.int8) - 8
            elif not bool((zeros == 8).all()):
                raise ValueError(
                    f"{piece.name}.qzeros has zero points other than 8, expected none in a symmetric model"
                )
        self.packed_zero_points = torch.nn.ParameterList()


class GptqWeight(ColumnsFirstInt4Weight):
    """AutoGPTQ's and GPTQModel's layout (Frantar et al., "GPTQ"): (code − zero) · scale of the column's group, which is g_idx[column]."""

    def __init__(self, rows: int, columns: int, pieces: Sequence[Piece], scheme: GptqScheme) -> None:
        super().__init__(rows, columns, pieces, scheme)
        self.zero_minus_one = scheme.zero_minus_one
        self.group_indices = torch.nn.ParameterList(fixed_parameter(torch.int32, columns) for _ in pieces)
        if scheme.ordered:
            self.order = fixed_parameter(torch.int32, columns)

    def stored(self, piece: Piece) -> Weights:
        if self.order is not None and piece.shard.dim == 1 and piece.shard.length != piece.shard.total:
            raise ValueError(
                f"{piece.name}: its columns are in the order of g_idx (desc_act), which ranks cannot share; "
                "allowed is a tensor_parallel_size of 1"
            )
        yield from super().stored(piece)
        shard = _transposed(piece.shard) if piece.shard.dim == 1 else None
        yield Weight(f"{piece.name}.g_idx", self.group_indices[piece.index], shard, ("I32",))

    def finish(self, pieces: Sequence[Piece]) -> None:
        first_column = pieces[0].shard.start if pieces[0].shard.dim == 1 else 0
        columns = torch.arange(self.columns, device=self.codes.device)
        in_order = (first_column + columns) // self.group_size if self.is_grouped else torch.zeros_like(columns)
        for piece in pieces:
            found = self.group_indices[piece.index]
            if self.order is None:
                if not torch.equal(found, in_order.int()):
                    raise ValueError(
                        f"{piece.name}.g_idx is not in order, expected column / group_size without desc_act"
                    )
            elif not torch.equal(found.sort().values, in_order.int()):
                raise ValueError(f"{piece.name}.g_idx does not give each group {self.group_size} columns")
            elif not torch.equal(found, self.group_indices[0]):
                raise ValueError(f"{piece.name}.g_idx is not that of {pieces[0].name}, which has the same input")
        if self.order is not None:
            self.order.copy_(self.group_indices[0].argsort(stable=True))
        super().finish(pieces)
        self.group_indices = torch.nn.ParameterList()

    def _stored_codes(self, piece: Piece) -> Weight:
        words = self.codes[piece.rows].view(self.columns // 8, piece.num_rows)
        return Weight(f"{piece.name}.qweight", words, _transposed(piece.columns(8, "codes to a word")), ("I32",))

    def _codes(self, stored: torch.Tensor, piece: Piece) -> torch.Tensor:
        words = stored.view(self.columns // 8, piece.num_rows).t().contiguous()
        if self.order is None:
            return words
        return quantize.pack_int4(quantize.unpack_int4(words, self.columns).index_select(1, self.order))

    def _zeros(self, words: torch.Tensor) -> torch.Tensor:
        zeros = _nibbles(words)
        return zeros + 1 & 15 if self.zero_minus_one else zeros


class AwqWeight(ColumnsFirstInt4Weight):
    """AutoAWQ's layout (Lin et al., "AWQ", version "gemm")."""

    def _stored_codes(self, piece: Piece) -> Weight:
        by_rows = piece.shard.dim == 0
        shard = piece.packed_rows(8, "codes to a word") if by_rows else piece.columns(1, "")
        words = self.codes[piece.rows].view(self.columns, piece.num_rows // 8)
        return Weight(f"{piece.name}.qweight", words, _transposed(shard), ("I32",))

    def _codes(self, stored: torch.Tensor, piece: Piece) -> torch.Tensor:
        rows = _awq_nibbles(stored.view(self.columns, piece.num_rows // 8)).t()
        return quantize.pack_int4(rows.to(torch.int8) - 8)

    def _zeros(self, words: torch.Tensor) -> torch.Tensor:
        return _awq_nibbles(words)


def _transposed(shard: Shard | None) -> Shard | None:
    return None if shard is None else Shard(1 - shard.dim, shard.start, shard.length, shard.total)


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """(A, B) int32 → (A, 8 B) uint8, the lowest first."""
    codes: torch.Tensor = quantize.unpack_int4(words, 8 * words.shape[1]) + 8
    return codes.to(torch.uint8)


def _awq_nibbles(words: torch.Tensor) -> torch.Tensor:
    """Nibble i of a word is entry 0, 2, 4, 6, 1, 3, 5, 7."""
    places = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7], device=words.device)
    return _nibbles(words).view(len(words), -1, 8).index_select(2, places).flatten(1)
