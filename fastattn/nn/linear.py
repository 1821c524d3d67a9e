"""Linear layers: one matrix, or several of a checkpoint stacked into one so that they cost a single launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastattn import ops
from fastattn.nn.fp8_blocks import can_merge
from fastattn.nn.from_torch import linear_tensors
from fastattn.nn.module import Module, Weight, Weights, empty_parameter
from fastattn.nn.quantized import EightBitRows, Piece, QuantizedWeight, Rows, Scheme
from fastattn.nn.shard import Shard
from fastattn.reference import linear as reference
from fastattn.reference.norm_linear import fold_rms_norm

_FOLDED_ROWS = 4096  # at a time: they are in fp64 for a moment


@dataclass
class NormInside:
    """RMSNorm of the residual stream inside the products behind it, and what goes from product to product: the sums that the
    one which added to the stream has found of its rows (`ops.linear(…, with_sums=True)`), where it is to find them."""

    eps: float
    takes_sums: bool
    sums: torch.Tensor | None = None


class Linear(Module):
    """y = x Wᵀ + b, with W (out_features, in_features) as in ``torch.nn.Linear``.

    shard: the rows of W (dim 0) or its columns (dim 1) that this rank holds. With rows it computes those features of y; with
    columns it takes those of x, and the sum of y over ranks, which is the caller's to make, is the layer's.

    For inference: W and b are uninitialized until they are loaded, and have no gradient. bias: False, where torch's is True.
    """

    packed: torch.Tensor | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        shard: Shard | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.quantized: QuantizedWeight | None = (
            None  # here: a class attribute would hide the module that it may become
        )
        self.shard = shard or Shard.whole(out_features)
        rows = self.shard.length if self.shard.dim == 0 else out_features
        columns = self.shard.length if self.shard.dim == 1 else in_features
        self.weight = empty_parameter(rows, columns, device=device, dtype=dtype)
        # One rank brings the bias into a sum.
        self.bias_shard = self.shard
        if self.shard.dim == 1:
            self.bias_shard = Shard(0, 0, out_features if self.shard.start == 0 else 0, out_features)
        self.has_bias = bias
        self.bias = empty_parameter(rows, device=device, dtype=dtype) if bias and self.bias_shard.length else None

    @classmethod
    def from_float(cls, linear: torch.nn.Linear) -> Linear:
        """The layer that does what torch's does, with the same weight and bias and the same names in its state; for inference.

        linear: bf16 or fp16, on a CPU also fp32. Raises TypeError for another module, and for one with another dtype or a forward
        of its own, ValueError for one with forward hooks.
        """
        weight, bias = linear_tensors("Linear", "linear", linear)
        layer = Linear(linear.in_features, linear.out_features, bias is not None, device="meta")
        state = {"weight": weight} | ({} if bias is None else {"bias": bias})
        layer.load_state_dict(state, assign=True)
        return layer.requires_grad_(False).train(linear.training)

    def forward(self, x: Rows, residual: torch.Tensor | None = None, norm: NormInside | None = None) -> torch.Tensor:
        """residual: added before the result is rounded; of a plain weight. norm: that of the stream which the
        result is, for which its sums are left."""
        if self.quantized is not None:
            assert residual is None, "a residual is added to the result of a plain weight"
            out: torch.Tensor = self.quantized(x, self.bias)
            return out
        assert not isinstance(x, EightBitRows), "rows in 8 bits are for a weight that takes them"
        if residual is not None and norm is not None and norm.takes_sums:
            out, norm.sums = ops.linear(x, self.weight, self.bias, residual=residual, with_sums=True)
            return out
        if residual is not None:
            return ops.linear(x, self.weight, self.bias, residual=residual)
        if self.packed is not None:
            return reference.packed_linear(x, self.packed, self.bias, self.batch_invariant)
        return ops.linear(x, self.weight, self.bias, batch_invariant=self.batch_invariant)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.has_bias}"

    def rounds_to(self, num_rows: int) -> torch.dtype | None:
        """The 8 bits that it rounds an x of so many rows to, with a scale a row: it takes x so, too."""
        quantized = self.quantized
        return None if quantized is None or num_rows <= quantized.exact_rows else quantized.rounds_to

    @property
    def is_plain(self) -> bool:
        """The weight is here as one matrix of numbers."""
        return self.quantized is None and self.packed is None and self.weight.numel() > 0

    def fold_norm(self, norm_weight: torch.Tensor) -> None:
        """Takes over the weight of the RMS norm in front: from now on the layer is for what a norm without one gives. A plain
        weight, in the memory where it is."""
        for rows in torch.split(self.weight, _FOLDED_ROWS):
            rows.copy_(fold_rms_norm(norm_weight, rows))

    def pieces(self, name: str) -> list[Piece]:
        """The checkpoint's layers that this one, ``name`` in the model, is made of."""
        return [Piece(name, 0, slice(0, self.num_rows), self.shard)]

    @property
    def num_rows(self) -> int:
        """Rows of the matrix that is here, whatever it is stored as."""
        return self.quantized.rows if self.quantized is not None else self.weight.shape[0]

    def quantize(self, schemes: Sequence[Scheme | None]) -> None:
        """Stores each piece's weight as its scheme says, None as it is. Before memory is allocated."""
        (scheme,) = set(schemes)
        if scheme is not None:
            rows, columns = self.weight.shape
            self.quantized = scheme.weight(rows, columns, self.pieces(""))
            self.weight = empty_parameter(0)

    def pack(self, name: str = "") -> None:
        """Checks a loaded weight, and lays it out for the CPU's matrix kernels, in its place. A weight that this is not for stays
        as it is. name: of this layer in the model."""
        if self.quantized is not None:
            self.quantized.finish(self.pieces(name))
            self.quantized.pack()
        elif reference.can_pack(self.weight):
            self.packed = reference.pack(self.weight)
            self.weight = torch.nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def weights(self, prefix: str) -> Weights:
        for piece in self.pieces(prefix[:-1]):
            if self.quantized is not None:
                yield from self.quantized.stored(piece)
            else:
                yield Weight(f"{piece.name}.weight", self.weight[piece.rows], piece.shard)
            if self.has_bias:
                bias = self.weight.new_empty(0) if self.bias is None else self.bias[piece.rows]
                yield Weight(f"{piece.name}.bias", bias, piece.shard if piece.shard.dim == 0 else self.bias_shard)


