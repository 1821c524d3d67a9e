"""Weights of few bits inside a linear layer: what a checkpoint stores for each format, and how it is multiplied with.

A scheme says how weights are stored; `scheme.weight(...)` makes the module that holds one. On a GPU that module keeps the packed
form, weights of 4 bits in tiles where there are kernels for those (`fastattn.nn.four_bits`). On a CPU, where no kernel reads it, `pack`
turns it into fp32 in oneDNN's layout: results are those of the operators, speed and memory are those of a dense model.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fastattn import ops
from fastattn.nn.module import Module, Weight, Weights, fixed_parameter
from fastattn.nn.shard import Shard
from fastattn.reference import linear as dense
from fastattn.reference import quantized as reference
from fastattn.reference.gated_linear import interleave_gate_up

FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Piece:
    """A layer of the checkpoint in a linear layer of ours, which may be several of them, one below the other.

    name: in the checkpoint. rows: where in our matrix. shard: the rows or columns of its own that are here.
    """

    name: str
    index: int
    rows: slice
    shard: Shard

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start

    def columns(self, per_entry: int, what: str) -> Shard | None:
        """The shard of a tensor that has an entry for ``per_entry`` columns of the matrix."""
        if self.shard.dim == 0 or self.shard.length == self.shard.total:
            return self.shard if self.shard.dim == 0 else None
        return self._over(per_entry, f"columns, {what}")

    def packed_rows(self, per_entry: int, what: str) -> Shard | None:
        """The shard of a tensor that has an entry for ``per_entry`` rows of the matrix."""
        if self.shard.dim == 1 or self.shard.length == self.shard.total:
            return None
        return self._over(per_entry, f"rows, {what}")

    def _over(self, per_entry: int, what: str) -> Shard:
        try:
            return self.shard.over(per_entry)
        except ValueError:
            s = self.shard
            raise ValueError(
                f"{self.name}: this rank's part is {s.start} to {s.start + s.length} of {s.total}, expected multiples of {per_entry} "
                f"{what}; allowed is a tensor_parallel_size that cuts there, or a model that is quantized in smaller groups"
            ) from None


@dataclass(frozen=True)
class EightBitRows:
    """Rows q (T, K) of int8 or e4m3 with a scale (T) each, for an x (T, K) in ``dtype``: a norm has rounded it already."""

    q: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.q.shape


Rows = torch.Tensor | EightBitRows


class QuantizedWeight(Module):
    """A matrix (rows, columns) in few bits. fixed_dtypes: the float parameters that do not follow the model's dtype; staged: those
    that are gone after ``finish``; packed_away: those that are empty after ``pack`` on a CPU. ``stored`` lists what the checkpoint has of a piece of it, ``finish`` checks and
    rearranges what was read, ``forward`` multiplies. can_be_batch_invariant: it minds ``batch_invariant``. rounds_to: what it rounds x of more than ``exact_rows`` to, with a scale a row;
    it then takes `EightBitRows` too. takes_activation: it may be called with a gated activation too, "silu" or
    "gelu_tanh", and an x that is (T, 2 columns), which is then rounded as it is activated. has_gates: rows may be gates and ups in
    turns (`interleave`), and ``gated`` multiplies with them."""

    packed: list[torch.Tensor] | None = None
    fixed_dtypes: frozenset[str] = frozenset()
    staged: frozenset[str] = frozenset()
    packed_away: frozenset[str] = frozenset({"codes", "scale"})
    takes_activation = False
    can_be_batch_invariant = False
    has_gates = False
    rounds_to: torch.dtype | None = None
    exact_rows = 0

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns

    @abstractmethod
    def stored(self, piece: Piece) -> Weights: ...

    def finish(self, pieces: Sequence[Piece]) -> None:
        """Called once, after everything was read."""

    @abstractmethod
    def forward(self, x: Rows, bias: torch.Tensor | None) -> torch.Tensor:
        """x (T, columns) → (T, rows)."""

    def interleave(self) -> None:
        """Puts its rows in turns, in their place: gates, then ups, as they were. Once, after loading, on a GPU."""
        raise NotImplementedError

    def gated(self, x: Rows, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
        """x (T, columns) → (T, rows / 2). Of rows in turns."""
        raise NotImplementedError

    @abstractmethod
    def dense_parts(self) -> list[torch.Tensor]:
        """The codes or numbers that x is multiplied with, fp32, cut along the columns if exactness asks for it."""

    @abstractmethod
    def packed_forward(self, x: Rows, bias: torch.Tensor | None) -> torch.Tensor:
        """`forward` with ``packed``."""

    def pack(self) -> None:
        """Lays the weight out for the CPU's matrix kernels, in its place; does nothing elsewhere."""
        own = dict(self.named_parameters(recurse=False))
        if _packs(own["codes"].device.type):
            self.packed = [dense.pack(part) for part in self.dense_parts()]
            for name in self.packed_away & own.keys():
                own[name].data = own[name].new_empty(0)

    def loaded_bytes(self, dtype: torch.dtype, device_type: str) -> dict[torch.dtype, int]:
        """What is left of it in memory after loading, by dtype, in a model of ``dtype`` on a device of that type."""
        gone = self.staged | (self.packed_away if _packs(device_type) else frozenset())
        found = {torch.float32: 4 * self.rows * self.columns} if _packs(device_type) else {}
        for name, weight in self.named_parameters(recurse=False):
            if name not in gone:
                own = dtype if weight.is_floating_point() and name not in self.fixed_dtypes else weight.dtype
                found[own] = found.get(own, 0) + weight.numel() * own.itemsize
        return found


