"""The weight formats that plain weights become, in a file (`fastattn quantize`) or as they are loaded (`quantization` of the
engine): how steps are chosen, how values are rounded, what is stored.

The numbers and bytes are `fastattn.reference.quantize`'s; what is here chooses among them. Names and layouts are those of
compressed-tensors, so that its own decompressor, vLLM and transformers read what we write.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastattn.reference import quantize as q

# Shrunken ranges that a step is tried for: clipping a group's largest value may cost less than a coarser step for the rest.
_SHRINKS = tuple(1 - 0.025 * i for i in range(20))
# E4M3 has eight steps an octave; half an octave either way.
_E4M3_NEIGHBOURS = range(-4, 4)


def scheme_args(num_bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    """How numbers are rounded, as compressed-tensors' QuantizationArgs has it."""
    return {
        "num_bits": num_bits,
        "type": kind,
        "symmetric": True,
        "strategy": strategy,
        "group_size": None,
        "dynamic": False,
        "observer": None if more.get("dynamic") else "minmax",
        **more,
    }


_FP8_ACTIVATIONS = scheme_args(8, "float", "token", dynamic=True)


@dataclass(frozen=True)
class Steps:
    """step: (N, G) fp32, the value of one code unit in each group. stored: suffix → tensor of (N, …) rows, or of one number
    that holds for all rows."""

    step: Tensor
    stored: dict[str, Tensor]


