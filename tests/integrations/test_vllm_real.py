"""The plug-in in vLLM 0.26 itself: skipped where it is not installed."""

from __future__ import annotations

import importlib.util
import inspect
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.integrations import vllm_interface
from tests.integrations.vllm_generate import NUM_NEW

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
NEAR_TIE = 0.05  # of log-probabilities of two tokens; logits are bf16


def test_the_stand_in_is_like_vllm() -> None:
    from vllm.config import CUDAGraphMode
    from vllm.v1.attention import backend as real
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    ours = {f.name for f in fields(vllm_interface.CommonAttentionMetadata)}
    assert ours <= {f.name for f in fields(real.CommonAttentionMetadata)}
    for theirs, stand_in in (
        (real.AttentionType, vllm_interface.AttentionType),
        (real.AttentionCGSupport, vllm_interface.AttentionCGSupport),
    ):
        assert all(theirs[member.name].value == member.value for member in stand_in)
    for mode in vllm_interface.CUDAGraphMode:
        assert CUDAGraphMode[mode.name].mixed_mode().name == mode.mixed_mode().name
    assert AttentionBackendEnum.CUSTOM.value is None

    from fastattn.integrations.vllm import backend

    def parameters(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    for cls, own, names in (
        (real.AttentionImpl, backend.FastattnImpl, ("__init__", "forward")),
        (real.AttentionMetadataBuilder, backend.FastattnMetadataBuilder, ("__init__", "build", "update_block_table")),
        (
            real.AttentionBackend,
            backend.FastattnBackend,
            ("get_kv_cache_shape", "get_kv_cache_stride_order", "supports_combination"),
        ),
    ):
        for name in names:
            theirs = parameters(getattr(cls, name))
            assert parameters(getattr(own, name))[: len(theirs)] == theirs, name
        assert not own.__abstractmethods__


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_same_greedy_tokens_as_vllms_own_backend(dtype: str, tmp_path: Path) -> None:
    """Where a token differs it was a near tie, and what follows is another text. In fp8 vLLM rounds queries too."""

    def run(backend: str) -> Any:
        command = [sys.executable, "-m", "tests.integrations.vllm_generate", backend, dtype, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    ours, own = run("CUSTOM"), run("FLASH_ATTN")
    assert ours["impls"] == ["FastattnImpl"] and own["impls"] == ["FlashAttentionImpl"]
    tie = NEAR_TIE if dtype == "auto" else 10 * NEAR_TIE
    same = 0
    for a, b in zip(ours["texts"], own["texts"], strict=True):
        first = next((i for i in range(NUM_NEW) if a["tokens"][i] != b["tokens"][i]), None)
        same += NUM_NEW if first is None else first
        if first is not None:
            gap = min(text["top"][first][0] - text["top"][first][1] for text in (a, b))
            assert gap <= tie, f"token {first} is {a['tokens'][first]} and {b['tokens'][first]}, gap {gap}"
    assert same >= NUM_NEW * len(ours["texts"]) // 4  # near ties are rare
