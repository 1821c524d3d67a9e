"""Looks around: versions, hardware, what is built. Each look survives whatever it finds and says so in an error field."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import fastattn
from fastattn import config
from fastattn.doctor.cubins import cuda_architectures
from fastattn.engine.host_memory import host_memory

# What our own code imports at run time.
REQUIRED = ("torch", "numpy", "tokenizers", "jinja2", "safetensors", "tqdm", "typer", "rich")
_FOR_DEVELOPERS = ("test", "lint", "docs")
_CPU_FLAGS = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "sve",
    "bf16",
)


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    memory_total: int
    memory_free: int


@dataclass
class Facts:
    """An *_error is None where all is well; an empty or None value means "not there"."""

    fastattn_version: str = fastattn.__version__
    fastattn_path: str = str(Path(fastattn.__file__).parent)
    python_version: str = platform.python_version()
    python_path: str = sys.executable
    platform: str = platform.platform()
    packages: dict[str, str | None] = field(default_factory=dict)
    extras: dict[str, list[str]] = field(default_factory=dict)  # optional part → its packages that are missing
    torch_error: str | None = None
    torch_cuda: str | None = None  # the CUDA version that torch was built for
    cuda_error: str | None = None  # a GPU is there, but torch cannot use it
    driver_version: str | None = None
    gpus: list[Gpu] = field(default_factory=list)
    nvcc: str | None = None
    nvcc_version: str | None = None
    runtime_path: str | None = None
    runtime_error: str | None = None
    kernels_path: str | None = None
    kernels_archs: list[str] = field(default_factory=list)
    kernels_loaded: bool = False
    kernels_error: str | None = None
    cpu_model: str = ""
    cpu_features: list[str] = field(default_factory=list)
    cpu_capability: str | None = None  # what torch's own kernels use
    num_cpus: int = 0  # that this process may run on
    num_threads: int | None = None
    memory_total: int = 0
    memory_available: int = 0
    cache_dir: str | None = None
    cache_writable: bool = False
    cache_free: int | None = None
    models: dict[str, int] = field(default_factory=dict)  # file or folder in the cache → bytes
    config_errors: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)


def collect_facts() -> Facts:
    facts = Facts()
    for name in REQUIRED:
        facts.packages[name] = _version(name)
    facts.extras = _missing_of_extras()
    _look_at_cpu(facts)
    _look_at_settings(facts)
    _look_at_build(facts)
    _look_at_torch(facts)
    facts.driver_version = _driver_version()
    facts.nvcc = _find_nvcc()
    if facts.nvcc is not None:
        lines = (_output(facts.nvcc, "--version") or "").splitlines()
        facts.nvcc_version = next((line.split("release", 1)[1].strip() for line in lines if "release" in line), None)
    return facts


def _missing_of_extras() -> dict[str, list[str]]:
    """For each optional part that users install (server, guard, …) what of it is not here, by the package's own metadata."""
    try:
        required = importlib.metadata.requires("fastattn") or []
    except importlib.metadata.PackageNotFoundError:  # run out of a checkout
        return {}
    found: dict[str, list[str]] = {}
    for line in required:
        match = re.match(r"""([\w.-]+).*extra == ['"](\w+)['"]""", line)
        if match is not None and match[2] not in _FOR_DEVELOPERS:
            missing = found.setdefault(match[2], [])
            if _version(match[1]) is None:
                missing.append(match[1])
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _look_at_cpu(facts: Facts) -> None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = set((values.get("flags") or values.get("Features") or "").split())
    facts.cpu_model = values.get("model name") or platform.processor() or platform.machine()
    facts.cpu_features = [flag for flag in _CPU_FLAGS if flag in flags]
    facts.num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = host_memory()
    facts.memory_total, facts.memory_available = memory.total, memory.available


def _look_at_settings(facts: Facts) -> None:
    shown = ("FASTATTN_", "CUDA_", "OMP_", "MKL_", "HF_")
    # HF_TOKEN is a secret, and so may be what we do not know: only its presence is shown.
    facts.variables = {
        name: "(set)" if any(word in name for word in ("TOKEN", "KEY", "SECRET")) else value
        for name, value in sorted(os.environ.items())
        if name.startswith(shown)
    }
    for read in (config.validate_inputs, config.log_level, config.cache_dir):
        try:
            read()
        except (ValueError, FileNotFoundError) as error:
            facts.config_errors.append(str(error))
    try:
        cache = config.cache_dir()
    except (ValueError, FileNotFoundError):
        return
    facts.cache_dir = str(cache)
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    facts.cache_writable = os.access(existing, os.W_OK)
    facts.cache_free = shutil.disk_usage(existing).free
    try:
        facts.models = {
            entry.name: _size(entry) for entry in sorted((cache / "models").iterdir()) if entry.name[0] != "."
        }
    except OSError:  # nothing was fetched yet
        pass


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


def _look_at_build(facts: Facts) -> None:
    spec = importlib.util.find_spec("fastattn._runtime")
    if spec is None or spec.origin is None:
        facts.runtime_error = "not built"
    else:
        facts.runtime_path = spec.origin
        try:
            importlib.import_module("fastattn._runtime")
        except Exception as error:  # whatever a broken binary raises is the finding
            facts.runtime_error = f"{type(error).__name__}: {error}"
    kernels = Path(fastattn.__file__).parent / "_C.so"
    if kernels.exists():
        facts.kernels_path = str(kernels)
        facts.kernels_archs = cuda_architectures(kernels)


def _look_at_torch(facts: Facts) -> None:
    try:
        import torch
    except Exception as error:  # an OSError for a missing library, an ImportError for a missing package
        facts.torch_error = f"{type(error).__name__}: {error}"
        return
    facts.torch_cuda = torch.version.cuda
    facts.num_threads = torch.get_num_threads()
    facts.cpu_capability = torch.backends.cpu.get_cpu_capability()
    try:
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                p = torch.cuda.get_device_properties(index)
                free, total = torch.cuda.mem_get_info(index)
                facts.gpus.append(Gpu(p.name, (p.major, p.minor), int(total), int(free)))
    except Exception as error:  # a driver too old, a card in use by somebody else, …
        facts.cuda_error = f"{type(error).__name__}: {error}"
    try:
        from fastattn.ops import has_cuda_kernels

        facts.kernels_loaded = has_cuda_kernels()
    except Exception as error:
        facts.kernels_error = f"{type(error).__name__}: {error}"


def _driver_version() -> str | None:
    answer = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if answer and answer.strip():
        return answer.split()[0]
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def _find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [shutil.which("nvcc"), *(str(Path(home, "bin", "nvcc")) for home in homes if home)]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)
