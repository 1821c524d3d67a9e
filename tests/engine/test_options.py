"""Options of an engine that are of another kind than they should be: a message that names them, before anything is loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.engine.llm import LLM
from fastattn.engine.setup import EngineOptions, plan_options
from tests.engine.tiny import CONFIG, TinySource

_SIZES = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_kv_blocks", "tensor_parallel_size")
_FLAGS = (
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "use_cuda_graphs",
    "async_scheduling",
    "debug_checks",
    "batch_invariant",
    "disable_cascade_attn",
)
_NUMBERS = ("kv_offloading_size", "gpu_memory_utilization", "rank_timeout_seconds")
_TEXTS = ("dtype", "kv_cache_dtype", "kv_cache_scales", "quantization", "policy", "trace")


def test_all_options_are_here() -> None:
    others = {"device", "block_size", "seed", "speculative"}
    names = {field.name for field in dataclasses.fields(EngineOptions)}
    assert names == {*_SIZES, *_FLAGS, *_NUMBERS, *_TEXTS, *others}


_BAD: list[tuple[str, Any]] = [
    *((name, value) for name in _SIZES for value in ("8", 0, -1, 1.5, True, [])),
    *((name, value) for name in _FLAGS for value in ("false", 1, 1.0, [])),
    *((name, value) for name in _NUMBERS for value in ("0.5", True, 0, float("nan"), [])),
    *((name, value) for name in _TEXTS for value in (1, [], b"auto")),
    *(("seed", value) for value in ("x", 1.5, True, 2**63)),
    *(("block_size", value) for value in ("16", [], 12)),
    *(("device", value) for value in ("tpu", [])),
    ("speculative", "ngram"),
]


@pytest.mark.parametrize(("name", "value"), _BAD, ids=str)
def test_another_kind_of_value_is_named(name: str, value: Any) -> None:
    options = {"num_kv_blocks": 64, "max_model_len": 64} | {name: value}
    with pytest.raises((ValueError, TypeError), match=name) as caught:
        LLM(TinySource(), quiet=True, **({"device": "cpu"} | options))
    assert repr(value) in str(caught.value) or type(value).__name__ in str(caught.value)


def sizes(**wishes: Any) -> tuple[int, int]:
    chosen = plan_options(CONFIG, EngineOptions(max_model_len=64, **wishes), torch.device("cpu"), torch.float32)
    return chosen.max_num_seqs, chosen.max_num_batched_tokens


def test_sizes_of_a_step_are_those_that_are_asked_for() -> None:
    """5 tokens were 32: as many as there are places for sequences, which nobody had asked for."""
    assert sizes() == (32, 512)
    assert sizes(max_num_batched_tokens=5) == (5, 5)
    assert sizes(max_num_seqs=1000) == (1000, 1000)
    assert sizes(max_num_seqs=3, max_num_batched_tokens=3) == (3, 3)
    with pytest.raises(ValueError, match="max_num_batched_tokens is 7, allowed is at least max_num_seqs = 8"):
        sizes(max_num_seqs=8, max_num_batched_tokens=7)
    assert sizes(enable_chunked_prefill=False) == (32, 512)
    with pytest.raises(ValueError, match=r"without chunked prefill .* allowed is at least max_model_len = 64"):
        LLM(TinySource(), device="cpu", enable_chunked_prefill=False, max_num_batched_tokens=40, max_model_len=64)


def test_a_trace_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"trace is '{tmp_path}', expected a file"):
        LLM(TinySource(), device="cpu", quiet=True, trace=str(tmp_path))
