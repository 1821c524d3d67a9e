"""What is stored is what compressed-tensors' own decompressor reads, in every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from fastattn.compress import CalibrationOptions, QuantizeOptions, inspect_model, quantize
from fastattn.models.loader import ModelSource, open_model
from fastattn.models.registry import load_model
from fastattn.models.weight_formats import FORMATS, make_format
from tests.engine.tiny import TinySource, full_logits

SCHEMES = ("int8", "fp8", "int4", "nvfp4", "mxfp4")


def weight(rows: int = 20, columns: int = 128) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(rows, columns, generator=generator) * torch.rand(rows, columns, generator=generator) ** 3
    values[4] = 0
    values[5, :64] = 0
    return values


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def theirs(folder: Path) -> dict[str, Tensor]:
    """Name → weight by the library's decompressor, from the files alone."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    raw = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate({k: v for k, v in raw.items() if k != "quant_method"})
    scheme = config.config_groups["group_0"]
    compressor = BaseCompressor.load_from_registry(config.format)
    tensors, found = stored_tensors(folder), {}
    for layer in sorted({name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}):
        own = {name.removeprefix(f"{layer}."): t for name, t in tensors.items() if name.rpartition(".")[0] == layer}
        found[layer] = compressor.decompress(own, scheme)["weight"]
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compressed_tensors_reads_the_same(
    scheme: str, dtype: str, source: TinySource, calibration: CalibrationOptions, tmp_path: Path
) -> None:
    options = QuantizeOptions(scheme=scheme, dtype=dtype, calibration=calibration)
    folder = quantize(source, tmp_path / "out", options)
    widths = [32, 32, 32, 64]
    weight_format = make_format(scheme, widths, getattr(torch, dtype))
    tensors, compared = stored_tensors(folder), 0
    for layer, value in theirs(folder).items():
        own = {name.removeprefix(f"{layer}."): t for name, t in tensors.items() if name.rpartition(".")[0] == layer}
        assert torch.equal(weight_format.unpack(own).to(value.dtype), value), layer
        compared += 1
    assert compared == 2 * 7
    assert f"{scheme}" in json.loads((folder / "receipt.json").read_text())["method"]["scheme"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_engine_runs_it(scheme: str, source: TinySource, calibration: CalibrationOptions, tmp_path: Path) -> None:
    """Its logits are those of a network with the unpacked weights; INT8 and FP8 also round activations."""
    folder = quantize(
        source, tmp_path / "out", QuantizeOptions(scheme=scheme, dtype="float32", calibration=calibration)
    )
    stored = stored_tensors(folder)
    unpacked = {f"{layer}.weight": value for layer, value in theirs(folder).items()}

    class Unpacked(TinySource):
        def read(self, name: str, out: Tensor, shard: object = None, copier: object = None) -> None:
            out.copy_(unpacked[name] if name in unpacked else stored[name])

    def logits(model: ModelSource) -> Tensor:
        network = load_model(model, torch.device("cpu"), torch.float32, 64)
        return full_logits(network, list(range(2, 50)))

    expected, found = logits(Unpacked(config=source.config)), logits(open_model(folder))
    error = (found - expected).norm() / expected.norm()
    assert error < {"int8": 0.08, "fp8": 0.25}.get(scheme, 0.01), error
    described = inspect_model(str(folder))
    assert described.num_parameters == inspect_model(source).num_parameters
    assert described.bits < 20 and described.quantization is not None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_stored_weight_is_near_the_source(scheme: str, source: TinySource, tmp_path: Path) -> None:
    """Every number within half a step of what it was: plain rounding loses no more."""
    folder = quantize(
        source, tmp_path / "out", QuantizeOptions(scheme=scheme, rounding="nearest", smooth=0, dtype="float32")
    )
    relative = {"int8": 0.01, "fp8": 0.04, "int4": 0.08, "nvfp4": 0.18, "mxfp4": 0.26}[scheme]
    for layer, value in theirs(folder).items():
        expected = torch.empty(value.shape)
        source.read(f"{layer}.weight", expected)
        largest = expected.abs().amax()
        assert (value.float() - expected).abs().max() <= relative * largest, layer
        assert (value.float() - expected).abs().max() > 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fitted_steps_are_never_worse(scheme: str) -> None:
    w = weight()
    weight_format = make_format(scheme, [128], torch.bfloat16)
    importance = torch.linspace(0.1, 4, 128)

    def errors(importance_for_fit: Tensor | None) -> Tensor:
        steps = weight_format.fit(w, importance_for_fit).step.repeat_interleave(weight_format.group(128), 1)
        wrong = (w - weight_format.round(w, steps) * steps).square() * importance
        return wrong.view(20, -1, weight_format.group(128)).sum(-1)

    plain, fitted = errors(None), errors(importance)
    assert (fitted <= plain).all()
    assert fitted.sum() < plain.sum() or scheme in ("int8", "fp8")  # of 8 bits: clipping hardly ever pays


@pytest.mark.parametrize("scheme", FORMATS)
def test_what_is_stored_is_known_beforehand(scheme: str) -> None:
    weight_format = make_format(scheme, [256], torch.bfloat16)
    for rows in (1, 3, 40):
        parts = weight_format.nearest(torch.randn(rows, 256))
        assert weight_format.stored(rows, 256) == {
            name: (tuple(part.shape), part.dtype) for name, part in parts.items()
        }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pack_and_unpack_agree_with_the_steps(scheme: str) -> None:
    w = weight()
    weight_format = make_format(scheme, [128], torch.bfloat16)
    for importance in (None, torch.ones(128)):
        steps = weight_format.fit(w, importance)
        columns = steps.step.repeat_interleave(weight_format.group(128), 1)
        codes = weight_format.round(w, columns)
        assert torch.equal(weight_format.unpack({**weight_format.pack(codes), **steps.stored}), codes * columns)
        assert torch.isfinite(columns).all() and (columns > 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int3", [64], None), "scheme is 'int3', allowed are int8, fp8, int4, nvfp4, mxfp4"),
        (("int8", [64], 64), "group_size is 64, but only scheme 'int4' has one"),
        (("int4", [576, 1536], 128), "group_size is 128, allowed are 64, 32 for matrices of 576, 1536 columns"),
        (("int4", [256], 48), "group_size is 48, allowed are 128, 64, 32"),
        (("int4", [48], None), "scheme 'int4' needs multiples of 32 columns"),
        (("nvfp4", [64, 40], None), "scheme 'nvfp4' needs multiples of 16 columns, a matrix has 40"),
        (("mxfp4", [48], None), "scheme 'mxfp4' needs multiples of 32 columns, a matrix has 48"),
    ],
)
def test_sizes_that_do_not_fit(arguments: tuple[Any, ...], message: str) -> None:
    scheme, widths, group_size = arguments
    with pytest.raises(ValueError, match=message):
        make_format(scheme, widths, torch.bfloat16, group_size)


def test_group_size_is_the_largest_that_fits() -> None:
    sizes = {tuple(w): make_format("int4", w, torch.bfloat16).group_size for w in ([576, 1536], [1024, 4096], [96])}
    assert sizes == {(576, 1536): 64, (1024, 4096): 128, (96,): 32}
