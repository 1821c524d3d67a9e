"""Which GPUs a compiled CUDA library has code for."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

_CUBIN = re.compile(r"\.(sm_\d+[a-z]?)\.cubin")
_LINK_OPTION = re.compile(rb"-arch (sm_\d+[a-z]?) ")


def cuda_architectures(library: Path) -> list[str]:
    """Such as ["sm_80", "sm_90a"]; [] if it cannot be told.

    cuobjdump knows, but comes with the toolkit only; without it the options that ptxas writes into each cubin are looked for.
    """
    tool = shutil.which("cuobjdump") or "/usr/local/cuda/bin/cuobjdump"
    try:
        done = subprocess.run(
            [tool, "--list-elf", str(library)], capture_output=True, text=True, timeout=60, check=False
        )
        found = set(_CUBIN.findall(done.stdout))
    except (OSError, subprocess.TimeoutExpired):
        found = set()
    if not found:
        found = {match.decode() for match in _LINK_OPTION.findall(library.read_bytes())}
    return sorted(found, key=_number)


def covers(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability can run one of them: same major version, minor not above its own, and
    architecture-specific code ("sm_90a") on exactly its own."""
    for name in architectures:
        major, minor = divmod(_number(name), 10)
        exact = name[-1].isalpha()
        if major == capability[0] and (minor == capability[1] if exact else minor <= capability[1]):
            return True
    return False


def _number(name: str) -> int:
    return int(re.sub(r"\D", "", name))
