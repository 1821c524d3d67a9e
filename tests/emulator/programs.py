"""The kernels' own CUDA sources as programs for the CPU: which there are, and how they are compiled."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tools/build"))
from cuda_choice import nvcc_path  # noqa: E402

CSRC = ROOT / "csrc"
NUM_CPUS = len(os.sched_getaffinity(0))

KERNELS = {
    "flash_fwd_sm90": [*sorted(CSRC.glob("attention/flash_fwd_sm90*.cu")), CSRC / "attention/flash_combine.cu"],
    "flash_bwd_sm90": sorted(CSRC.glob("attention/flash_bwd_sm90*.cu")),
    "flash_sm80": [*sorted(CSRC.glob("attention/flash_sm80*.cu")), CSRC / "attention/flash_combine.cu"],
    "paged_decode": sorted(CSRC.glob("attention/paged_decode*.cu")),
    "gemm_sm90": [
        *sorted(
            {*CSRC.glob("gemm/gemm_*sm90*.cu")}
            - {*CSRC.glob("gemm/gemm_sm90_w4*.cu"), *CSRC.glob("gemm/gemm_sparse*.cu")}
        ),
        CSRC / "sampling/gumbel_max.cu",
    ],
    "gemm_sm90_sparse_24": sorted(CSRC.glob("gemm/gemm_sparse*_sm90.cu")),
    "gemm_sm90_w4_tiles": [
        *sorted(CSRC.glob("gemm/gemm_sm90_w4_*_tiles.cu")),
        *sorted(CSRC.glob("gemm/gemm_sm90_w4_*_some_rows.cu")),
    ],
    "gemm_sm90_w4": [
        *sorted({*CSRC.glob("gemm/gemm_sm90_w4*.cu")} - {*CSRC.glob("gemm/gemm_sm90_w4_*_some_rows.cu")}),
        *(CSRC / f"gemm/{name}.cu" for name in ("fp4_to_fp8", "w4_tiles")),
    ],
    "decode_layers": sorted(CSRC.glob("decoder/*.cu")),
    "copy_blocks": [CSRC / "elementwise/copy_blocks.cu"],
    "small_operators": [
        *sorted(CSRC.glob("norm/*.cu")),
        *(CSRC / f"elementwise/{name}.cu" for name in ("embedding", "gated_activation", "quantize_rows")),
        *(CSRC / f"sampling/{name}.cu" for name in ("adjust_logits", "apply_token_bitmask")),
    ],
}
DEVICE = [HERE / f"{name}.cpp" for name in ("device", "copies", "tensor_cores", "runtime")]  # of every program


def cuda_include() -> Path | None:
    """Where the nvcc that a build would take has its headers; it may be a script that calls the real one."""
    if nvcc_path() is None:
        return None
    shown = subprocess.run([nvcc_path(), "--dryrun", "-x", "cu", "-E", os.devnull], capture_output=True, text=True)
    found = re.search(r'INCLUDES="-I([^"]+)"', shown.stderr)
    return Path(found[1]) if found else None


CXX, INCLUDE = shutil.which("g++"), cuda_include()


# Compiling a kernel takes longer than its calls do, once what they spend their time in, DEVICE, is compiled for speed: with
# all vectors of this machine, and with no multiply-add that rounds once, so that every sum is the same as anywhere.
QUICKLY, FOR_SPEED = ["-Og"], ["-O3", "-march=native", "-ffp-contract=off"]


def compiler(flags: list[str], *first_include: Path) -> list[str]:
    """The command of a compilation, but for what is compiled."""
    includes = [f"-I{folder}" for folder in (*first_include, HERE, CSRC)]
    # Ubuntu's g++ has _FORTIFY_SOURCE on, to which a jump to another stack is an error.
    flags = ["-std=c++17", *flags, "-Wno-psabi", "-U_FORTIFY_SOURCE"]
    return [str(CXX), *flags, *includes, "-isystem", str(INCLUDE)]


class Build:
    """Objects and programs in a folder that the workers of a test run share: each is made once, by who needs it first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def objects(self, sources: Iterable[Path], *first_include: Path) -> list[Path]:
        with ThreadPoolExecutor(NUM_CPUS) as pool:
            return list(pool.map(lambda source: self._object(source, first_include), sources))

    def _object(self, source: Path, first_include: tuple[Path, ...]) -> Path:
        target = (first_include[0] if first_include else self.folder) / f"{source.name}.o"
        if source in DEVICE:
            return self._make(target, [*compiler(FOR_SPEED), "-include", str(HERE / "device.h"), "-c", str(source)])
        command = [*compiler(QUICKLY, *first_include), "-include", str(self._prefix()), "-Winvalid-pch"]
        return self._make(target, [*command, "-x", "c++", "-c", str(source)])

    def _prefix(self) -> Path:
        """A header that includes device.h, compiled: reading it and CUDA's is half of what compiling a kernel takes."""
        prefix = self.folder / "prefix.h"
        self._make(Path(f"{prefix}.gch"), [*compiler(QUICKLY), "-x", "c++-header", str(HERE / "device.h")])
        return prefix

    def program(self, name: str, objects: Iterable[Path]) -> Path:
        return self._make(self.folder / name, [CXX, *map(str, objects)])

    def _make(self, target: Path, command: list[str]) -> Path:
        with Path(f"{target}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                done = subprocess.run([*command, "-o", f"{target}.new"], capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                Path(f"{target}.new").rename(target)
        return target


def sources(kernel: str) -> list[Path]:
    return [*KERNELS[kernel], HERE / f"{kernel}.cpp", *DEVICE]


def run(program: Path, first: int, last: int, *size: str) -> str:
    """What the program has to say of these calls, empty if all were right."""
    done = subprocess.run([program, str(first), str(last), *size], capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr or f"{program.name} ended with {done.returncode}"
