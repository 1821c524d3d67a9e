"""`import flash_attn` gives fastattn, in this process, for code that cannot be changed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, TracebackType
from typing import Any

# What a module gets, and out of which of ours.
_MODULES: dict[str, dict[str, str | None]] = {
    "flash_attn": {
        "flash_attn": "flash_attn",
        "flash_attn.flash_attn_interface": "flash_attn",
        "flash_attn.bert_padding": "bert_padding",
        "flash_attn.layers": None,
        "flash_attn.layers.rotary": "rotary",
    },
    "flash_attn_interface": {"flash_attn_interface": "fa3"},
}
_VERSIONS = {"flash_attn": "2.8.3", "flash_attn_interface": "3.0.0"}
_MARK = "_fastattn_replaced"  # on the modules that are ours: what was under these names before


class _Loader:
    """For `importlib`: these modules exist already."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return sys.modules.get(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        return None


class Installed:
    """What `install` gives: as a context manager it uninstalls at the end of the block."""

    def __init__(self, name: str) -> None:
        """name: of the package."""
        self.name = name

    def uninstall(self) -> None:
        uninstall(self.name)

    def __enter__(self) -> Installed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.uninstall()


def install(name: str = "flash_attn", *, force: bool = False) -> Installed:
    """Let `import flash_attn` find fastattn's functions: in this process, from now on, for what is imported after.

    name: "flash_attn", with flash_attn_interface, bert_padding and layers.rotary in it; or "flash_attn_interface",
      FlashAttention-3's.
    force: also where the real package is installed or imported. Who has imported from it already keeps what they have.

    `__version__` is "2.8.3+fastattn..." ("3.0.0+fastattn..."). What looks at a distribution's metadata instead, as
    transformers' `is_flash_attn_2_available`, still says no: no distribution is faked.

    Returns an object with `uninstall()`, and a context manager that calls it.
    """
    if name not in _MODULES:
        raise ValueError(f"compat.install: name is {name!r}, expected one of {', '.join(map(repr, _MODULES))}")
    present = sys.modules.get(name)
    if hasattr(present, _MARK):
        return Installed(name)
    if not force and (present is not None or importlib.util.find_spec(name) is not None):
        raise RuntimeError(
            f"compat.install: {name} is {'imported' if present is not None else 'installed'}, expected that it is not; "
            "force=True puts fastattn in its place for this process"
        )
    replaced = {key: sys.modules.pop(key) for key in list(sys.modules) if key == name or key.startswith(f"{name}.")}
    for key, source in _MODULES[name].items():
        module = _make(key, source, f"{_VERSIONS[name]}+fastattn.{_our_version()}")
        sys.modules[key] = module
        parent, _, child = key.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    setattr(sys.modules[name], _MARK, replaced)
    return Installed(name)


def uninstall(name: str = "flash_attn") -> None:
    """Undo `install`: what was imported under the name before is there again."""
    module = sys.modules.get(name)
    if not hasattr(module, _MARK):
        return
    replaced: dict[str, ModuleType] = getattr(module, _MARK)
    for key in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
        del sys.modules[key]
    sys.modules.update(replaced)


def _our_version() -> str:
    return str(importlib.import_module("fastattn").__version__)


def _make(name: str, source: str | None, version: str) -> ModuleType:
    module: Any = ModuleType(name)
    is_package = any(other.startswith(f"{name}.") for other in _MODULES.get(name.partition(".")[0], {}))
    module.__spec__ = ModuleSpec(name, _Loader(), origin="fastattn", is_package=is_package)  # type: ignore[arg-type]
    module.__loader__ = module.__spec__.loader
    module.__package__ = name if is_package else name.rpartition(".")[0]
    module.__version__ = version
    if is_package:
        module.__path__ = []
    if source is not None:
        ours = importlib.import_module(f"fastattn.integrations.{source}")
        module.__doc__ = ours.__doc__
        public = {key: value for key, value in vars(ours).items() if getattr(value, "__module__", "") == ours.__name__}
        module.__dict__.update({key: value for key, value in public.items() if not key.startswith("_")})
    return module
