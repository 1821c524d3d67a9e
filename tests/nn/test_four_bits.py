"""Weights of 4 bits in tiles: by the reference, results, memory and state are those of rows."""

from __future__ import annotations

import pytest
import torch

from fastattn import nn
from fastattn.nn.four_bits import FourBitWeight
from fastattn.nn.int4 import PackedInt4Weight
from fastattn.nn.quantized import Piece
from fastattn.nn.shard import Shard

SCHEMES = {
    "nvfp4": nn.Fp4Scheme(16),
    "mxfp4": nn.Fp4Scheme(32),
    "nvfp4 w4a8": nn.Fp4Scheme(16, fp8_activations=True),
    "mxfp4 w4a8": nn.Fp4Scheme(32, fp8_activations=True),
    "int4 groups": nn.Int4Scheme(64, symmetric=False),
    "int4 rows": nn.Int4Scheme(None, symmetric=True),
}
ROWS, COLUMNS = 48, 192


def make(scheme: nn.Scheme, rows: int = ROWS, columns: int = COLUMNS) -> FourBitWeight:
    torch.manual_seed(0)
    weight = scheme.weight(rows, columns, [Piece("w", 0, slice(0, rows), Shard.whole(rows))])
    assert isinstance(weight, FourBitWeight)
    for name, t in weight.named_parameters():
        if t.is_floating_point():
            t.data.copy_(torch.rand(t.shape) + 0.5)
        elif t.dtype is torch.int32:
            t.data.copy_(torch.randint(-(2**31), 2**31 - 1, t.shape, dtype=torch.int64))
        elif t.dtype is torch.int8:
            t.data.copy_(torch.randint(-8, 8, t.shape))
        elif name == "scale":
            t.data.copy_(torch.randint(90, 120, t.shape))
        else:
            t.data.copy_(torch.randint(0, 256, t.shape))
    for name in weight.staged:  # what `finish` leaves
        setattr(weight, name, None)
    if isinstance(weight, PackedInt4Weight):
        weight.packed_zero_points = torch.nn.ParameterList()
    return weight


def num_bytes(weight: FourBitWeight) -> int:
    return sum(t.untyped_storage().nbytes() for t in weight.parameters())


@pytest.mark.parametrize("name", SCHEMES)
def test_tiles_are_the_same_weight(name: str) -> None:
    weight, x = make(SCHEMES[name]), torch.randn(3, COLUMNS)
    bias = torch.randn(ROWS)
    expected, state = weight(x, bias), {key: t.clone() for key, t in weight.state_dict().items()}
    place = weight.codes.data_ptr()
    weight.put_in_tiles()
    assert weight.in_tiles and weight.codes.data_ptr() == place
    torch.testing.assert_close(weight(x, bias), expected, rtol=0, atol=0)
    weight.put_in_tiles()  # nothing more to do
    torch.testing.assert_close(weight(x, bias), expected, rtol=0, atol=0)
    # What is saved has rows, and what is loaded may have been.
    saved = weight.state_dict()
    assert saved.keys() == state.keys() and all(torch.equal(saved[key], t) for key, t in state.items())
    for t in weight.parameters():
        t.data.zero_()
    weight.load_state_dict(state)
    torch.testing.assert_close(weight(x, bias), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", SCHEMES)
def test_memory_is_what_a_plan_says(name: str) -> None:
    planned = sum(make(SCHEMES[name]).loaded_bytes(torch.float32, "cuda").values())
    weight = make(SCHEMES[name])
    weight.put_in_tiles()
    assert num_bytes(weight) == planned


def test_other_matrices_stay_rows() -> None:
    for scheme, rows, columns in (
        (nn.Fp4Scheme(16), 40, 192),
        (nn.Fp4Scheme(32), 48, 96),
        (nn.Int4Scheme(32, symmetric=True), 48, 192),
    ):
        weight = make(scheme, rows, columns)
        weight.put_in_tiles()
        assert weight.codes.shape[0] == rows and not weight.in_tiles
