"""What can be done beside the import of torch, which takes most of a start. Imports no torch itself."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastattn.config import cache_dir
from fastattn.engine.host_memory import host_memory
from fastattn.engine.late_imports import TORCH_MODULES, LateImports

logger = logging.getLogger("fastattn.engine")

# Builds that are to be the same each time give all files one time, 0 or 1980 or 1985. By it Python tells whether what was compiled is
# of the same source, and would run a former version's.
_YEAR_2000 = 946_684_800

_KERNELS = Path(__file__).resolve().parents[1] / "_C.so"


@contextmanager
def quick_start(model: str, device: str = "auto") -> Iterator[None]:
    """For a program of ours that has not imported torch yet, around the import and the building of its engine; not for a library.

    Meanwhile the kernel is asked to read the model's files into its page cache, the GPU's context is made, and Python looks for no
    garbage, of which imports make little and it would look through all that they keep; what is there in the end is never looked
    through again. torch loads no plug-ins for devices that the engine cannot use, parts of it not before they are wanted, and what
    Python compiled of it before (`keep_bytecode`).
    """
    LateImports(TORCH_MODULES).install()
    keeps, keeps_none = keep_bytecode(), sys.dont_write_bytecode
    sys.dont_write_bytecode = keeps_none and not keeps
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    for work in (lambda: read_ahead(Path(model).expanduser()), lambda: open_device(device)):
        threading.Thread(target=work, name="fastattn-quick-start", daemon=True).start()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        sys.dont_write_bytecode = keeps_none
        if was_enabled:
            gc.enable()


def keep_bytecode() -> bool:
    """Has Python keep what it compiles in our cache folder, if it does not find torch's compiled and may not keep it beside torch's
    sources, as in many containers: it would compile 1,300 modules at each start. Returns whether that is so.

    Python runs what it finds there. So not in a folder that others may enter, nor of sources that have no times of their own.
    """
    torch = None if "torch" in sys.modules else importlib.util.find_spec("torch")
    if torch is None or torch.origin is None or sys.pycache_prefix is not None:
        return False
    compiled = Path(importlib.util.cache_from_source(torch.origin))
    if compiled.is_file() or (not sys.dont_write_bytecode and os.access(compiled.parents[1], os.W_OK)):
        return False
    try:
        if os.stat(torch.origin).st_mtime < _YEAR_2000:
            return False
        folder = cache_dir() / "bytecode"
        folder.mkdir(0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError:
        return False
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        logger.warning(
            "what Python compiles is not kept in %s: it is not this user's alone, expected mode 0700", folder
        )
        return False
    if not os.access(folder, os.W_OK):
        return False
    sys.pycache_prefix = str(folder)
    return True


def read_ahead(path: Path) -> int:
    """Asks for a model's weights, a file or those of a folder, unless there is too little memory to keep them; returns their bytes.
    A path that cannot be read is the loader's to tell of."""
    try:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        num_bytes = sum(file.stat().st_size for file in files)
        if num_bytes > host_memory().available:
            return 0
        for file in files:
            fd = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(fd)
    except OSError:
        return 0
    return num_bytes


def open_device(device: str) -> bool:
    """Makes the primary context of a GPU, which torch then finds; whether it did. What is wrong with the GPU is torch's to tell."""
    index = re.fullmatch(r"auto|cuda(?::(\d+))?", device)
    if index is None or not _KERNELS.is_file():
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")  # its calls hold no lock of Python's
    except OSError:
        return False
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    return (
        driver.cuInit(0) == 0
        and driver.cuDeviceGet(ctypes.byref(handle), int(index[1] or 0)) == 0
        and driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle) == 0
    )