class MergedLinear(Linear):
    """Several linear layers with the same input as one GEMM; ``parts`` are (name in the checkpoint, its rows on this rank).

    Parts whose weights are stored in different ways, or in blocks that one matrix would cut, stay layers of their own.
    """

    def __init__(self, in_features: int, parts: tuple[tuple[str, Shard], ...], bias: bool = False) -> None:
        super().__init__(in_features, sum(rows.length for _, rows in parts), bias)
        self.parts = parts
        self.separate: torch.nn.ModuleList | None = None

    def pieces(self, name: str) -> list[Piece]:
        # The parts stand in the checkpoint beside this layer, not below it: replace our own name by theirs.
        parent = name[: name.rfind(".") + 1]
        pieces, start = [], 0
        for index, (part, rows) in enumerate(self.parts):
            pieces.append(Piece(parent + part, index, slice(start, start + rows.length), rows))
            start += rows.length
        return pieces

    def quantize(self, schemes: Sequence[Scheme | None]) -> None:
        if len(set(schemes)) == 1 and can_merge(schemes[0], self.pieces("")):
            return super().quantize(schemes)
        layers = [Linear(self.in_features, rows.total, self.has_bias, rows) for _, rows in self.parts]
        for layer, scheme in zip(layers, schemes, strict=True):
            layer.quantize([scheme])
        self.separate, self.weight, self.bias = torch.nn.ModuleList(layers), empty_parameter(0), None

    def forward(self, x: Rows, residual: torch.Tensor | None = None, norm: NormInside | None = None) -> torch.Tensor:
        """norm: of x, first, in the same kernel; of a layer that has the norm's weight (`fold_norm`)."""
        if norm is not None:
            assert isinstance(x, torch.Tensor) and residual is None
            return ops.rms_norm_linear(x, self.weight, self.bias, norm.eps, sums_of_squares=norm.sums)
        if self.separate is not None:
            return torch.cat([layer(x) for layer in self.separate], -1)
        return super().forward(x, residual)

    def weights(self, prefix: str) -> Weights:
        if self.separate is None:
            yield from super().weights(prefix)
            return
        for piece, layer in zip(self.pieces(prefix[:-1]), self.separate, strict=True):
            assert isinstance(layer, Linear)
            yield from layer.weights(f"{piece.name}.")

    def pack(self, name: str = "") -> None:
        if self.separate is None:
            super().pack(name)
            return
        for piece, layer in zip(self.pieces(name), self.separate, strict=True):
            assert isinstance(layer, Linear)
            layer.pack(piece.name)
