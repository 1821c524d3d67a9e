"""A model whose weights are rounded to few bits as they are read: to the rest of the package, a quantized checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fastattn.models.config import ModelConfig
from fastattn.models.loader.copier import Copier
from fastattn.models.loader.source import ModelSource, TensorInfo
from fastattn.models.quantization import QuantizationConfig, quantization_from_hf
from fastattn.models.tokenizer import Tokenizer
from fastattn.models.weight_formats import FORMATS, Int4, WeightFormat, make_format
from fastattn.nn import Fp4Scheme, Fp8Scheme, Int8Scheme, Scheme, Shard
from fastattn.reference.quantize import NVFP4_GROUP

_INT4_GROUP = 128
_TYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
}


def check_quantization(name: str | None) -> None:
    """Raises ValueError for what the option quantization cannot be."""
    if name is not None and name not in FORMATS:
        raise ValueError(f"quantization is {name!r}, allowed are {', '.join(map(repr, FORMATS))}, or nothing")


def with_quantization(source: ModelSource, name: str | None) -> ModelSource:
    """The model with the weights of its layers in the form ``name``, one of `FORMATS`; None: as they are stored.

    Plain weights are rounded to nearest as they are read; embeddings, norms and the head stay plain. Weights in FP4 stay what they
    are, and only what they are multiplied with is chosen: activations in 16 bits ("nvfp4") or in FP8 ("nvfp4-w4a8").
    Raises ValueError for a name that is none, or for a model that cannot have that form.
    """
    check_quantization(name)
    if name is None:
        return source
    if source.config.quantization is None:
        return _RoundedSource(source, name)
    config = replace(source.config, quantization=_with_activations(source, source.config.quantization, name))
    return _ConfiguredSource(source, config)


def _with_activations(source: ModelSource, found: QuantizationConfig, name: str) -> QuantizationConfig:
    """``found``, which must have the form ``name`` but for FP4's activations, with those."""
    for _, scheme in found.groups:
        if name not in (allowed := _names(scheme)):
            raise ValueError(
                f"quantization is {name!r}, but {source.name} has weights in {scheme} already: allowed are "
                f"{', '.join(map(repr, allowed))}, or nothing"
            )
    groups = tuple(
        (
            targets,
            replace(scheme, fp8_activations=name in _FP8_ACTIVATIONS) if isinstance(scheme, Fp4Scheme) else scheme,
        )
        for targets, scheme in found.groups
    )
    notes = () if name in _FP8_ACTIVATIONS else found.notes
    return replace(found, groups=groups, notes=notes)


_FP8_ACTIVATIONS = ("nvfp4-w4a8", "mxfp4-w4a8")


def _names(scheme: Scheme) -> tuple[str, ...]:
    """What a model with such weights may be asked for."""
    if isinstance(scheme, Fp4Scheme):
        return ("nvfp4", "nvfp4-w4a8") if scheme.group_size == NVFP4_GROUP else ("mxfp4", "mxfp4-w4a8")
    return ("int8",) if isinstance(scheme, Int8Scheme) else ("fp8",) if isinstance(scheme, Fp8Scheme) else ("int4",)


class _ConfiguredSource:
    """A model that is run otherwise than its files say."""

    def __init__(self, source: ModelSource, config: ModelConfig) -> None:
        self._source, self._config = source, config

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def config(self) -> ModelConfig:
        return self._config

    def tokenizer(self) -> Tokenizer:
        return self._source.tokenizer()

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._source.tensors()

    def read(self, name: str, out: Tensor, shard: Shard | None = None, copier: Copier | None = None) -> None:
        self._source.read(name, out, shard, copier)


class _RoundedSource(_ConfiguredSource):
    """A matrix is read and rounded whole, on the device that its codes go to, and a shard cut of what that gives: all ranks have
    the same numbers, however many there are."""

    def __init__(self, source: ModelSource, name: str) -> None:
        stored = source.tensors()
        matrices = {
            tensor.removesuffix(".weight"): info.shape
            for tensor, info in stored.items()
            if tensor.startswith("model.layers.") and tensor.endswith(".weight") and len(info.shape) == 2
        }
        self._form = _format(name, [shape[1] for shape in matrices.values()])
        described = quantization_from_hf({"quantization_config": self._form.config(["lm_head"])})
        super().__init__(source, replace(source.config, quantization=described))
        self._tensors = {n: info for n, info in stored.items() if n.removesuffix(".weight") not in matrices}
        parts = {shape: self._form.stored(*shape) for shape in set(matrices.values())}
        for matrix, shape in matrices.items():
            for suffix, (size, dtype) in parts[shape].items():
                info = TensorInfo(size, _TYPES[dtype], math.prod(size) * dtype.itemsize)
                self._tensors[f"{matrix}.{suffix}"] = info
        self._matrices = matrices
        self._last: tuple[tuple[str, torch.device], dict[str, Tensor]] | None = None

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str, out: Tensor, shard: Shard | None = None, copier: Copier | None = None) -> None:
        matrix, _, suffix = name.rpartition(".")
        if matrix not in self._matrices or suffix == "bias":
            super().read(name, out, shard, copier)
            return
        stored = self._rounded(matrix, out.device, copier)[suffix]
        part = stored if shard is None else stored[shard.slices]
        out.copy_(part.view(torch.uint8) if out.dtype is torch.uint8 else part)

    def _rounded(self, matrix: str, device: torch.device, copier: Copier | None) -> dict[str, Tensor]:
        """The stored tensors of a matrix; those of the last one are kept, as they are asked for one after the other."""
        key = matrix, device
        if self._last is None or self._last[0] != key:
            self._last = None  # its memory may be needed
            weight = torch.empty(self._matrices[matrix], device=device)
            super().read(f"{matrix}.weight", weight, None, copier)
            if copier is not None:
                copier.wait()
            if not bool(weight.isfinite().all()):
                raise ValueError(f"{self.name}: tensor {matrix}.weight holds numbers that are not finite")
            self._last = key, self._form.nearest(weight)
        return self._last[1]


def _format(name: str, widths: list[int]) -> WeightFormat:
    if name == "int4":  # the engine takes a last group that is shorter, as not all tools do
        return Int4(_INT4_GROUP, torch.bfloat16)
    try:
        return make_format(name, widths, torch.float32)
    except ValueError as error:
        raise ValueError(f"quantization: {error}") from None
