"""FP4 weights: NVFP4 and MXFP4, with activations in 16 bits or in FP8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastattn import ops
from fastattn.nn.four_bits import FourBitWeight
from fastattn.nn.module import Weight, Weights, fixed_parameter
from fastattn.nn.quantized import Piece, QuantizedWeight, Rows, fp8_rows, set_rows
from fastattn.ops.four_bits import MAX_ROWS_OF_ORDER_8
from fastattn.reference import linear as dense
from fastattn.reference import quantize, w4_tiles
from fastattn.reference import quantized as reference


@dataclass(frozen=True)
class Fp4Scheme:
    """E2M1 weights with a scale for each group_size columns: 16 is NVFP4 (e4m3, and an fp32 scale for the whole matrix), 32 is
    MXFP4 (powers of two). Activations stay as they are (W4A16), or are rounded to e4m3 as they come, with a scale a token (W4A8); of
    up to 16 rows on GPUs of compute capability 9.0 they stay too, since rounding them takes longer than it saves."""

    group_size: int
    fp8_activations: bool = False

    def weight(self, rows: int, columns: int, pieces: Sequence[Piece]) -> QuantizedWeight:
        return Fp4Weight(rows, columns, pieces, self)

    def __str__(self) -> str:
        name = "NVFP4" if self.group_size == quantize.NVFP4_GROUP else "MXFP4"
        return f"{name} ({'W4A8' if self.fp8_activations else 'W4A16'})"


class Fp4Weight(FourBitWeight):
    fixed_dtypes = frozenset({"global_scale", "stored_global_scale"})
    staged = frozenset({"stored_global_scale"})

    def __init__(self, rows: int, columns: int, pieces: Sequence[Piece], scheme: Fp4Scheme) -> None:
        super().__init__(rows, columns)
        self.group_size, self.fp8_activations = scheme.group_size, scheme.fp8_activations
        self.tile_order = 8 if scheme.fp8_activations else 16
        self.takes_activation = scheme.fp8_activations
        self.rounds_to = torch.float8_e4m3fn if scheme.fp8_activations else None
        self.scale_types = ("F8_E4M3",) if self.group_size == quantize.NVFP4_GROUP else ("U8", "F8_E8M0")
        self.codes = fixed_parameter(torch.uint8, rows, -(-columns // 2))
        self.scale = fixed_parameter(torch.uint8, rows, -(-columns // self.group_size))
        # One for a matrix of the checkpoint; a row of ours each, because several of them may stand here.
        self.global_scale: torch.nn.Parameter | None = None
        self.stored_global_scale: torch.nn.Parameter | None = None
        self.row_factor: torch.Tensor | None = None  # of what `pack` has made, with activations in fp8
        if self.group_size == quantize.NVFP4_GROUP:
            self.global_scale = fixed_parameter(torch.float32, rows)
            self.stored_global_scale = fixed_parameter(torch.float32, len(pieces))

    @property
    def is_nvfp4(self) -> bool:
        return self.group_size == quantize.NVFP4_GROUP

    @property
    def exact_rows(self) -> int:  # type: ignore[override]
        """Up to so many rows the same tiles are read with x in 16 bits: in front of them a quantizer costs more than it saves."""
        return MAX_ROWS_OF_ORDER_8 if self.fp8_activations and self.in_tiles and self.codes.is_cuda else 0

    def stored(self, piece: Piece) -> Weights:
        yield Weight(
            f"{piece.name}.weight_packed", self.codes[piece.rows], piece.columns(2, "codes to a byte"), ("U8",)
        )
        groups = piece.columns(self.group_size, "a group")
        yield Weight(f"{piece.name}.weight_scale", self.scale[piece.rows], groups, self.scale_types)
        if self.stored_global_scale is not None:
            own = self.stored_global_scale[piece.index : piece.index + 1]
            yield Weight(f"{piece.name}.weight_global_scale", own, None, ("F32",))

    def finish(self, pieces: Sequence[Piece]) -> None:
        if self.stored_global_scale is None:
            return
        assert self.global_scale is not None
        set_rows(self.global_scale, self.stored_global_scale, pieces, "weight_global_scale")
        self.stored_global_scale = None

    def pack(self) -> None:
        if self.is_relative_on(self.codes.device.type):
            self.make_relative()
        super().pack()

    def is_relative_on(self, device_type: str) -> bool:
        """Whether scales become relative to their row's largest there, as MXFP4's in tiles are, with a global scale for the rest."""
        return device_type == "cuda" and self.group_size == quantize.MXFP4_GROUP

    def make_relative(self) -> None:
        scale, global_scale = w4_tiles.relative_mxfp4(self.scale, None)
        self.scale.copy_(scale)
        self.global_scale = torch.nn.Parameter(global_scale, requires_grad=False)

    def put_scales_in_tiles(self) -> None:
        if self.group_size == quantize.MXFP4_GROUP and self.global_scale is None:
            self.make_relative()
        self.scale.data = w4_tiles.pack_scales(self.scale.data, self.group_size)

    def loaded_bytes(self, dtype: torch.dtype, device_type: str) -> dict[torch.dtype, int]:
        found = super().loaded_bytes(dtype, device_type)
        if self.is_relative_on(device_type):
            found[torch.float32] = found.get(torch.float32, 0) + 4 * self.rows
        return found

    def as_stored(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.in_tiles:
            state["codes"] = w4_tiles.unpack_tiles(state["codes"], self.tile_order)
            state["scale"] = w4_tiles.unpack_scales(state["scale"])
        if self.group_size == quantize.MXFP4_GROUP and "global_scale" in state:
            state["scale"] = w4_tiles.absolute_mxfp4(state["scale"], state.pop("global_scale"))
        return state

    def as_packed(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.group_size == quantize.MXFP4_GROUP and self.global_scale is not None:
            state["scale"], state["global_scale"] = w4_tiles.relative_mxfp4(state["scale"], None)
        if self.in_tiles:
            state["codes"] = w4_tiles.pack_tiles(state["codes"], self.tile_order)
            state["scale"] = w4_tiles.pack_scales(state["scale"], self.group_size)
        return state

    def forward(self, x: Rows, bias: torch.Tensor | None, activation: str | None = None) -> torch.Tensor:
        if self.packed is not None:
            return self.packed_forward(x, bias, activation)
        weight = self.codes, self.scale, self.group_size, self.global_scale, bias
        if not self.fp8_activations:
            assert isinstance(x, torch.Tensor)
            return ops.fp4_linear(x, *weight)
        if self.exact_rows and isinstance(x, torch.Tensor) and x.shape[:-1].numel() <= self.exact_rows:
            if activation is not None:
                x = ops.swiglu(x) if activation == "silu" else ops.geglu(x)
            return ops.fp4_linear(x, *weight, tile_order=8)
        q, scale = fp8_rows(x, activation)
        return ops.fp4_fp8_linear(q, scale, *weight, out_dtype=x.dtype)

    def dense_parts(self) -> list[torch.Tensor]:
        if self.fp8_activations:
            codes, factor = reference.fp4_as_fp8(
                self.codes, self.scale, self.global_scale, self.group_size, self.columns
            )
            self.row_factor = factor
            return [codes.float()]
        # fp32 holds every product of a number and a scale, as x's dtype need not: the result is the same or nearer.
        return [reference.fp4_weight(self.codes, self.scale, self.group_size, self.columns, torch.float32)]

    def packed_forward(self, x: Rows, bias: torch.Tensor | None, activation: str | None = None) -> torch.Tensor:
        assert self.packed is not None
        if self.fp8_activations:
            assert self.row_factor is not None
            q, scale = fp8_rows(x, activation)
            sums = dense.packed_linear(q.float(), self.packed[0], None)
            return reference.scale_8bit_sums(sums, scale, self.row_factor, bias, x.dtype)
        assert isinstance(x, torch.Tensor)
        out = dense.packed_linear(x.float(), self.packed[0], None)
        return reference.scale_fp4_sums(out, self.global_scale, bias, x.dtype)
