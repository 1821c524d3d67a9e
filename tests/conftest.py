"""Shared by all tests: the markers `gpu` and `long`, and `device`, a parameter that runs a test on the CPU and on a GPU."""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples each time, at whatever pace: what fails here is a mistake of the change, not of a crowded machine.
settings.register_profile("fastattn", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fastattn")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device and the CUDA kernels; skipped without")
    # Threads of several workers that wait for one another on the same cores make a step ten times slower.
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
        threads = max(1, (os.cpu_count() or 1) // workers)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of the processes that tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection(session: pytest.Session) -> None:
    gc.disable()  # what is imported stays: looking for garbage in it again and again finds none


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.freeze()  # nor do tests look through it
    gc.enable()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def rows_of_heads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of a head that draws tokens and writes no logits, from now on."""
    from fastattn import ops

    rows: list[int] = []
    lm_head_sample = ops.lm_head_sample

    def spy(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        rows.append(x.shape[0])
        return lm_head_sample(x, *args, **options)

    monkeypatch.setattr(ops, "lm_head_sample", spy)
    return rows


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from fastattn.ops import has_cuda_kernels

    if not has_cuda_kernels():
        pytest.skip("the CUDA kernels are not built: FASTATTN_CUDA=on pip install .")
