"""The benchmark's formulas are those of the operator tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.harness import formulas
from tests.harness import formulas as loops
from tests.harness.attention_calls import (
    batch_backward_calls,
    batch_calls,
    merge_calls,
    paged_calls,
    varlen_backward_calls,
    varlen_calls,
)
from tests.harness.generators import Gen
from tests.harness.sampling_calls import adjust_calls, bitmask_calls, logprob_calls
from tests.harness.specs.elementwise import embedding_calls
from tests.harness.specs.kv_cache import rope_calls


def finite_merge_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, call in merge_calls(gen, dtype):
        yield name, {key: t.nan_to_num(1.0, 2.0, -2.0) for key, t in call.items()}


FORMULAS = {
    "embedding": embedding_calls,
    "batch_attention": batch_calls,
    "batch_attention_backward": batch_backward_calls,
    "merge_attention_states": finite_merge_calls,
    "paged_attention": paged_calls,
    "varlen_attention": varlen_calls,
    "varlen_attention_backward": varlen_backward_calls,
    "adjust_logits": adjust_calls,
    "apply_token_bitmask": bitmask_calls,
    "token_logprobs": logprob_calls,
    "rope_kv_write": rope_calls,
}


# Arguments that no benchmark gives; a call that makes use of one is left out.
UNUSED: dict[str, Any] = {
    "window_size": (-1, -1),
    "softcap": 0.0,
    "q_norm_weight": None,
    "interleaved": False,
    "hadamard": False,
    **dict.fromkeys(("alibi_slopes", "sinks", "seqused_q", "q_descale", "k_descale", "v_descale", "dlse")),
}


def is_covered(call: dict[str, Any]) -> bool:
    if any(call.get(name, default) != default for name, default in UNUSED.items() if name != "q_norm_weight"):
        return False
    if "cos_sin" in call:
        return "q_norm_weight" not in call and call["cos_sin"].shape[1] == call["q"].shape[2]
    if "seqused_k" in call and "cu_seqlens_k" in call:
        return False
    if "v" in call and call["v"].shape[-1] != call["q"].shape[-1]:
        return False
    scale = call.get("softmax_scale")
    return scale is None or scale == call["q"].shape[-1] ** -0.5


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_agree_with_those_in_loops(name: str) -> None:
    """On every call of the operator tests that the benchmark's formula covers."""
    compared = 0
    for label, call in FORMULAS[name](Gen(), torch.float32):
        expected = getattr(loops, name)(torch.float64, **call)
        has_no_keys = "attention" in name and bool(torch.isneginf(call.get("lse", expected[1])).any())
        if not is_covered(call) or has_no_keys or expected[0].numel() == 0:
            continue
        dropped = {*UNUSED, "norm_eps", "softmax_scale"}
        found = getattr(formulas, name)(torch.float64, **{k: v for k, v in call.items() if k not in dropped})
        for i, (a, e) in enumerate(zip(found, expected, strict=True)):
            torch.testing.assert_close(
                a.double(),
                e.double(),
                rtol=1e-9,
                atol=1e-9,
                equal_nan=True,
                msg=lambda m, at=f"{label}, result {i}": f"{at}: {m}",
            )
        compared += 1
    assert compared >= 2
