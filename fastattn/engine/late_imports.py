"""Modules that are imported when somebody wants something of them. Imports no torch."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# What `import torch` brings and an engine has no use for, two fifths of its Python: kernels of meta tensors that are written in
# Python, with the decompositions that they are made of, and what exports models.
TORCH_MODULES = ("torch._meta_registrations", "torch.export")
# It wants them without asking for a name.
_ASKS_FOR_ALL = "torch._dynamo"


class LateImports(MetaPathFinder):
    """In front of `sys.meta_path`: the named modules are there when they are imported, and empty until an attribute of theirs is
    asked for, or torch.compile is imported, from then on as they always are. Other than `importlib.util.LazyLoader`'s they stay so
    when a second import looks at their spec."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = set(names)
        self._waiting: list[_LateLoader] = []

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == _ASKS_FOR_ALL:
            for loader in self._waiting:
                loader.load()
        if name not in self._names:
            return None
        self._names.remove(name)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _LateLoader(spec.loader)
            self._waiting.append(spec.loader)
        return spec

    def install(self) -> None:
        """Once torch is imported it is too late."""
        if "torch" not in sys.modules:
            sys.meta_path.insert(0, self)


class _LateLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._lock = threading.RLock()  # a module may ask for names of itself while it is executed
        self._module: ModuleType | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._module = module

        def attribute(name: str) -> Any:
            if name.startswith("__"):  # those of the import system, which asks whether they are there
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            self.load()
            return getattr(module, name)

        module.__getattr__ = attribute  # type: ignore[method-assign]

    def load(self) -> None:
        with self._lock:
            module, self._module = self._module, None
            if module is not None:
                del module.__getattr__
                self._loader.exec_module(module)
