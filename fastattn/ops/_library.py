"""The torch operator library `fastattn`: schema, CPU and fake implementations here, CUDA from `fastattn/_C.so`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

NAMESPACE = "fastattn"
KERNELS = Path(__file__).resolve().parents[1] / "_C.so"
HOW_TO_BUILD = "build them with FASTATTN_CUDA=on pip install ."

# Kept for the life of the module: when a Library object goes, torch removes its operators.
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]


def _load_kernels() -> bool:
    """Load the CUDA kernels if they were built and this torch can call them. Makes no CUDA context."""
    if torch.version.cuda is None or not KERNELS.exists():
        return False
    torch.ops.load_library(str(KERNELS))  # type: ignore[no-untyped-call]
    return True


_HAS_KERNELS = _load_kernels()
_WITH_CUDA_KERNEL: set[str] = set()  # a set and not torch's own answer, which torch.compile cannot trace


def has_cuda_kernels() -> bool:
    """Whether the CUDA kernels were built and are loaded."""
    return _HAS_KERNELS


def has_cuda_kernel(name: str) -> bool:
    """Whether the operator `name`, already defined, has a CUDA implementation."""
    return name in _WITH_CUDA_KERNEL


def _as_it_is(cpu: Callable[..., Any]) -> Callable[..., Any]:
    """Without autocast, which would take the products inside an implementation in half precision."""

    @wraps(cpu)
    def call(*args: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return cpu(*args)
        with torch.autocast("cpu", enabled=False):
            return cpu(*args)

    return call


def define(schema: str, cpu: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define one operator from its schema, CPU implementation and fake, and give what calls it."""
    name = schema.partition("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, _as_it_is(cpu), "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CUDA"):
        _WITH_CUDA_KERNEL.add(name)
    # The overload itself: a call through the packet searches for it each time.
    overload: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return overload


def differentiable(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any] | None = None) -> None:
    """Give the operator `name`, already defined, a backward for autograd."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
