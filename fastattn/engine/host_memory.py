"""Host memory: how much this process may still take, as the kernel and the container see it; and pinning it for a GPU."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_UNLIMITED = 1 << 60  # cgroup v1 says "no limit" with a huge page-rounded number


@dataclass(frozen=True)
class HostMemory:
    """Bytes. available: what can be taken without swapping. peak: most that this process has held so far."""

    total: int
    available: int
    peak: int


def host_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> HostMemory:
    """The host's memory, cut to the container's limit if there is one.

    Not SC_AVPHYS_PAGES: that leaves out the page cache, and after a model's file was read most free memory is page cache.
    """
    meminfo = _fields(proc / "meminfo")
    page = os.sysconf("SC_PAGE_SIZE")
    total = meminfo.get("MemTotal", os.sysconf("SC_PHYS_PAGES") * page)
    available = meminfo.get("MemAvailable", total // 2)  # no Linux: half is a guess that hurts nobody
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, used = _number(cgroup / limit_name), _number(cgroup / used_name)
        if limit is not None and used is not None and limit < _UNLIMITED:
            total, available = min(total, limit), min(available, max(0, limit - used))
    return HostMemory(total, available, _fields(proc / "self" / "status").get("VmHWM", 0) or _peak_from_rusage())


def pin(memory: torch.Tensor) -> None:
    """Lets the GPU reach a tensor on the host, which fills its memory, until that is gone. As it is: torch's own pinned memory
    is rounded up to a power of two."""
    import torch

    if memory.numel() == 0:
        return
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(error) != 0:
        raise RuntimeError(f"cudaHostRegister of {memory.nbytes} bytes failed with {error}")
    # Or what the kernel puts in the same place later would be refused as known.
    weakref.finalize(memory, cudart.cudaHostUnregister, memory.data_ptr()).atexit = False


def _fields(path: Path) -> dict[str, int]:
    """The "Name:  123 kB" lines of a /proc file, in bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    rows = (line.replace(":", " ").split() for line in lines)
    return {row[0]: int(row[1]) * 1024 for row in rows if len(row) == 3 and row[2] == "kB" and row[1].isdigit()}


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def _peak_from_rusage() -> int:
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere
