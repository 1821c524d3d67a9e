"""Modules that are empty until they are wanted: when they come, and that torch gives an engine the same without them."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
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


def test_all_of_it_is_there_for_another_thread(package: Path) -> None:
    """One that asks while it is executed waits; the module itself, which asks for what it does not have yet, does not."""
    (package / "part.py").write_text(
        "import late_package, threading\n"
        "import late_package.part as itself\n"
        "assert not hasattr(itself, 'value')\n"
        "late_package.begun.set()\n"
        "assert not late_package.asked.wait(0.3)\n"
        "value = 7\n"
    )
    part = importlib.import_module("late_package.part")
    owner = importlib.import_module("late_package")
    owner.begun, owner.asked = threading.Event(), threading.Event()  # type: ignore[attr-defined]
    found: list[object] = []

    def ask() -> None:
        owner.begun.wait(10)
        found.append(getattr(part, "value", "nothing"))
        owner.asked.set()

    thread = threading.Thread(target=ask)
    thread.start()
    assert part.value == 7
    thread.join()
    assert found == [7]


def test_a_module_within_a_late_one_is_executed_once(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The late one first, as it always is: here both ask for each other's names."""
    (package / "part.py").unlink()
    (part := package / "part").mkdir()
    (part / "__init__.py").write_text(
        "from late_package import count\ncount.append('part')\nvalue = 7\nfrom late_package.part.inner import Inner\n"
    )
    (part / "inner.py").write_text(
        "from late_package import count\ncount.append('inner')\n"
        "from late_package.part import value\nclass Inner:\n    of = value\n"
    )
    importlib.import_module("late_package.part")
    assert (count := sys.modules["late_package"].count) == []
    inner = importlib.import_module("late_package.part.inner")
    assert count == ["part", "inner"] and inner.Inner.of == 7
    assert inner is sys.modules["late_package.part.inner"] and inner.Inner is sys.modules["late_package.part"].Inner
    assert inner.__spec__ is not None and inner.__spec__.loader is inner.__loader__


def test_a_star_wants_all(package: Path) -> None:
    (package / "part.py").write_text("__all__ = ['value']\nvalue = 7\n")
    (package / "user.py").write_text("from late_package.part import *\n")
    assert importlib.import_module("late_package.user").value == 7


def test_a_module_s_own_getattr_stays(package: Path) -> None:
    (package / "part.py").write_text("def __getattr__(name):\n    return name.upper()\n")
    part = importlib.import_module("late_package.part")
    assert (part.loud, part.louder) == ("LOUD", "LOUDER")


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
    from fastattn.models.loader import open_model
    from fastattn.models.loader.quantized_source import with_quantization
    from fastattn.models.weight_formats import FORMATS
    formats = [str(with_quantization(open_model("smollm2"), name).config.quantization) for name in FORMATS]
params = SamplingParams(temperature=0, max_tokens=8, logprobs=2)
tokens = llm.generate(["The lighthouse keeper"], params, use_tqdm=False)[0].outputs[0].token_ids
import torch
drawn = torch.rand(2, generator=torch.Generator().manual_seed(3))
late = [name for name in ("torch._prims", "torch._decomp.decompositions") if name in sys.modules]
doubled = torch.compile(lambda x: x * 2, backend="aot_eager", fullgraph=True)(torch.ones(3))
import torch.export.unflatten
assert torch.equal(drawn, torch.rand(2, generator=torch.Generator().manual_seed(3)))
print(len(tokens), len(formats), late, doubled.tolist(), torch.empty(2, 3, device="meta").cumsum(1).shape, "torch._prims" in sys.modules)
"""


def test_an_engine_wants_none_of_torch_s() -> None:
    """Also not of a model that is quantized as it is loaded, which operations on meta tensors would be refused to, or bring
    torch._dynamo. And what does want them finds them."""
    done = subprocess.run([sys.executable, "-c", _ENGINE], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[-2] == "8 7 [] [2.0, 2.0, 2.0] torch.Size([2, 3]) True"