def fp8_rows(x: Rows, activation: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in e4m3 and their scales."""
    return (x.q, x.scale) if isinstance(x, EightBitRows) else ops.quantize_fp8(x, activation=activation)


def _packs(device_type: str) -> bool:
    return device_type == "cpu" and torch._C._has_mkldnn


def set_rows(of_rows: torch.Tensor, of_pieces: torch.Tensor, pieces: Sequence[Piece], name: str) -> None:
    """Gives the rows of each piece the one scale ``name`` that the checkpoint has for it."""
    for piece, value in zip(pieces, of_pieces.tolist(), strict=True):
        if not 0 < value < float("inf"):
            raise ValueError(f"{piece.name}.{name} is {value}, expected a finite number above 0")
        of_rows[piece.rows] = value


def in_turns(*of_rows: torch.Tensor | None) -> None:
    """Gates, then ups, become gates and ups in turns (`interleave_gate_up`), in the memory where they are."""
    for both in of_rows:
        if both is not None:
            both.copy_(interleave_gate_up(*both.chunk(2)))


class Scheme(Protocol):
    """How a weight is stored: a value, equal to another of the same kind. str() of it names it for users."""

    def weight(self, rows: int, columns: int, pieces: Sequence[Piece]) -> QuantizedWeight: ...


@dataclass(frozen=True)
class Int8Scheme:
    """W8A8: int8 weights with a scale a row; activations are rounded to int8 as they come, with a scale a token, and a zero point
    unless symmetric."""

    symmetric: bool = True

    def weight(self, rows: int, columns: int, pieces: Sequence[Piece]) -> QuantizedWeight:
        return Int8Weight(rows, columns, self)

    def __str__(self) -> str:
        return f"INT8 (W8A8){'' if self.symmetric else ', zero points of activations'}"


class Int8Weight(QuantizedWeight):
    fixed_dtypes = frozenset({"scale"})
    packed_away = frozenset({"codes"})
    takes_activation = has_gates = True
    can_be_batch_invariant = True  # sums are exact

    def __init__(self, rows: int, columns: int, scheme: Int8Scheme) -> None:
        super().__init__(rows, columns)
        self.codes = fixed_parameter(torch.int8, rows, columns)
        self.scale = fixed_parameter(torch.float32, rows)
        self.rounds_to = torch.int8 if scheme.symmetric else None
        # Of each row's codes, for the zero points: of the columns that are here, as the tokens' scales are.
        self.sums = None if scheme.symmetric else fixed_parameter(torch.int32, rows)

    def stored(self, piece: Piece) -> Weights:
        yield Weight(f"{piece.name}.weight", self.codes[piece.rows], piece.shard, ("I8",))
        rows = piece.shard if piece.shard.dim == 0 else None
        yield Weight(f"{piece.name}.weight_scale", self.scale[piece.rows, None], rows, FLOATS)

    def finish(self, pieces: Sequence[Piece]) -> None:
        if self.sums is not None:
            self.sums.copy_(self.codes.sum(1, dtype=torch.int32))

    def _quantize(self, x: Rows, activation: str | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        if isinstance(x, EightBitRows):
            return x.q, x.scale, None
        if self.sums is not None:
            return ops.quantize_int8_asymmetric(x, activation=activation)
        return *ops.quantize_int8(x, activation=activation), None

    def forward(self, x: Rows, bias: torch.Tensor | None, activation: str | None = None) -> torch.Tensor:
        if self.packed is not None:
            return self.packed_forward(x, bias, activation)
        return self._product(*self._quantize(x, activation), bias, x.dtype)

    def _product(
        self,
        q: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        gates: str | None = None,
    ) -> torch.Tensor:
        zero = {"x_zero_point": zero_point, "weight_sum": self.sums}
        return ops.int8_linear(q, scale, self.codes, self.scale, bias, **zero, out_dtype=dtype, activation=gates)

    def interleave(self) -> None:
        in_turns(self.codes, self.scale, self.sums)

    def gated(self, x: Rows, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
        return self._product(*self._quantize(x, None), bias, x.dtype, activation)

    def dense_parts(self) -> list[torch.Tensor]:
        return [part.float() for part in torch.split(self.codes, reference.EXACT_COLUMNS, 1)]

    def packed_forward(self, x: Rows, bias: torch.Tensor | None, activation: str | None = None) -> torch.Tensor:
        assert self.packed is not None
        q, scale, zero_point = self._quantize(x, activation)
        parts = torch.split(q.float(), reference.EXACT_COLUMNS, 1)
        sums = [dense.packed_linear(part, weight, None) for part, weight in zip(parts, self.packed, strict=True)]
        return reference.scale_int8_sums(sums, scale, self.scale, bias, x.dtype, zero_point, self.sums)


@dataclass(frozen=True)
class Fp8Scheme:
    """W8A8 in e4m3: weights with a scale a row, or one for a matrix; activations are rounded as they come, with a scale a token."""

    one_scale: bool = False

    def weight(self, rows: int, columns: int, pieces: Sequence[Piece]) -> QuantizedWeight:
        return Fp8Weight(rows, columns, pieces, self)

    def __str__(self) -> str:
        return "FP8 (W8A8)"


class Fp8Weight(QuantizedWeight):
    fixed_dtypes = frozenset({"scale", "stored_scale"})
    staged = frozenset({"stored_scale"})
    packed_away = frozenset({"codes"})
    takes_activation = has_gates = True
    can_be_batch_invariant = True
    rounds_to = torch.float8_e4m3fn

    def __init__(self, rows: int, columns: int, pieces: Sequence[Piece], scheme: Fp8Scheme) -> None:
        super().__init__(rows, columns)
        self.codes = fixed_parameter(torch.uint8, rows, columns)  # the bits of e4m3
        self.scale = fixed_parameter(torch.float32, rows)
        # One for a matrix of the checkpoint, of which several may stand here.
        self.stored_scale = fixed_parameter(torch.float32, len(pieces)) if scheme.one_scale else None

    def stored(self, piece: Piece) -> Weights:
        yield Weight(f"{piece.name}.weight", self.codes[piece.rows], piece.shard, ("F8_E4M3",))
        if self.stored_scale is not None:
            own = self.stored_scale[piece.index : piece.index + 1]
            yield Weight(f"{piece.name}.weight_scale", own, None, FLOATS)
            return
        rows = piece.shard if piece.shard.dim == 0 else None
        yield Weight(f"{piece.name}.weight_scale", self.scale[piece.rows, None], rows, FLOATS)

    def finish(self, pieces: Sequence[Piece]) -> None:
        if self.stored_scale is not None:
            set_rows(self.scale, self.stored_scale, pieces, "weight_scale")
            self.stored_scale = None

    def forward(self, x: Rows, bias: torch.Tensor | None, activation: str | None = None) -> torch.Tensor:
        if self.packed is not None:
            return self.packed_forward(x, bias, activation)
        return self._product(*fp8_rows(x, activation), bias, x.dtype)

    def _product(
        self,
        q: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        gates: str | None = None,
    ) -> torch.Tensor:
        weight, invariant = self.codes.view(q.dtype), self.batch_invariant
        return ops.fp8_linear(
            q, scale, weight, self.scale, bias, out_dtype=dtype, batch_invariant=invariant, activation=gates
        )

    def interleave(self) -> None:
        in_turns(self.codes, self.scale)

    def gated(self, x: Rows, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
        return self._product(*fp8_rows(x), bias, x.dtype, activation)

    def dense_parts(self) -> list[torch.Tensor]:
        return [self.codes.view(torch.float8_e4m3fn).float()]

    def packed_forward(self, x: Rows, bias: torch.Tensor | None, activation: str | None = None) -> torch.Tensor:
        assert self.packed is not None
        q, scale = fp8_rows(x, activation)
        sums = dense.packed_linear(q.float(), self.packed[0], None, self.batch_invariant)
        return reference.scale_8bit_sums(sums, scale, self.scale, bias, x.dtype)
