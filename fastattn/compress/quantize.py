"""`quantize`: a model's weights in INT8, FP8, INT4, NVFP4 or MXFP4, rounded so that the model changes least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.compress.gptq import compensate, output_error
from fastattn.compress.prune import is_two_of_four
from fastattn.compress.rewrite import (
    CalibrationOptions,
    Job,
    LayerInputs,
    Rewriter,
    calibration_tokens,
    choose_output_dtype,
    choose_walk,
    rewrite_model,
)
from fastattn.compress.smooth import smooth_layer
from fastattn.compress.sources import Model, open_plain
from fastattn.compress.walk import LayerWalk, Product
from fastattn.models.config import ModelConfig
from fastattn.models.loader import ModelSource
from fastattn.models.loader.kv_scales import is_kv_scale
from fastattn.models.weight_formats import FORMATS, WeightFormat, make_format

SCHEMES = (*FORMATS, "none")


@dataclass(frozen=True)
class QuantizeOptions:
    """scheme: "int8", "fp8" (weights a row, activations a token), "int4", "nvfp4", "mxfp4" (weights only), "nvfp4-w4a8",
    "mxfp4-w4a8" (the same weights, activations in fp8 a token), "none" (plain export).

    rounding: "gptq" or "nearest"; "auto" is nearest for 8 bits, whose error is small, and gptq for four.
    steps: "amax" puts a group's largest value at the largest code; "mse" takes the step with the least squared error, each
    column weighted with its inputs; "auto" is mse with gptq and amax with nearest.
    smooth: move this share of the difficulty from activations to weights (SmoothQuant's α), int8 only; 0: do not.
    group_size: int4's; None: the largest of 128, 64 and 32 that divides every matrix. damp: added to the Hessian's diagonal,
    as a share of its mean. reorder: round the columns with the largest inputs first.
    dtype: of what stays plain (embeddings, norms, head) and of scales. device: "auto", "cpu", "cuda".
    """

    scheme: str = "int8"
    rounding: str = "auto"
    steps: str = "auto"
    smooth: float = 0.5
    group_size: int | None = None
    damp: float = 0.01
    reorder: bool = True
    dtype: str = "auto"
    device: str = "auto"
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)

    def __post_init__(self) -> None:
        for name, allowed in (
            ("scheme", SCHEMES),
            ("rounding", ("auto", "gptq", "nearest")),
            ("steps", ("auto", "amax", "mse")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, allowed are {', '.join(allowed)}")
        if not 0 <= self.smooth <= 1:
            raise ValueError(f"smooth is {self.smooth!r}, allowed is 0 to 1")
        if not 0 < self.damp <= 1:
            raise ValueError(f"damp is {self.damp!r}, allowed is above 0, up to 1")

    @property
    def uses_gptq(self) -> bool:
        return self.rounding == "gptq" or (self.rounding == "auto" and self.scheme not in ("int8", "fp8", "none"))

    @property
    def uses_mse(self) -> bool:
        return self.steps == "mse" or (self.steps == "auto" and self.uses_gptq)

    @property
    def smooths(self) -> bool:
        return self.scheme == "int8" and self.smooth > 0


def quantize(
    model: Model,
    out: str | Path,
    options: QuantizeOptions | None = None,
    *,
    force: bool = False,
    show_progress: bool = False,
) -> Path:
    """Writes ``model`` (a name, a folder, a .gguf file, an opened source) quantized into the folder ``out``.

    Interrupted, it goes on where it was when called again with the same options. Raises ValueError, in one line, for what
    cannot work; OSError if the disk says so.
    """
    options = options or QuantizeOptions()
    source = open_plain(model)
    dtype = choose_output_dtype(source, options.dtype)
    walk = choose_walk(source, options.device, options.calibration.length)
    rewriter: Rewriter
    if options.scheme == "none":
        rewriter = Rewriter(source.config, dtype)
    else:
        format_ = make_format(options.scheme, _widths(source, walk), dtype, options.group_size)
        keep_values = any(map(is_kv_scale, source.tensors()))
        rewriter = Quantizer(source.config, dtype, format_, options, keep_values)
    calibration = calibration_tokens(source, options.calibration) if rewriter.needs_inputs else None
    job = Job("quantize", _method(options, rewriter), Path(out), force, show_progress=show_progress)
    return rewrite_model(source, job, rewriter, walk, calibration)


def _widths(source: ModelSource, walk: LayerWalk) -> list[int]:
    """Columns of the matrices that are quantized; every layer has the same."""
    shapes = {name: info.shape for name, info in source.tensors().items()}
    return [shapes[f"{product.names[0]}.weight"][1] for product in walk.products(0)]


def _method(options: QuantizeOptions, rewriter: Rewriter) -> dict[str, Any]:
    """What the receipt says: choices that were left open as they were made, and nothing that played no part."""
    method: dict[str, Any] = {"scheme": options.scheme}
    if isinstance(rewriter, Quantizer):
        method["group_size"] = rewriter.format.group_size or None
        method["rounding"] = "gptq" if options.uses_gptq else "nearest"
        method["steps"] = "mse" if options.uses_mse else "amax"
        if options.uses_gptq:
            method |= {"damp": options.damp, "reorder": options.reorder}
        if options.smooths:
            method["smooth"] = options.smooth
    return method


class Quantizer(Rewriter):
    """Embeddings, norms and the head stay plain: they are small, or what the model's words are."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        weight_format: WeightFormat,
        options: QuantizeOptions,
        keep_values: bool = False,
    ) -> None:
        """keep_values: the model has static scales for its KV cache, so its values must not be scaled."""
        super().__init__(config, dtype)
        self.keep_values = keep_values
        self.format, self.options = weight_format, options
        self.needs_inputs = options.uses_gptq or options.uses_mse or options.smooths

    def quantization_config(self) -> dict[str, Any]:
        return self.format.config(["lm_head"])

    def rewrite(
        self, weights: dict[str, Tensor], products: Sequence[Product], inputs: Mapping[str, LayerInputs]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        factors: dict[str, Tensor] = {}
        if self.options.smooths:
            amax = {path: seen.amax for path, seen in inputs.items()}
            factors = smooth_layer(
                weights, products, amax, self.config, self.options.smooth, self._as_read_back, self.keep_values
            )
        stored: dict[str, Tensor] = {}
        record: dict[str, Any] = {}
        for product in products:
            hessian = inputs[product.path].hessian.matrix if product.path in inputs else None
            if hessian is not None and product.path in factors:
                hessian = hessian / factors[product.path].outer(factors[product.path])
            tensors, error = self._quantize(product, weights, hessian)
            stored |= tensors
            record[product.path] = error
        quantized = {f"{name}.weight" for product in products for name in product.names}
        stored |= self.plain({name: tensor for name, tensor in weights.items() if name not in quantized})
        return stored, {"output_error" if inputs else "weight_error": record}

    def _quantize(
        self, product: Product, weights: Mapping[str, Tensor], hessian: Tensor | None
    ) -> tuple[dict[str, Tensor], float]:
        """The stored tensors of a product, and its relative squared error: of its outputs, without inputs of its weights."""
        weight = product.stack(weights)
        size = self.format.group(weight.shape[1])
        importance = hessian.diagonal() if hessian is not None and self.options.uses_mse else None
        steps = self.format.fit(weight, importance)
        # What other columns got wrong must not fill the zeros of a pruned matrix; rounding alone keeps them.
        kept = weight != 0 if is_two_of_four(weight) else torch.ones_like(weight, dtype=torch.bool)

        def rounder(rest: Tensor, column: int, pivots: Tensor) -> Tensor:
            step = steps.step[:, column // size]
            return self.format.round(rest[:, 0], step) * step * kept[:, column]

        columns = steps.step.repeat_interleave(size, 1)
        if self.options.uses_gptq:
            assert hessian is not None
            rounded = compensate(weight, hessian, rounder, damp=self.options.damp, reorder=self.options.reorder)
            codes = self.format.round(rounded, columns)
        else:
            codes = self.format.round(weight, columns)
        if hessian is None:
            hessian = torch.eye(weight.shape[1], device=weight.device)
        error = output_error(weight, codes * columns, hessian)
        stored: dict[str, Tensor] = {}
        per_row = {suffix: t for suffix, t in steps.stored.items() if t.shape[0] == weight.shape[0] and t.dim() == 2}
        for name, part in product.split(codes, weights).items():
            stored |= {f"{name}.{suffix}": tensor for suffix, tensor in self.format.pack(part).items()}
            stored |= {f"{name}.{suffix}": tensor for suffix, tensor in steps.stored.items() if suffix not in per_row}
        for suffix, tensor in per_row.items():
            stored |= {f"{name}.{suffix}": part for name, part in product.split(tensor, weights).items()}
        return stored, error

    def _as_read_back(self, name: str, tensor: Tensor) -> Tensor:
        return super().from_stored({name: self.to_stored(name, tensor)})[name]

    def from_stored(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        suffixes = ("weight_packed", "weight_scale", "weight_global_scale", "weight_shape")
        quantized = {name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")}
        plain = {
            name: tensor
            for name, tensor in stored.items()
            if not name.endswith(suffixes) and name.removesuffix(".weight") not in quantized
        }
        values = super().from_stored(plain)
        for layer in quantized:
            own = {name.removeprefix(f"{layer}."): t for name, t in stored.items() if name.rpartition(".")[0] == layer}
            values[f"{layer}.weight"] = self.format.unpack(own)
        return values
