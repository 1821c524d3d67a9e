"""Copies by several threads: the same numbers as a plain copy, whatever the shape, and errors that reach the caller."""

from __future__ import annotations

import threading

import pytest
import torch

from fastattn.models.loader import copier as module
from fastattn.models.loader.copier import Copier, ThreadedCopier, copier_to

CPU = torch.device("cpu")


@pytest.fixture
def copier(monkeypatch: pytest.MonkeyPatch) -> ThreadedCopier:
    """Buffers of 64 bytes: every tensor here takes several, some rows too."""
    monkeypatch.setattr(module, "_CONVERTED_BYTES", 100)
    return ThreadedCopier(CPU, num_threads=3, buffer_bytes=64)


@pytest.mark.parametrize("stored_as", [torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_copy_has_the_same_numbers(stored_as: torch.dtype, dtype: torch.dtype | None, copier: ThreadedCopier) -> None:
    whole = torch.randint(0, 100, (13, 70)).to(stored_as)
    for stored in (whole, whole[3:9], whole[:, 5:41], whole[:, :3], whole[0], whole[:0], whole[2, 2]):
        out = torch.zeros(stored.shape, dtype=dtype or stored_as)
        copier.copy(out, stored)
        copier.wait()
        assert torch.equal(out.float(), stored.to(out.dtype).float()), stored.shape
        brought = copier.bring(stored, CPU)
        assert brought.data_ptr() != stored.data_ptr() or not stored.numel()
        assert torch.equal(brought.float(), stored.float()), stored.shape
    into = torch.zeros(13, 80, dtype=dtype or stored_as)  # a place whose rows lie apart
    copier.copy(into[:, :70], whole)
    copier.wait()
    assert torch.equal(into[:, :70].float(), whole.to(into.dtype).float()) and not into[:, 70:].float().any()
    copier.close()


def test_memory_is_that_of_the_buffers(copier: ThreadedCopier) -> None:
    """More chunks than buffers: they are used again, and none is lost."""
    out, stored = torch.zeros(1000), torch.arange(1000.0)
    copier.copy(out, stored)
    copier.wait()
    assert torch.equal(out, stored) and len(copier._free) == 4
    copier.close()


def test_an_error_in_a_thread_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised, and no thread is left."""
    before = threading.active_count()

    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(module._Buffers, "send", fail)
    copier = ThreadedCopier(CPU, num_threads=2, buffer_bytes=64)
    copier.copy(torch.zeros(9), torch.ones(9))
    with pytest.raises(OSError, match="the disk is gone"):
        copier.wait()
    with pytest.raises(OSError, match="the disk is gone"):
        copier.bring(torch.ones(9), CPU)
    assert len(copier._free) == 3
    copier.close()
    assert threading.active_count() == before


def test_a_cpu_needs_no_threads() -> None:
    with copier_to(CPU) as copier:
        assert type(copier) is Copier
        stored = torch.ones(3)
        assert copier.bring(stored, CPU) is stored