@dataclass(frozen=True)
class WeightFormat(ABC):
    """group_size: columns that share a step; 0: all of a row. scale_dtype: of scales that are stored as plain numbers.
    activations: how those of 4-bit floats are rounded, as compressed-tensors says it; None: not at all."""

    group_size: int
    scale_dtype: torch.dtype
    name: ClassVar[str]
    activations: ClassVar[dict[str, Any] | None] = None

    def group(self, num_columns: int) -> int:
        return self.group_size or num_columns

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Steps:
        """Steps for a weight (N, K) fp32. importance (K,): how much a squared error in a column matters; None: the steps at
        which each group's largest value is the largest code, which is plain rounding's choice."""
        amax = q.group_amax(weight, self.group(weight.shape[1]))
        plain = self._steps(weight, amax)
        if importance is None:
            return plain
        best, least = plain.step, self._error(weight, plain.step, importance)
        chosen = plain
        for candidate in self._candidates(plain):
            error = self._error(weight, candidate.step, importance)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, candidate.step, best)
            stored = {
                suffix: torch.where(better, candidate.stored[suffix].float(), tensor.float()).to(tensor.dtype)
                if tensor.shape == better.shape
                else tensor
                for suffix, tensor in chosen.stored.items()
            }
            chosen = Steps(best, stored)
        return chosen

    def nearest(self, weight: Tensor) -> dict[str, Tensor]:
        """Suffix → stored tensor of a weight (N, K) fp32 that is rounded plainly; K may be any for integers."""
        steps = self.fit(weight)
        columns = q.per_column(steps.step, self.group(weight.shape[1]), weight.shape[1])
        return self.pack(self.round(weight, columns)) | steps.stored

    def stored(self, num_rows: int, num_columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Suffix → shape and dtype of what `nearest` gives of a weight of that size. Found from three rows of it, since what has a
        row for each is of so many there; on the meta device it would take operations that a start does not load."""
        few = 3
        parts = self.nearest(torch.zeros(few, num_columns))
        return {
            suffix: ((num_rows if part.shape[0] == few else part.shape[0], *part.shape[1:]), part.dtype)
            for suffix, part in parts.items()
        }

    def _error(self, weight: Tensor, step: Tensor, importance: Tensor) -> Tensor:
        """Σ importance · (w − ŵ)² of each group, (N, G)."""
        size = self.group(weight.shape[1])
        columns = q.per_column(step, size, weight.shape[1])
        wrong = (weight - self.round(weight, columns) * columns).square() * importance
        return wrong.view(wrong.shape[0], -1, size).sum(-1)

    @abstractmethod
    def round(self, values: Tensor, step: Tensor) -> Tensor:
        """The nearest codes, as fp32 numbers, of values in steps that broadcast against them."""

    @abstractmethod
    def _steps(self, weight: Tensor, amax: Tensor) -> Steps: ...

    @abstractmethod
    def _candidates(self, plain: Steps) -> list[Steps]: ...

    @abstractmethod
    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        """Suffix → stored tensor of codes (N, K)."""

    @abstractmethod
    def unpack(self, stored: dict[str, Tensor]) -> Tensor:
        """Values (N, K) fp32 of what `pack` and `fit` gave."""

    @abstractmethod
    def config(self, ignore: list[str]) -> dict[str, Any]:
        """`quantization_config` of config.json."""

    def _config(
        self, ignore: list[str], format_name: str, weights: dict[str, Any], inputs: Any = None
    ) -> dict[str, Any]:
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": format_name,
            "quantization_status": "compressed",
            "config_groups": {"group_0": {**group, "format": format_name}},
            "ignore": ignore,
            "kv_cache_scheme": None,
        }


class Int8(WeightFormat):
    """W8A8: a step a row, and one a token for the activations, found as they come."""

    name = "int8"

    def round(self, values: Tensor, step: Tensor) -> Tensor:
        return q.quantize_int(values, step, 8).float()

    def _steps(self, weight: Tensor, amax: Tensor) -> Steps:
        return _number_steps(q.int_step(amax, 8), self.scale_dtype)

    def _candidates(self, plain: Steps) -> list[Steps]:
        return [_number_steps(plain.step * shrink, self.scale_dtype) for shrink in _SHRINKS[1:4]]

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        return {"weight": codes.to(torch.int8)}

    def unpack(self, stored: dict[str, Tensor]) -> Tensor:
        return q.dequantize_int(stored["weight"], stored["weight_scale"])

    def config(self, ignore: list[str]) -> dict[str, Any]:
        weights = scheme_args(8, "int", "channel")
        return self._config(ignore, "int-quantized", weights, scheme_args(8, "int", "token", dynamic=True))


class Fp8(WeightFormat):
    """W8A8 in e4m3: a step a row, and one a token for the activations, found as they come."""

    name = "fp8"

    def round(self, values: Tensor, step: Tensor) -> Tensor:
        return (values / step).clamp(-q.E4M3_MAX, q.E4M3_MAX).to(torch.float8_e4m3fn).float()

    def _steps(self, weight: Tensor, amax: Tensor) -> Steps:
        return _number_steps(q.fp8_step(amax), self.scale_dtype)

    def _candidates(self, plain: Steps) -> list[Steps]:
        return [_number_steps(plain.step * shrink, self.scale_dtype) for shrink in _SHRINKS[1:4]]

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        return {"weight": codes.to(torch.float8_e4m3fn)}

    def unpack(self, stored: dict[str, Tensor]) -> Tensor:
        return stored["weight"].float() * stored["weight_scale"].float()

    def config(self, ignore: list[str]) -> dict[str, Any]:
        return self._config(ignore, "float-quantized", scheme_args(8, "float", "channel"), _FP8_ACTIVATIONS)


class Int4(WeightFormat):
    """W4A16 in groups."""

    name = "int4"

    def round(self, values: Tensor, step: Tensor) -> Tensor:
        return q.quantize_int(values, step, 4).float()

    def _steps(self, weight: Tensor, amax: Tensor) -> Steps:
        return _number_steps(q.int_step(amax, 4), self.scale_dtype)

    def _candidates(self, plain: Steps) -> list[Steps]:
        return [_number_steps(plain.step * shrink, self.scale_dtype) for shrink in _SHRINKS[1:]]

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        return {"weight_packed": q.pack_int4(codes.to(torch.int8)), "weight_shape": torch.tensor(codes.shape)}

    def unpack(self, stored: dict[str, Tensor]) -> Tensor:
        num_columns = int(stored["weight_shape"][1])
        step = q.per_column(stored["weight_scale"].float(), self.group(num_columns), num_columns)
        return q.dequantize_int(q.unpack_int4(stored["weight_packed"], num_columns), step)

    def config(self, ignore: list[str]) -> dict[str, Any]:
        return self._config(ignore, "pack-quantized", scheme_args(4, "int", "group", group_size=self.group_size))


class Nvfp4(WeightFormat):
    """E2M1 in groups of 16 with E4M3 scales under one fp32 scale a matrix; stacked matrices share it, as their kernels do."""

    name = "nvfp4"

    def round(self, values: Tensor, step: Tensor) -> Tensor:
        return q.quantize_e2m1(values, step)

    def _steps(self, weight: Tensor, amax: Tensor) -> Steps:
        global_scale = q.nvfp4_global_scale(weight)
        return self._of(q.nvfp4_scale(amax, global_scale), global_scale)

    def _of(self, scale: Tensor, global_scale: Tensor) -> Steps:
        return Steps(q.nvfp4_step(scale, global_scale), {"weight_scale": scale, "weight_global_scale": global_scale})

    def _candidates(self, plain: Steps) -> list[Steps]:
        codes = plain.stored["weight_scale"].view(torch.uint8).int()
        # Positive E4M3 numbers are ordered as their bytes are; 1 is the least above zero, 126 the largest number.
        scales = [(codes + n).clamp(1, 126).to(torch.uint8).view(torch.float8_e4m3fn) for n in _E4M3_NEIGHBOURS if n]
        return [self._of(scale, plain.stored["weight_global_scale"]) for scale in scales]

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        return {"weight_packed": q.pack_e2m1(codes)}

    def unpack(self, stored: dict[str, Tensor]) -> Tensor:
        codes = q.unpack_e2m1(stored["weight_packed"])
        step = q.nvfp4_step(stored["weight_scale"], stored["weight_global_scale"])
        return codes * q.per_column(step, self.group_size, codes.shape[1])

    def config(self, ignore: list[str]) -> dict[str, Any]:
        weights = scheme_args(4, "float", "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
        return self._config(ignore, "nvfp4-pack-quantized", weights, self.activations)


class Mxfp4(WeightFormat):
    """E2M1 in groups of 32 with power-of-two scales (OCP Microscaling Formats, 2023)."""

    name = "mxfp4"

    def round(self, values: Tensor, step: Tensor) -> Tensor:
        return q.quantize_e2m1(values, step)

    def _steps(self, weight: Tensor, amax: Tensor) -> Steps:
        return self._of(q.mxfp4_scale(amax))

    def _of(self, scale: Tensor) -> Steps:
        return Steps(q.e8m0_step(scale), {"weight_scale": scale})

    def _candidates(self, plain: Steps) -> list[Steps]:
        codes = plain.stored["weight_scale"].int()
        return [self._of((codes + n).clamp(0, 254).to(torch.uint8)) for n in (-1, 1)]

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        return {"weight_packed": q.pack_e2m1(codes)}

    def unpack(self, stored: dict[str, Tensor]) -> Tensor:
        codes = q.unpack_e2m1(stored["weight_packed"])
        return codes * q.per_column(q.e8m0_step(stored["weight_scale"]), self.group_size, codes.shape[1])

    def config(self, ignore: list[str]) -> dict[str, Any]:
        weights = scheme_args(4, "float", "group", group_size=32, scale_dtype="torch.uint8")
        return self._config(ignore, "mxfp4-pack-quantized", weights, self.activations)


class Nvfp4Fp8(Nvfp4):
    """W4A8: the same weights, activations rounded to e4m3 as they come."""

    name = "nvfp4-w4a8"
    activations = _FP8_ACTIVATIONS


class Mxfp4Fp8(Mxfp4):
    """W4A8, likewise."""

    name = "mxfp4-w4a8"
    activations = _FP8_ACTIVATIONS


def _number_steps(step: Tensor, dtype: torch.dtype) -> Steps:
    """Steps as they will be read back: what is rounded must know the stored scale, not the one before its own rounding."""
    stored = step.to(dtype)
    return Steps(stored.float(), {"weight_scale": stored})


_FORMATS: dict[str, type[WeightFormat]] = {
    form.name: form for form in (Int8, Fp8, Int4, Nvfp4, Mxfp4, Nvfp4Fp8, Mxfp4Fp8)
}
FORMATS = tuple(_FORMATS)
_INT4_GROUPS = (128, 64, 32)


def make_format(
    scheme: str, in_features: list[int], scale_dtype: torch.dtype, group_size: int | None = None
) -> WeightFormat:
    """The format for a model whose matrices have these numbers of columns. Raises ValueError where they do not fit it.

    group_size: INT4's; None: the largest of 128, 64, 32 that divides all of them.
    """
    if scheme not in _FORMATS:
        raise ValueError(f"scheme is {scheme!r}, allowed are {', '.join(_FORMATS)}")
    if group_size is not None and scheme != "int4":
        raise ValueError(f"group_size is {group_size}, but only scheme 'int4' has one to choose")
    if scheme in ("int8", "fp8"):
        return _FORMATS[scheme](0, scale_dtype)
    if scheme == "int4":
        fitting = [size for size in _INT4_GROUPS if not any(n % size for n in in_features)]
        if group_size is not None and (group_size not in _INT4_GROUPS or group_size not in fitting):
            raise ValueError(
                f"group_size is {group_size}, allowed are {', '.join(map(str, fitting)) or 'none'} for matrices of "
                f"{', '.join(map(str, sorted(set(in_features))))} columns"
            )
        if not fitting:
            raise ValueError(
                f"scheme 'int4' needs multiples of 32 columns, a matrix has {next(n for n in in_features if n % 32)}"
            )
        return Int4(group_size or fitting[0], scale_dtype)
    size = q.NVFP4_GROUP if issubclass(_FORMATS[scheme], Nvfp4) else q.MXFP4_GROUP
    if bad := [n for n in in_features if n % size]:
        raise ValueError(f"scheme {scheme!r} needs multiples of {size} columns, a matrix has {bad[0]}")
    return _FORMATS[scheme](size, scale_dtype)
