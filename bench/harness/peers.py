"""What a user would pick instead. Imported only when a case asks for it; what is absent becomes null with a note."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch

# distribution → the name in a report
PACKAGES = {
    "triton": "triton",
    "fa3-fwd": "fa3",
    "flash-attn": "flash_attn",
    "flash-attn-3": "flash_attn_3",
    "flashinfer-python": "flashinfer",
    "vllm": "vllm",
    "transformers": "transformers",
}


class PeerAbsentError(Exception):
    """The peer cannot be had here; the message says why."""


def require(module: str, why: str = "") -> Any:
    """Imports a peer's module. Raises PeerAbsentError if it is not there or cannot be loaded."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a wheel for another torch or CUDA raises what it likes
        top = module.partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == top:
            raise PeerAbsentError(f"{top} is not installed{why}") from None
        first_line = (str(error).splitlines() or [""])[0]
        raise PeerAbsentError(f"{module} cannot be imported: {type(error).__name__}: {first_line[:160]}") from error


def flashinfer(module: str) -> Any:
    """A module of FlashInfer, if its kernels are there: without the prebuilt ones, each would be compiled for minutes."""
    require("flashinfer_jit_cache", ", so FlashInfer would compile each kernel here")
    return require(module)


def vllm_ops() -> Any:
    """vLLM's own kernels behind `vllm._custom_ops`."""
    ops = require("vllm._custom_ops")
    if not hasattr(torch.ops._C, "rms_norm"):
        raise PeerAbsentError("vllm is installed, but its kernels do not load here")
    return ops


def skip(reason: str) -> Callable[[], Callable[[], Any]]:
    """A peer that is left out on purpose."""

    def build() -> Callable[[], Any]:
        raise PeerAbsentError(reason)

    return build


def versions() -> dict[str, str]:
    """Versions of the peers that are installed, torch and cuDNN among them."""
    found = {"torch": str(torch.__version__)}
    if torch.version.cuda and (cudnn := torch.backends.cudnn.version()):  # type: ignore[no-untyped-call]
        found["cudnn"] = str(cudnn)
    for distribution, name in PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
