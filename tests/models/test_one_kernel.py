"""Decode steps whose layers are one operator give the tokens of layer after layer, with weights in 16 bits and in 4."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastattn import nn, ops
from fastattn.engine.sampling_params import SamplingParams
from fastattn.models.llama import LlamaForCausalLM, LlamaLayer
from fastattn.models.loader import open_model
from fastattn.models.registry import load_model
from fastattn.reference import linear as reference
from tests.engine import tiny
from tests.models.quantized import FORMS, write

PROMPTS = ["the quick brown fox", "a", "0 1 2 3 4 5 6 7 8 9 " * 5]


def layers(network: torch.nn.Module) -> list[LlamaLayer]:
    return [layer for layer in network.modules() if isinstance(layer, LlamaLayer)]


def in_16_bits() -> LlamaForCausalLM:
    """As a GPU has it: gates and ups in turns, norms folded in."""
    network = load_model(tiny.TinySource(), torch.device("cpu"), torch.float32, 256)
    assert isinstance(network, LlamaForCausalLM)
    for layer in layers(network):
        layer.mlp.gate_up_proj.interleave()
        layer.put_norms_inside()
    return network


def in_4_bits(folder: Path) -> LlamaForCausalLM:
    """As a Hopper GPU has it: in tiles."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64, "num_attention_heads": 4}
    write(folder, FORMS["nvfp4"], **sizes, num_key_value_heads=2, vocab_size=tiny.CONFIG.vocab_size)
    network = load_model(open_model(folder), torch.device("cpu"), torch.float32, 256)
    assert isinstance(network, LlamaForCausalLM)
    for layer in layers(network):
        for linear in layer.linears:
            assert isinstance(linear.quantized, nn.Fp4Weight)
            linear.quantized.put_in_tiles()
    return network


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("with_head", [False, True])
def test_the_engine_gives_the_same_tokens(
    bits: int, with_head: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "can_pack", lambda *_: False)
    monkeypatch.setattr(nn.QuantizedWeight, "pack", lambda self: None)
    network = in_16_bits() if bits == 16 else in_4_bits(tmp_path)
    monkeypatch.setattr(LlamaLayer, "is_alone_on_hopper", True)
    network.tile_order = layers(network)[0].tile_order
    assert network.tile_order == (None if bits == 16 else 16)
    kinds: list[type] = []

    def tokens() -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        outputs = tiny.run(tiny.make_engine(network, tiny.make_tokenizer()), PROMPTS, params)
        return [output.outputs[0].token_ids for output in outputs]

    one_kernel = ops.decode_layers

    def spied(residual: torch.Tensor, weights: object, *args: object, **options: object) -> None:
        kinds.append(type(weights))
        one_kernel(residual, weights, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ops, "decode_layers", spied)
    expected = tokens()
    assert not kinds
    network.max_one_kernel_tokens, network.has_head_inside = 4, with_head
    assert tokens() == expected
    assert len(kinds) >= 19 and set(kinds) == {ops.DecoderWeights if bits == 16 else ops.DecoderFp4Weights}


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4", "k_proj stays"])
def test_which_weights_have_an_order_of_tiles(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.QuantizedWeight, "pack", lambda self: None)
    sizes = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    write(tmp_path, FORMS[form], **sizes)
    network = load_model(open_model(tmp_path), torch.device("cpu"), torch.float32, 256)
    layer = layers(network)[0]
    assert layer.tile_order is None
    for linear in layer.linears:
        if linear.quantized is not None:
            linear.quantized.put_in_tiles()
    assert layer.tile_order is None  # nobody's but a Hopper GPU's
    monkeypatch.setattr(LlamaLayer, "is_alone_on_hopper", True)
    assert layer.tile_order == (16 if form == "nvfp4" else None)
