"""What the facts mean: for each thing that matters, ok, a warning or a problem, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fastattn.doctor.cubins import covers
from fastattn.doctor.facts import Facts

_LITTLE_MEMORY = 1 << 30
_LITTLE_DISK = 1 << 30
_BUILD = "FASTATTN_CUDA=on pip install ."


@dataclass(frozen=True)
class Verdict:
    """A problem: something will not work. A warning: it works, but not as well as it could."""

    status: Literal["ok", "warning", "problem"]
    subject: str
    finding: str
    remedy: str = ""


def judge(facts: Facts) -> list[Verdict]:
    return [*_python(facts), *_runtime(facts), *_gpu(facts), *_cpu(facts), *_settings(facts)]


def _python(facts: Facts) -> Iterator[Verdict]:
    version = tuple(int(part) for part in facts.python_version.split(".")[:2])
    if version < (3, 10):
        yield Verdict("problem", "python", f"{facts.python_version} is too old", "use Python 3.10 or later")
    missing = [name for name, found in facts.packages.items() if found is None]
    if missing:
        yield Verdict("problem", "packages", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    if facts.torch_error is not None and "torch" not in missing:
        yield Verdict(
            "problem", "torch", f"cannot be imported: {facts.torch_error}", "pip install --force-reinstall torch"
        )
    if not missing and facts.torch_error is None:
        yield Verdict("ok", "packages", f"torch {facts.packages.get('torch')} and all others are there")


def _runtime(facts: Facts) -> Iterator[Verdict]:
    if facts.runtime_error is None:
        yield Verdict("ok", "runtime", "fastattn._runtime is built and loads")
    else:
        yield Verdict(
            "problem", "runtime", f"fastattn._runtime: {facts.runtime_error}", "pip install . in the repository"
        )


def _gpu(facts: Facts) -> Iterator[Verdict]:
    if facts.kernels_error is not None:
        yield Verdict("problem", "kernels", f"_C.so cannot be loaded: {facts.kernels_error}", _BUILD)
    if facts.cuda_error is not None:
        yield Verdict("problem", "gpu", f"torch cannot use it: {facts.cuda_error}", "update the NVIDIA driver")
        return
    if not facts.gpus:
        if facts.driver_version is not None and facts.torch_error is None:
            cause = "torch is built without CUDA" if facts.torch_cuda is None else "torch sees none of its GPUs"
            remedy = (
                "install a CUDA build of torch"
                if facts.torch_cuda is None
                else "look at CUDA_VISIBLE_DEVICES and nvidia-smi"
            )
            yield Verdict("warning", "gpu", f"driver {facts.driver_version} is there, but {cause}", remedy)
        else:
            yield Verdict("ok", "gpu", "none: models run on the CPU")
        return
    names = ", ".join(f"{gpu.name} (sm_{gpu.capability[0]}{gpu.capability[1]})" for gpu in facts.gpus)
    yield Verdict("ok", "gpu", names)
    if facts.kernels_path is None:
        remedy = _BUILD if facts.nvcc else f"install the CUDA toolkit (nvcc), then {_BUILD}"
        yield Verdict("warning", "kernels", "not built: a GPU is there, but models run on the CPU", remedy)
    elif facts.kernels_error is None and not facts.kernels_loaded:
        yield Verdict("problem", "kernels", "built, but this torch cannot load them", "install a CUDA build of torch")
    elif facts.kernels_archs:
        without = [gpu.name for gpu in facts.gpus if not covers(facts.kernels_archs, gpu.capability)]
        have = ", ".join(facts.kernels_archs)
        if without:
            wanted = ";".join(sorted({_arch(gpu.capability) for gpu in facts.gpus}))
            yield Verdict(
                "problem",
                "kernels",
                f"built for {have}, not for {', '.join(without)}",
                f'FASTATTN_CUDA=on FASTATTN_CUDA_ARCHS="{wanted}" pip install .',
            )
        elif facts.kernels_loaded:
            yield Verdict("ok", "kernels", f"built for {have}")


def _arch(capability: tuple[int, int]) -> str:
    """As FASTATTN_CUDA_ARCHS wants it: Hopper and later have code that only their exact type runs."""
    return f"{capability[0]}{capability[1]}" + ("a" if capability[0] >= 9 else "")


def _cpu(facts: Facts) -> Iterator[Verdict]:
    if facts.num_threads is not None and facts.num_threads > facts.num_cpus:
        yield Verdict(
            "warning",
            "threads",
            f"torch uses {facts.num_threads} threads on {facts.num_cpus} CPUs",
            f"set OMP_NUM_THREADS={facts.num_cpus}",
        )
    slow = facts.cpu_features and not {"avx2", "asimd"} & set(facts.cpu_features)
    if slow:
        yield Verdict(
            "warning", "cpu", f"{facts.cpu_model} has no AVX2: matrix products will be slow", "use a newer CPU or a GPU"
        )
    if facts.memory_available < _LITTLE_MEMORY:
        free = f"{facts.memory_available / 2**20:.0f} MiB of {facts.memory_total / 2**20:.0f} MiB are free"
        yield Verdict(
            "warning", "memory", free, "end other programs, or plan a smaller model with: fastattn plan MODEL"
        )
    else:
        yield Verdict(
            "ok", "memory", f"{facts.memory_available / 2**30:.1f} GiB of {facts.memory_total / 2**30:.1f} GiB are free"
        )


def _settings(facts: Facts) -> Iterator[Verdict]:
    for error in facts.config_errors:
        yield Verdict("problem", "settings", error, "correct or unset the variable")
    if facts.cache_dir is None:
        return
    if not facts.cache_writable:
        yield Verdict(
            "warning", "cache", f"{facts.cache_dir} cannot be written", "set FASTATTN_CACHE_DIR to a folder of yours"
        )
    elif facts.cache_free is not None and facts.cache_free < _LITTLE_DISK and not facts.models:
        yield Verdict(
            "warning",
            "cache",
            f"{facts.cache_free / 2**20:.0f} MiB are free where {facts.cache_dir} is",
            "free some, or set FASTATTN_CACHE_DIR to another disk",
        )
    else:
        yield Verdict("ok", "cache", f"{facts.cache_dir}, models in it: {len(facts.models)}")
