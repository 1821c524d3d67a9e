"""Modules that are empty until they are wanted: when they come, and that torch gives an engine the same without them."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastattn.engine import late_imports
from fastattn.engine.late_imports import LateImports


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`late_package` with a module `part` that keeps count of how often it is executed, and `plain` that names it."""
    folder = tmp_path / "late_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("count = []\n")
    (folder / "part.py").write_text("from late_package import count\ncount.append(__name__)\nvalue = 7\n")
    (folder / "plain.py").write_text("import late_package.part\nfrom late_package import part\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [LateImports(["late_package.part"]), *sys.meta_path])
    yield folder
    for name in [name for name in sys.modules if name.startswith("late_package")]:
        del sys.modules[name]


def test_a_module_comes_when_an_attribute_is_wanted(package: Path) -> None:
    plain = importlib.import_module("late_package.plain")
    count = sys.modules["late_package"].count
    importlib.import_module("late_package.part")  # once more
    assert count == [] and not hasattr(plain.part, "__nothing__") and count == []
    assert plain.part.value == 7 and count == ["late_package.part"]
    assert plain.part.value == 7 and len(count) == 1
    with pytest.raises(AttributeError, match="nothing"):
        _ = plain.part.nothing


def test_a_name_that_is_imported_from_it_is_wanted(package: Path) -> None:
    (package / "user.py").write_text("from late_package.part import value\n")
    assert importlib.import_module("late_package.user").value == 7


def test_torch_compile_wants_them_all(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_imports, "_ASKS_FOR_ALL", "late_package.compiler")
    (package / "compiler.py").write_text("")
    importlib.import_module("late_package.plain")
    count = sys.modules["late_package"].count
    importlib.import_module("late_package.compiler")
    assert count == ["late_package.part"]


_ENGINE = """
import sys
from fastattn.engine.quick_start import quick_start
with quick_start("smollm2", "cpu"):
    from fastattn import LLM, SamplingParams
    llm = LLM("smollm2", device="cpu", quiet=True)
params = SamplingParams(temperature=0, max_tokens=8, logprobs=2)
tokens = llm.generate(["The lighthouse keeper"], params, use_tqdm=False)[0].outputs[0].token_ids
late = [name for name in ("torch._prims", "torch._decomp.decompositions") if name in sys.modules]
import torch
doubled = torch.compile(lambda x: x * 2, backend="aot_eager", fullgraph=True)(torch.ones(3))
print(len(tokens), late, doubled.tolist(), torch.empty(2, 3, device="meta").cumsum(1).shape, "torch._prims" in sys.modules)
"""


def test_an_engine_wants_none_of_torch_s() -> None:
    """And what does want them finds them."""
    done = subprocess.run([sys.executable, "-c", _ENGINE], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[-2] == "8 [] [2.0, 2.0, 2.0] torch.Size([2, 3]) True"
