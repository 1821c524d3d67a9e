"""Modules that are imported when somebody wants something of them. Imports no torch."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# What `import torch` brings and an engine has no use for, two fifths of its Python: kernels of meta tensors that are written in
# Python, with the decompositions that they are made of, and what exports models. An operation on a meta tensor that has its kernel there
# does not ask for it and is refused until somebody does: models are built on that device here, and never run.
TORCH_MODULES = ("torch._meta_registrations", "torch.export")
# It wants them without asking for a name.
_ASKS_FOR_ALL = "torch._dynamo"


def _let_generators_be_made() -> None:
    """What `torch._meta_registrations` brings that is for everybody: torch.Generator refuses to be made before it is told its
    metaclass (torch 2.13)."""
    import torch

    tell = getattr(torch._C, "_set_generator_metaclass", None)
    if tell is not None:
        tell(import_module("torch._opaque_base").OpaqueBaseMeta)


# Done in the place of a late module.
_MEANWHILE: dict[str, Callable[[], None]] = {"torch._meta_registrations": _let_generators_be_made}


class LateImports(MetaPathFinder):
    """In front of `sys.meta_path`: the named modules are there when they are imported, and empty until an attribute or a module of
    theirs is asked for, or torch.compile is imported, from then on as they always are. Other than `importlib.util.LazyLoader`'s they
    stay so when a second import looks at their spec."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = set(names)
        self._late: dict[str, _LateLoader] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        was_there = name in sys.modules
        for late, loader in list(self._late.items()):
            if name == _ASKS_FOR_ALL or name.startswith(f"{late}."):
                loader.load(waits=False)  # another thread that executes it may be waiting for this import
        if not was_there and name in sys.modules:
            return _present(sys.modules[name])
        if name not in self._names:
            return None
        self._names.remove(name)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = self._late[name] = _LateLoader(spec.loader)
        return spec

    def install(self) -> None:
        """Once torch is imported it is too late."""
        if "torch" not in sys.modules:
            sys.meta_path.insert(0, self)


class _LateLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._lock = threading.RLock()  # a module may ask for names of itself while it is executed
        self._module: ModuleType | None = None  # until somebody wants it
        self._is_executing = False

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._module = module

        def attribute(name: str) -> Any:
            # The import system looks whether names of its own are there; `from … import *` wants one of them.
            if (name.startswith("__") and name != "__all__") or not self.load():
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            return getattr(module, name)

        module.__getattr__ = attribute  # type: ignore[method-assign]
        if (meanwhile := _MEANWHILE.get(module.__name__)) is not None:
            meanwhile()

    def load(self, waits: bool = True) -> bool:
        """Executes the module if that was not done. Returns whether all of it is there: not for what it imports while it is executed,
        and not while another thread executes it, which this one `waits` for or not."""
        if not self._lock.acquire(waits):
            return False
        try:
            module, self._module = self._module, None
            if module is not None:
                attribute, self._is_executing = vars(module)["__getattr__"], True
                try:
                    self._loader.exec_module(module)
                finally:
                    self._is_executing = False
                    if vars(module)["__getattr__"] is attribute:  # it has none of its own
                        del module.__getattr__
            return not self._is_executing
        finally:
            self._lock.release()


def _present(module: ModuleType) -> ModuleSpec | None:
    """For an import that finds its module there, because what was executed before it imported it: Python would execute it again, as
    another module."""
    spec = module.__spec__
    if spec is not None:
        spec.loader = _Present(module, spec.loader)
    return spec


class _Present(Loader):
    def __init__(self, module: ModuleType, loader: Any) -> None:
        self._module, self._loader = module, loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = self._loader
