"""sdist and wheel build, the wheel runs where nothing of this repository is, and importing is cheap."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, *, executable: str | Path = sys.executable, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        [str(executable), "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_quick_and_lazy() -> None:
    """Under a second beyond torch's own import, and neither the engine nor the tokenizer library is loaded by it."""
    out = python("""
        import sys, time
        import torch
        start = time.perf_counter()
        import fastattn
        fastattn.ops
        seconds = time.perf_counter() - start
        assert not {"transformers", "tokenizers", "gguf", "fastattn.engine", "fastattn.models"} & set(sys.modules)
        assert not torch.cuda.is_initialized()
        print(seconds)
    """)
    assert float(out) < 1.0


def test_import_of_everything_makes_no_cuda_context() -> None:
    python("""
        import importlib, pkgutil, torch, fastattn
        from importlib.util import find_spec
        # What only vLLM imports, which none of our extras brings along.
        absent = () if find_spec("vllm") else ("fastattn.integrations.vllm.backend",)
        for module in pkgutil.walk_packages(fastattn.__path__, "fastattn."):
            if not module.name.endswith(("__main__", "_C")) and module.name not in absent:
                importlib.import_module(module.name)
        assert not torch.cuda.is_initialized()
    """)


def test_a_gpu_that_is_hidden_is_no_error() -> None:
    python("import fastattn; assert fastattn.ops.has_cuda_kernels() in (True, False)", CUDA_VISIBLE_DEVICES="")


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel), built from a copy of what is tracked, the wheel out of the unpacked sdist."""
    out, tree = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("tree")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not in a git checkout: what belongs to the package is not known")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    # Of a build type that CMake has no flags for, none of which it needs to be a wheel: nothing is optimized.
    environment = os.environ | {"FASTATTN_CUDA": "off", "CMAKE_BUILD_TYPE": "Plain"}
    code = "import sys; sys.path.insert(0, 'tools/build'); import _backend as b; print(b.{}(sys.argv[1]))"

    def build(what: str, folder: Path) -> Path:
        done = subprocess.run(
            [sys.executable, "-c", code.format(what), out],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return out / done.stdout.split()[-1]

    sdist = build("build_sdist", tree)
    unpacked = tmp_path_factory.mktemp("sdist")
    subprocess.run(["tar", "-xzf", sdist, "-C", unpacked], check=True)
    return sdist, build("build_wheel", next(unpacked.iterdir()))


def test_sdist_has_the_sources_and_nothing_built(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    wanted = ["setup.py", "CMakeLists.txt", "LICENSE", "README.md", "tools/build/_backend.py", "fastattn/_runtime.pyi"]
    sources = [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert not set(wanted + sources) - set(names)
    assert not [name for name in names if name.endswith((".so", ".o", ".gguf", ".pyc"))]


def test_wheel_has_the_package_and_nothing_else(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        names = archive.namelist()
    assert "fastattn/py.typed" in names and "fastattn/_runtime.pyi" in names and "fastattn/ops/linear.py" in names
    page = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastattn/serve/static").rglob("*") if path.is_file()}
    assert page and page <= set(names)
    assert any(name.startswith("fastattn/_runtime.") and name.endswith(".so") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastattn"}
    assert distributions[1].stat().st_size < 5 << 20


def test_the_wheel_runs_in_a_clean_environment(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    """A new virtual environment that sees this one's dependencies, but not this repository nor what is installed of it."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    interpreter = home / "bin/python"
    target = Path(python("import sysconfig; print(sysconfig.get_paths()['platlib'])", executable=interpreter).strip())
    with zipfile.ZipFile(distributions[1]) as archive:
        archive.extractall(target)
    import torch

    # The dependencies' folder comes after the wheel's; an editable install's hook there is not run by PYTHONPATH.
    dependencies = str(Path(torch.__file__).parents[1])
    out = python(
        """
        import pathlib, sys, fastattn, torch
        from fastattn import _runtime, ops
        print(pathlib.Path(fastattn.__file__).parent)
        pool = _runtime.BlockPool(4)
        assert pool.allocate(4) == [0, 1, 2, 3] or pool.num_free == 0
        x = torch.randn(3, 8)
        torch.testing.assert_close(ops.rms_norm(x, torch.ones(8)), torch.nn.functional.rms_norm(x, (8,), eps=1e-6))
        """,
        executable=interpreter,
        cwd=tmp_path,
        PYTHONPATH=f"{target}{os.pathsep}{dependencies}",
    )
    assert Path(out.strip()) == target / "fastattn"
    done = subprocess.run(
        [interpreter, "-m", "fastattn", "doctor"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{target}{os.pathsep}{dependencies}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "fastattn" in done.stdout and "Traceback" not in done.stderr
