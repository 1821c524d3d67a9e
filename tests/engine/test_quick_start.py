"""What runs beside the import of torch: hints to the kernel and the driver, of which no failure is anybody's."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from fastattn import config
from fastattn.engine import quick_start as module
from fastattn.engine.host_memory import HostMemory
from fastattn.engine.quick_start import open_device, quick_start, read_ahead


def test_files_are_asked_for_if_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("a.safetensors", 100), ("b.safetensors", 50), ("tokenizer.json", 7)):
        (tmp_path / name).write_bytes(bytes(size))
    asked: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *_: asked.append(os.fstat(fd).st_size))
    assert read_ahead(tmp_path) == 150 and asked == [100, 50]
    assert read_ahead(tmp_path / "a.safetensors") == 100
    assert read_ahead(tmp_path / "none") == 0
    monkeypatch.setattr(module, "host_memory", lambda: HostMemory(200, 149, 0))
    assert read_ahead(tmp_path) == 0 and asked == [100, 50, 100]


class Driver:
    def __init__(self, fails: str = "") -> None:
        self.calls: list[Any] = []
        self._fails = fails

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            self.calls.append((name, *(a for a in args if isinstance(a, int))))
            return int(name == self._fails)

        return call


def test_the_context_is_that_of_the_engines_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_C.so").touch()
    monkeypatch.setattr(module, "_KERNELS", tmp_path / "_C.so")
    for device, index in (("auto", 0), ("cuda", 0), ("cuda:3", 3)):
        driver = Driver()
        monkeypatch.setattr(ctypes, "CDLL", lambda name, driver=driver: driver)
        assert open_device(device)
        assert driver.calls == [("cuInit", 0), ("cuDeviceGet", index), ("cuDevicePrimaryCtxRetain",)]
    driver = Driver(fails="cuInit")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert not open_device("cuda") and driver.calls == [("cuInit", 0)]
    assert not open_device("cpu") and not open_device("cuda:x")
    monkeypatch.setattr(module, "_KERNELS", tmp_path / "none")  # then no engine runs on a GPU
    assert not open_device("auto") and driver.calls == [("cuInit", 0)]


def test_garbage_is_looked_for_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    seen: list[tuple[str, str]] = []
    monkeypatch.setattr(module, "read_ahead", lambda path: seen.append(("read", str(path))))
    monkeypatch.setattr(module, "open_device", lambda device: seen.append(("open", device)))
    before = gc.get_freeze_count()
    try:
        with pytest.raises(ValueError, match="no model"), quick_start("m", "cpu"):
            raise ValueError("no model")
        assert gc.isenabled() and gc.get_freeze_count() == before
        with quick_start("m", "cpu"):
            assert not gc.isenabled() and os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
        assert gc.isenabled() and gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
    for thread in threading.enumerate():
        if thread.name == "fastattn-quick-start":
            thread.join()
    assert sorted(seen) == [("open", "cpu"), ("open", "cpu"), ("read", "m"), ("read", "m")]


_COMPILED = """
import os, sys
from pathlib import Path
from fastattn.engine import quick_start as module
sources = Path(sys.argv[1])
sys.path.insert(0, str(sources))
if sys.argv[2] == "unwritable":
    module.os.access = lambda path, mode: not (mode == os.W_OK and Path(path) == sources / "torch")
before = sys.dont_write_bytecode
with module.quick_start("m", "cpu"):
    import torch.part
assert sys.dont_write_bytecode is before
print(sys.pycache_prefix, torch.part.value)
"""


@pytest.mark.parametrize("why", ["not allowed", "unwritable", "neither"])
def test_python_keeps_what_it_compiles(why: str, tmp_path: Path) -> None:
    """Of a `torch` of two modules: beside its sources, or in our cache folder where it cannot."""
    (sources := tmp_path / "sources" / "torch").mkdir(parents=True)
    (sources / "__init__.py").touch()
    (sources / "part.py").write_text("value = 7\n")
    env = {**os.environ, "FASTATTN_CACHE_DIR": str(tmp_path / "cache")}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    flags = ["-B"] if why == "not allowed" else []
    command = [sys.executable, *flags, "-c", _COMPILED, str(sources.parent), why]
    for _ in range(2):
        done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        prefix, value = done.stdout.split()
        kept = sorted(
            path.name.partition(".")[0]
            for path in tmp_path.rglob("*.pyc")
            if path.parent.parent.name == "torch" or path.parent.name == "torch"
        )
        assert value == "7" and kept == ["__init__", "part"]
        beside = (sources / "__pycache__").is_dir()
        assert (prefix, beside) == (
            ("None", True) if why == "neither" else (str(tmp_path / "cache" / "bytecode"), False)
        )


@pytest.fixture
def no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that was not imported, and must not be compiled beside its source."""
    (tmp_path / "torch.py").touch()
    monkeypatch.setattr(sys, "modules", {name: m for name, m in sys.modules.items() if name != "torch"})
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("no_torch")
def test_a_cache_that_cannot_be_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(module, "cache_dir", lambda: tmp_path / "file")
    assert not module.keep_bytecode() and sys.pycache_prefix is None
    (folder := tmp_path / "folder" / "bytecode").mkdir(0o700, parents=True)
    monkeypatch.setattr(module, "cache_dir", lambda: tmp_path / "folder")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: Path(path) != folder)
        assert not module.keep_bytecode() and sys.pycache_prefix is None
    with monkeypatch.context() as patch:
        patch.setattr(Path, "home", _no_home)
        patch.setattr(module, "cache_dir", config.cache_dir.__wrapped__)
        patch.delenv("FASTATTN_CACHE_DIR", raising=False)
        assert not module.keep_bytecode() and sys.pycache_prefix is None
    assert module.keep_bytecode() and sys.pycache_prefix == str(folder)
    assert not module.keep_bytecode()  # a user's own prefix stays


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o755, 0o701])
def test_what_others_may_enter_is_not_run(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Python runs the compiled modules that it finds, and asks nobody where they come from."""
    monkeypatch.setattr(module, "cache_dir", lambda: tmp_path)
    (folder := tmp_path / "bytecode").mkdir()
    folder.chmod(mode)
    assert not module.keep_bytecode() and sys.pycache_prefix is None
    assert str(folder) in caplog.text and "0700" in caplog.text
    folder.chmod(0o700)
    with monkeypatch.context() as patch:  # another user's
        patch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
        assert not module.keep_bytecode() and sys.pycache_prefix is None
    folder.rmdir()
    assert module.keep_bytecode() and folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("no_torch")
def test_sources_without_times_are_compiled_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version's of the same length would be taken for them."""
    monkeypatch.setattr(module, "cache_dir", lambda: tmp_path)
    for year in (0, 499_162_500):
        os.utime(tmp_path / "torch.py", (year, year))
        assert not module.keep_bytecode() and sys.pycache_prefix is None
    os.utime(tmp_path / "torch.py")
    assert module.keep_bytecode()


def test_it_comes_before_torch() -> None:
    code = "import sys, fastattn.engine.quick_start, fastattn.cli._session, fastattn.serve.engine_process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
