"""Where a model runs: the device and dtype that a user's words stand for, and the memory that is there."""

from __future__ import annotations

import torch

from fastattn import ops
from fastattn.engine.host_memory import host_memory

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str) -> torch.device:
    """ "auto" is the GPU if there is one and the kernels were built, else the CPU."""
    if device == "auto":
        device = "cuda" if ops.has_cuda_kernels() and torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}, allowed are 'auto', 'cpu', 'cuda' and 'cuda:N'") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}, allowed are 'auto', 'cpu', 'cuda' and 'cuda:N'")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device is {device!r}, but torch {torch.__version__} sees no CUDA device")
        if not ops.has_cuda_kernels():
            raise ValueError(
                f"device is {device!r}, but the CUDA kernels are not built: FASTATTN_CUDA=on pip install ."
            )
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}, allowed are 'auto', {', '.join(map(repr, _DTYPES))}")
    if dtype == "float32" and device.type == "cuda":
        raise ValueError("dtype is 'float32' on a CUDA device, allowed are 'bfloat16' and 'float16'")
    return _DTYPES[dtype]


def device_memory(device: torch.device) -> tuple[int, int]:
    """Free and total bytes."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free), int(total)
    host = host_memory()
    return host.available, host.total


def rank_memory(device: torch.device, num_ranks: int) -> tuple[int, int]:
    """Free and total bytes for one of ``num_ranks`` ranks, which share a CPU's memory and have a GPU each."""
    free, total = device_memory(device)
    return (free, total) if device.type == "cuda" else (free // num_ranks, total // num_ranks)
