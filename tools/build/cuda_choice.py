"""Whether the CUDA library is built, for which GPUs, and against which torch headers. Used by setup.py and the backend."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

DEFAULT_ARCHS = "90a;80"


def cuda_wanted() -> bool:
    """FASTATTN_CUDA=on|off|auto; auto (the default) is on where nvcc and a GPU are."""
    choice = os.environ.get("FASTATTN_CUDA", "auto").lower()
    if choice not in ("on", "off", "auto"):
        raise SystemExit(f"FASTATTN_CUDA is {choice!r}, allowed are 'on', 'off' and 'auto'")
    if choice == "on" and nvcc_path() is None:
        raise SystemExit("FASTATTN_CUDA is 'on', but nvcc is neither on the PATH nor in CUDA_HOME")
    return choice == "on" or (choice == "auto" and nvcc_path() is not None and _has_gpu())


def cuda_archs() -> str:
    """FASTATTN_CUDA_ARCHS, as "90a;80"."""
    archs = os.environ.get("FASTATTN_CUDA_ARCHS", DEFAULT_ARCHS)
    if not re.fullmatch(r"\d{2,3}[af]?(;\d{2,3}[af]?)*", archs):
        raise SystemExit(f"FASTATTN_CUDA_ARCHS is {archs!r}, expected architectures such as '90a;80'")
    return archs


def nvcc_path() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")


def torch_include_dir() -> Path | None:
    """Headers of the torch that the package will run with.

    FASTATTN_TORCH_DIR names the torch package by hand. Else it is looked for in the environment that is being installed
    into: an isolated build hides that environment's packages from `import`, but `sysconfig` still knows its folder.
    """
    roots = [Path(p) for p in (os.environ.get("FASTATTN_TORCH_DIR"),) if p]
    roots += [Path(sysconfig.get_paths()[key], "torch") for key in ("purelib", "platlib")]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        roots.append(Path(spec.origin).parent)
    for root in roots:
        if (root / "include/torch/csrc/stable/library.h").exists():
            return root / "include"
    return None


def _has_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return done.returncode == 0 and "GPU " in done.stdout
