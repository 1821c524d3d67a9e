"""Weights of 4 bits in a model: as checkpoints have them, or on GPUs of compute capability 9.0 in tiles, as its kernels take them."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch

from fastattn.nn.quantized import QuantizedWeight
from fastattn.reference import w4_tiles

_CODES_AT_A_TIME = 1 << 22  # are put in tiles: each is an int64 for a moment


class FourBitWeight(QuantizedWeight):
    """A matrix with ``codes``, two to a byte, which `pack` puts in tiles where that GPU's kernels take them, in the memory where they
    are. Its state has rows all the same, whatever lies here. tile_order: of the columns in a tile, by what x will be."""

    codes: torch.nn.Parameter
    tile_order = 16

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(rows, columns)
        self.register_state_dict_post_hook(_rows_of_state)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_tiles_of_state)  # type: ignore[no-untyped-call]

    @property
    def in_tiles(self) -> bool:
        return self.codes.dim() == 3

    @property
    def fits_tiles(self) -> bool:
        """A matrix of whole tiles."""
        return self.rows % w4_tiles.ROWS == 0 and self.columns > 0 and self.columns % w4_tiles.COLUMNS == 0

    def pack(self) -> None:
        super().pack()
        if self.codes.is_cuda and torch.cuda.get_device_capability(self.codes.device) == (9, 0):
            self.put_in_tiles()

    def put_in_tiles(self) -> None:
        """Once, after loading, if the matrix fits; on any device."""
        if not self.fits_tiles or self.in_tiles:
            return
        rows_at_a_time = max(_CODES_AT_A_TIME // self.columns // w4_tiles.ROWS, 1) * w4_tiles.ROWS
        for rows in torch.split(self.codes, rows_at_a_time):
            rows.copy_(w4_tiles.pack_tiles(rows, self.tile_order).view(rows.shape))
        self.codes.data = self.codes.data.view(self.rows // w4_tiles.ROWS, self.columns // w4_tiles.COLUMNS, -1)
        self.put_scales_in_tiles()

    def put_scales_in_tiles(self) -> None:
        """What goes with that."""

    @abstractmethod
    def as_stored(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Our tensors, by name, as they were before `pack`."""

    @abstractmethod
    def as_packed(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse."""


def _moved(state: dict[str, Any], prefix: str, change: Any) -> None:
    own = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
    state.update({prefix + name: t for name, t in change({key[len(prefix) :]: t for key, t in own.items()}).items()})


def _rows_of_state(module: FourBitWeight, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    _moved(state, prefix, module.as_stored)


def _tiles_of_state(module: FourBitWeight, state: dict[str, Any], prefix: str, *others: Any) -> None:
    if f"{prefix}codes" in state:
        _moved(state, prefix, module.as_packed)
