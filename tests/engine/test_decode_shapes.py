"""Decode steps in the shapes of CUDA graphs: each step fits one, few exist, and the text is that of unpadded steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn._runtime import TokenSequence
from fastattn.engine.batch import BatchBuffers, decode_shapes
from fastattn.engine.config import EngineConfig
from fastattn.engine.decode_shapes import DecodeShape, DecodeShapes
from fastattn.engine.engine import Engine
from fastattn.engine.sampling_params import SamplingParams
from fastattn.speculative.config import SpeculativeConfig
from tests.engine.tiny import run


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_every_step_fits_its_shape(data: st.DataObject) -> None:
    most, per_seq = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 33))
    counts = data.draw(st.lists(st.integers(1, per_seq), min_size=1, max_size=most))
    shapes = DecodeShapes(most, per_seq, 10**6)
    shape = shapes.fit(len(counts), sum(counts))
    assert shape is not None and shape.num_seqs <= shapes.max_num_seqs and shape.num_tokens <= shapes.max_num_tokens
    assert max(counts) <= shape.max_seqlen_q <= per_seq
    num_seqs, num_tokens = shape.num_seqs - len(counts), shape.num_tokens - sum(counts)
    assert num_seqs >= 0 and 0 <= num_tokens <= num_seqs * shape.max_seqlen_q
    if sum(counts) == len(counts):
        assert num_seqs == num_tokens  # a plain decode stays one: one token each


def test_shapes_are_few_and_near() -> None:
    shapes = DecodeShapes(256, 5, 2048)
    met = {shapes.fit(n, t) for n in range(1, 257) for t in range(n, 5 * n + 1)}
    assert len(met) <= 6 * len(shapes.sizes) == 78
    assert shapes.fit(1, 3) == DecodeShape(1, 3, 5)
    assert shapes.fit(7, 7) == DecodeShape(8, 8, 1)
    assert shapes.fit(7, 20) == DecodeShape(10, 24, 5)
    assert shapes.max_num_seqs == 256 + 51
    assert DecodeShapes(8, 5, 20).fit(6, 24) is None
    assert DecodeShapes(8, 5, 20).fit(4, 20) == DecodeShape(5, 20, 5)


def test_padding_is_written_behind_the_sequences() -> None:
    spec = SpeculativeConfig(num_speculative_tokens=4)
    config = EngineConfig(max_model_len=64, num_kv_blocks=8, block_size=8, max_num_seqs=4, speculative=spec)
    buffers = BatchBuffers(torch.device("cpu"), config)
    sequences: list[Any] = [TokenSequence([5, 6]), TokenSequence([7, 8])]
    for index, sequence in enumerate(sequences):
        sequence.add_blocks([index])
        sequence.num_computed = 1
    sequences[1].drafts = [9, 10, 11]
    shape = decode_shapes(config).fit(2, 5)
    assert shape == DecodeShape(3, 6, 5)
    batch = buffers.load(buffers.fill(sequences, [1, 4], shape))
    assert batch.token_ids.tolist() == [6, 8, 9, 10, 11, 0]
    assert batch.attention.cu_seqlens_q.tolist() == [0, 1, 5, 6]
    assert batch.attention.seqused_k.tolist() == [2, 5, 0]
    assert batch.attention.slot_mapping.tolist() == [1, 9, 10, 11, 12, -1]
    assert batch.logits_indices.tolist() == list(range(6))
    assert batch.attention.max_seqlen_q == 5


@pytest.mark.parametrize("spec", [None, {"num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}])
def test_the_text_is_that_of_unpadded_steps(make_engine: Callable[..., Engine], spec: dict[str, Any] | None) -> None:
    speculative = None if spec is None else SpeculativeConfig(**spec)
    prompts = ["the the the the", "a b c", "0 0 0 0 0 0", "the quick brown fox", "x"]
    params = [
        SamplingParams(temperature=0, max_tokens=30),
        SamplingParams(temperature=0, max_tokens=9, logprobs=2, prompt_logprobs=1),
        SamplingParams(temperature=0.4, seed=3, max_tokens=40, presence_penalty=0.5),
        SamplingParams(temperature=0.3, seed=1, n=3, max_tokens=21),
        SamplingParams(temperature=0, max_tokens=1),
    ]
    padded = make_engine(speculative=speculative, padded=True)
    texts = [[[c.token_ids for c in o.outputs] for o in run(e, prompts, params)] for e in (padded, make_engine())]
    assert texts[0] == texts[1]
    assert padded.runner.graphs is not None and len(padded.runner.graphs._graphs) > 3
