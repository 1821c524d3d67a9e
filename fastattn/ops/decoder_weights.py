"""What `decode_layers` takes of a decoder: its layers' weights, plain or in 4 bits, and its head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fastattn.reference.w4_tiles import COLUMNS as TILE_COLUMNS


@dataclass(frozen=True)
class DecoderWeights:
    """Of each layer: qkv ((H + 2 Hk) D, N), out (N, H D), gate_up (2 I, N) in turns of eight rows (`fastattn.nn.interleave_gate_up`),
    down (N, I); qkv and gate_up with the norm's weight in front of them folded in (`fastattn.nn.fold_rms_norm`). Empty or one a layer:
    qkv_bias ((H + 2 Hk) D), q_norm and k_norm (D). All contiguous."""

    qkv: Sequence[Tensor]
    out: Sequence[Tensor]
    gate_up: Sequence[Tensor]
    down: Sequence[Tensor]
    qkv_bias: Sequence[Tensor] = field(default=())
    q_norm: Sequence[Tensor] = field(default=())
    k_norm: Sequence[Tensor] = field(default=())

    @property
    def intermediate_size(self) -> int:
        return int(self.down[0].shape[-1])


@dataclass(frozen=True)
class Fp4Tiles:
    """A matrix (rows, K) of each layer in NVFP4, as `pack_w4_tiles` and `pack_w4_scales` make it: codes (rows/16, K/64, 512) and scale
    (rows/16, K/64, 64) uint8, global_scale (rows) fp32, which sums are divided by. All contiguous."""

    codes: Sequence[Tensor]
    scale: Sequence[Tensor]
    global_scale: Sequence[Tensor]


@dataclass(frozen=True)
class DecoderFp4Weights:
    """Of each layer: qkv ((H + 2 Hk) D, N), out (N, H D), gate_up (2 I, N), gates in front of all ups, down (N, I), in tiles of
    tile_order, and the norms' weights in front of qkv and gate_up, (N) in the stream's dtype, as is what may be empty: qkv_bias
    ((H + 2 Hk) D), q_norm and k_norm (D). All contiguous."""

    qkv: Fp4Tiles
    out: Fp4Tiles
    gate_up: Fp4Tiles
    down: Fp4Tiles
    input_norm: Sequence[Tensor]
    mlp_norm: Sequence[Tensor]
    tile_order: int = 16
    qkv_bias: Sequence[Tensor] = field(default=())
    q_norm: Sequence[Tensor] = field(default=())
    k_norm: Sequence[Tensor] = field(default=())

    @property
    def intermediate_size(self) -> int:
        return int(self.down.codes[0].shape[1]) * TILE_COLUMNS


@dataclass(frozen=True)
class DecoderHead:
    """What is in front of the layers and behind them: the stream begins as `embedding(token_ids, embedding, drawn=drawn)`, and
    logits become `linear(rms_norm(stream, norm), weight)`. token_ids (T) int32, drawn (R) int32 or None; embedding and weight
    (V, N), which may be the same, V a multiple of 8, norm (N); logits (T, V), written. All contiguous, in the stream's dtype."""

    token_ids: Tensor
    drawn: Tensor | None
    embedding: Tensor
    norm: Tensor
    weight: Tensor
    logits: Tensor
