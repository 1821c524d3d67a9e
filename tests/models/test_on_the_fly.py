"""Weights that are rounded as they are loaded: they are what `fastattn quantize` writes, on every rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastattn import LLM, SamplingParams, nn
from fastattn.compress import EvalOptions, QuantizeOptions, evaluate, quantize
from fastattn.engine.setup import EngineOptions
from fastattn.models.decoder import DecoderModel
from fastattn.models.loader import open_model
from fastattn.models.loader.quantized_source import with_quantization
from fastattn.models.registry import load_model
from fastattn.models.weight_formats import FORMATS
from tests.engine.tiny import CONFIG, TinySource, full_logits

CPU = torch.device("cpu")
# Matrices of 128 and 256 columns; two ranks have whole groups of the two that are cut along their columns.
SOURCE = TinySource(
    config=replace(
        CONFIG,
        hidden_size=128,
        intermediate_size=256,
        num_heads=8,
        head_dim=32,
        softmax_scale=0.0,
        num_layers=1,
        layer_is_sliding=(),
    )
)
IDS = [3, 9, 27, 81, 5]
PRINTED = {
    "int8": "INT8 (W8A8)",
    "fp8": "FP8 (W8A8)",
    "int4": "INT4 (W4A16), groups of 128",
    "nvfp4": "NVFP4 (W4A16)",
    "mxfp4": "MXFP4 (W4A16)",
    "nvfp4-w4a8": "NVFP4 (W4A8)",
    "mxfp4-w4a8": "MXFP4 (W4A8)",
}


def matrices(network: DecoderModel) -> dict[str, torch.Tensor]:
    """What the layer's products make of units: the transposed weights, as they are multiplied with."""
    found = {}
    for name, module in network.layers[0].named_modules():
        if isinstance(module, nn.Linear):
            assert module.quantized is not None
            found[name] = module.quantized(torch.eye(module.quantized.columns), None)
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_is_what_quantize_writes(name: str, tmp_path: Path) -> None:
    """To the bit, and run alike."""
    fly = with_quantization(SOURCE, name)
    assert str(fly.config.quantization) == PRINTED[name] and fly.name == SOURCE.name
    dtype = "bfloat16" if name == "int4" else "float32"  # of INT4's scales
    written = open_model(
        quantize(SOURCE, tmp_path / "out", QuantizeOptions(scheme=name, rounding="nearest", smooth=0, dtype=dtype))
    )
    assert written.config.quantization == fly.config.quantization
    networks = [load_model(source, CPU, torch.float32, 64) for source in (fly, written, SOURCE)]
    ours, theirs = (matrices(network) for network in networks[:2])
    assert ours.keys() == theirs.keys() and len(ours) == 4
    for key in ours:
        if not (name.startswith("nvfp4") and key in ("self_attn.qkv_proj", "mlp.gate_up_proj")):  # one scale in a file
            assert torch.equal(ours[key], theirs[key]), key
    found, in_file, plain = (full_logits(network, IDS) for network in networks)
    if not name.startswith(("nvfp4", "int4")):
        assert torch.equal(found, in_file)
    assert 0 < float((found - plain).abs().mean()) < float(plain.abs().mean())


@pytest.mark.parametrize("name", FORMATS)
def test_ranks_have_parts_of_the_same_numbers(name: str) -> None:
    fly = with_quantization(SOURCE, name)
    whole, part = (
        matrices(load_model(fly, CPU, torch.float32, 64, tp=nn.TensorParallel(size - 1, size))) for size in (1, 2)
    )
    for key in ("self_attn.o_proj", "mlp.down_proj"):
        assert torch.equal(part[key], whole[key][128:])
    assert torch.equal(
        part["mlp.gate_up_proj"], torch.cat([h[:, 128:] for h in whole["mlp.gate_up_proj"].chunk(2, 1)], 1)
    )


def test_biases_are_the_models() -> None:
    source = replace(SOURCE, config=replace(SOURCE.config, attention_bias=True))
    fly, plain = (load_model(s, CPU, torch.float32, 64) for s in (with_quantization(source, "int8"), source))
    assert torch.equal(fly.layers[0].self_attn.qkv_proj.bias, plain.layers[0].self_attn.qkv_proj.bias)


def test_activations_of_weights_in_fp4(tmp_path: Path) -> None:
    """A file says one thing and the option another; which weights, it cannot say."""
    stored = open_model(quantize(SOURCE, tmp_path / "out", QuantizeOptions(scheme="mxfp4", rounding="nearest")))
    w4a8, w4a16 = with_quantization(stored, "mxfp4-w4a8"), with_quantization(stored, "mxfp4")
    assert str(w4a8.config.quantization) == "MXFP4 (W4A8)" and w4a16.config == stored.config
    assert w4a8.tensors() == stored.tensors()
    logits = [full_logits(load_model(s, CPU, torch.float32, 64), IDS) for s in (stored, w4a8)]
    assert 0 < float((logits[0] - logits[1]).abs().mean()) < float(logits[0].abs().mean())
    with pytest.raises(
        ValueError, match=r"'int8', but .* in MXFP4 \(W4A16\) already: allowed are 'mxfp4', 'mxfp4-w4a8'"
    ):
        with_quantization(stored, "int8")


def test_the_engines_option(tmp_path: Path) -> None:
    llm = LLM(SOURCE, quantization="mxfp4-w4a8", max_model_len=64, num_kv_blocks=16, quiet=True)
    assert str(llm.model_config.quantization) == "MXFP4 (W4A8)"
    (output,) = llm.generate("ab", SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4
    text = tmp_path / "text.txt"
    text.write_text("the sea is " * 40)
    result = evaluate(SOURCE, SOURCE, EvalOptions((str(text),), 40, 80, quantization="fp8"))
    assert result.quantization == "fp8" and result.kl_mean is not None and result.kl_mean > 0


def test_what_cannot_be_had_is_said_before_loading() -> None:
    for make in (EngineOptions, EvalOptions):
        with pytest.raises(
            ValueError, match="quantization is 'w4', allowed are 'int8', 'fp8', 'int4', 'nvfp4', 'mxfp4'"
        ):
            make(quantization="w4")
    narrow = TinySource(config=replace(CONFIG, hidden_size=40))
    with pytest.raises(ValueError, match="quantization: scheme 'mxfp4' needs multiples of 32 columns, a matrix has 40"):
        with_quantization(narrow, "mxfp4")
