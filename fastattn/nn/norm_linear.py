"""A norm and the dense layer behind it as one layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import ops
from fastattn.nn.from_torch import check_forward, linear_tensors, norm_eps
from fastattn.nn.module import empty_parameter
from fastattn.reference.norm_linear import fold_layer_norm, fold_rms_norm, sum_of_rows

_NORMS = {"rms_norm": 1e-6, "layer_norm": 1e-5}  # and their eps


class NormLinear(torch.nn.Module):
    """`linear(norm(x))`, on Hopper without a normalized x; for inference.

    norm: "rms_norm" or "layer_norm", whose weight and bias are in those of the layer. eps: 1e-6 and 1e-5 by default.
    State: weight (out_features, in_features); bias (out_features), with bias=True; weight_sum (out_features) in fp32, of
    "layer_norm". `from_float` makes them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        norm: str = "rms_norm",
        bias: bool = False,
        eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm not in _NORMS:
            raise ValueError(f"NormLinear: norm is {norm!r}, expected one of {', '.join(map(repr, _NORMS))}")
        self.norm, self.eps = norm, _NORMS[norm] if eps is None else eps

        self.weight = empty_parameter(out_features, in_features, device=device, dtype=dtype)
        self.bias = empty_parameter(out_features, device=device, dtype=dtype) if bias else None
        self.weight_sum: Tensor | None
        wide = torch.empty(out_features, device=device, dtype=torch.float32) if norm == "layer_norm" else None
        self.register_buffer("weight_sum", wide)

    @classmethod
    def from_float(cls, norm: torch.nn.Module, linear: torch.nn.Module) -> NormLinear:
        """The layer that does what a norm over the last dimension and the dense layer behind it do.

        norm: torch's RMSNorm or LayerNorm, with or without weight and bias. linear: torch's Linear, bf16 or fp16, on a CPU
        also fp32: the dtype of the result. Raises TypeError for other modules, and for those with a forward of their own or another
        dtype, ValueError for sizes that do not agree and for forward hooks.
        """
        if not isinstance(norm, torch.nn.RMSNorm | torch.nn.LayerNorm):
            raise TypeError(f"NormLinear: norm is a {type(norm).__name__}, expected torch.nn.RMSNorm or LayerNorm")
        check_forward("NormLinear", "norm", norm, torch.nn.RMSNorm, torch.nn.LayerNorm)
        weight, bias = linear_tensors("NormLinear", "linear", linear)
        out_features, in_features = weight.shape
        if tuple(norm.normalized_shape) != (in_features,):
            shape = tuple(norm.normalized_shape)
            raise ValueError(f"NormLinear: norm is over {shape}, expected ({in_features},), linear's in_features")
        eps = norm_eps(norm, weight)
        norm_weight = None if norm.weight is None else norm.weight.detach()
        weight_sum = None
        if isinstance(norm, torch.nn.LayerNorm):
            norm_bias = None if norm.bias is None else norm.bias.detach()
            weight, weight_sum, bias = fold_layer_norm(norm_weight, norm_bias, weight, bias)
        else:
            weight = fold_rms_norm(norm_weight, weight)
        layer = cls(
            in_features,
            out_features,
            "rms_norm" if weight_sum is None else "layer_norm",
            bias is not None,
            eps,
            "meta",
            weight.dtype,
        )
        tensors = {"weight": weight, "bias": bias, "weight_sum": weight_sum}
        layer.load_state_dict({name: t for name, t in tensors.items() if t is not None}, assign=True)
        return layer.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in_features) → (…, out_features), in the weight's dtype."""
        if self.weight_sum is not None:
            return ops.layer_norm_linear(x, self.weight, self.weight_sum, self.bias, self.eps)
        return ops.rms_norm_linear(x, self.weight, self.bias, self.eps)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """To another device or dtype: weight_sum stays fp32, and is that of the weight as it then is."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_sum is not None and self.weight_sum.dtype is not torch.float32:
            self.weight_sum = sum_of_rows(self.weight)
        return self

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape
        return f"in_features={columns}, out_features={rows}, norm={self.norm!r}, bias={self.bias is not None}, eps={self.eps}"
