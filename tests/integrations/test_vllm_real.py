"""The plug-in in vLLM 0.26 itself: skipped where it is not installed."""

from __future__ import annotations

import importlib.util
import inspect
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from bench.harness.greedy import complaint
from tests.integrations import vllm_interface

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
FA3, TRITON = ("FLASH_ATTN", "FlashAttentionImpl"), ("TRITON_ATTN", "TritonAttentionImpl")  # vLLM's backends


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
@pytest.mark.parametrize(("dtype", "peer", "yardstick"), [("auto", FA3, TRITON), ("fp8", TRITON, FA3)])
def test_same_greedy_tokens_as_vllms_own_backend(
    dtype: str, peer: tuple[str, str], yardstick: tuple[str, str], tmp_path: Path
) -> None:
    """Where a token differs it was a near tie by the logits of both, and what follows is another text. Over caches of fp8 the
    peer is the one that can leave queries as they are, as ours does."""

    def run(backend: str) -> Any:
        command = [sys.executable, "-m", "tests.integrations.vllm_generate", backend, dtype, str(tmp_path / backend)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    backends = [("CUSTOM", "FastattnImpl"), peer, yardstick]
    with ThreadPoolExecutor(len(backends)) as pool:
        found = list(pool.map(run, [name for name, _ in backends]))
    for (_, impl), one in zip(backends, found, strict=True):
        assert one["impls"] == [impl]
    wrong = complaint(*(one["texts"] for one in found))
    assert wrong is None, wrong
