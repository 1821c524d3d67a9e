"""Drives CMake and Ninja; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "tools/build"))
from cuda_choice import cuda_archs, cuda_wanted, torch_include_dir  # noqa: E402

# What one nvcc job may take; more jobs than memory allows end in the OOM killer.
_BYTES_PER_JOB = 4 << 30


def num_jobs() -> int:
    if jobs := os.environ.get("MAX_JOBS"):
        return int(jobs)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(os.cpu_count() or 1, memory // _BYTES_PER_JOB))


class CMakeBuild(build_ext):
    """Builds `fastattn/_runtime` always and `fastattn/_C.so` where CUDA is wanted, in one CMake project."""

    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        import pybind11

        command = [
            "cmake",
            "-S", str(ROOT),
            "-B", str(Path(self.build_temp).resolve()),
            "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTATTN_OUTPUT_DIR={out}",
            f"-DFASTATTN_CUDA={'ON' if cuda_wanted() else 'OFF'}",
        ]  # fmt: skip
        if cuda_wanted():
            include = torch_include_dir()
            if include is None:
                raise SystemExit("the CUDA library needs torch's headers (torch >= 2.11), and no torch was found")
            command += [f"-DFASTATTN_TORCH_INCLUDE={include}", f"-DFASTATTN_CUDA_ARCHS={cuda_archs()}"]
        subprocess.run(command, check=True)
        subprocess.run(["cmake", "--build", self.build_temp, "--parallel", str(num_jobs())], check=True)

    def copy_extensions_to_source(self) -> None:
        """An editable install runs from the source tree; setuptools brings what it knows of there, which is `_runtime` alone."""
        super().copy_extensions_to_source()
        kernels = Path(self.build_lib, "fastattn/_C.so")
        if kernels.exists():
            shutil.copy2(kernels, ROOT / "fastattn/_C.so")


setup(ext_modules=[Extension("fastattn._runtime", sources=[])], cmdclass={"build_ext": CMakeBuild})
