"""A decoder whose products have the norms behind and the residuals in them gives what its separate kernels give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fastattn.models.llama as llama
from fastattn import ops
from fastattn.engine.sampling_params import SamplingParams
from fastattn.models.llama import LlamaForCausalLM, LlamaLayer
from fastattn.models.registry import load_model
from fastattn.reference import linear as reference
from tests.engine import tiny


def layers(network: torch.nn.Module) -> list[LlamaLayer]:
    return [layer for layer in network.modules() if isinstance(layer, LlamaLayer)]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    """With weights as a GPU has them: not packed for the CPU, gates and ups in turns."""
    monkeypatch.setattr(reference, "can_pack", lambda *_: False)
    network = load_model(tiny.TinySource(), torch.device("cpu"), torch.float32, 256)
    assert isinstance(network, LlamaForCausalLM)
    for layer in layers(network):
        layer.mlp.gate_up_proj.interleave()
    return network


def test_hidden_states_are_the_same(plain: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    token_ids = [5 + 7 * i % 90 for i in range(40)]
    expected = tiny.full_hidden(plain, token_ids)
    inside = copy.deepcopy(plain)
    for layer in layers(inside):
        layer.put_norms_inside()
        assert (layer.input_layernorm.weight == 1).all()
    given = []  # whether a norm had its rows' sums of squares
    for name in ("rms_norm_linear", "rms_norm_gated_linear"):
        inner = getattr(ops, name)

        def spy(*args: Any, sums_of_squares: torch.Tensor | None, inner: Any = inner) -> torch.Tensor:
            given.append(sums_of_squares is not None)
            return inner(*args, sums_of_squares=sums_of_squares)

        monkeypatch.setattr(ops, name, spy)
    norms = 2 * len(layers(inside))
    # The 40 tokens are few rows, then many, which all but the first product get sums of, then neither.
    for few, many, sums in (
        (64, 1024, [False] * norms),
        (39, 40, [False] + [True] * (norms - 1)),
        (39, 1024, []),
    ):
        monkeypatch.setattr(llama, "_FEW_ROWS", few)
        monkeypatch.setattr(llama, "_MANY_ROWS", many)
        given.clear()
        found = tiny.full_hidden(inside, token_ids)
        assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())
        assert given == sums
    # Without the norms' weights, which are folded in, the separate kernels would give something else.
    for layer in layers(inside):
        layer.input_layernorm.weight.fill_(1.1)
    assert float((tiny.full_hidden(inside, token_ids) - expected).abs().max()) > 1e-3 * float(expected.abs().max())


def test_the_engine_gives_the_same_tokens(plain: LlamaForCausalLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    prompts = ["the quick brown fox", "a", "0 1 2 3 4 5 6 7 8 9 " * 5]
    tokenizer = tiny.make_tokenizer()

    def tokens(network: LlamaForCausalLM) -> list[list[int]]:
        outputs = tiny.run(tiny.make_engine(network, tokenizer), prompts, params)
        return [output.outputs[0].token_ids for output in outputs]

    expected = tokens(plain)
    for layer in layers(plain):
        layer.put_norms_inside()
    assert tokens(plain) == expected


def test_who_has_them() -> None:
    """Only plain weights of a single Hopper GPU; a CPU's are packed for its own products."""
    network = load_model(tiny.TinySource(), torch.device("cpu"), torch.float32, 256)
    assert not any(layer.can_have_norms_inside or layer.norms_inside for layer in layers(network))
