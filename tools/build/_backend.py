"""The PEP 517 backend: setuptools, which also asks for torch when the CUDA library is to be built and torch is not there.

A plain requirement on torch would download gigabytes into every isolated build, to compile a library that needs only
torch's headers, and would do so even where no CUDA is.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

sys.path.insert(0, str(Path(__file__).parent))
from cuda_choice import cuda_wanted, torch_include_dir


def get_requires_for_build_wheel(config_settings: dict[str, str] | None = None) -> list[str]:
    requires = build_meta.get_requires_for_build_wheel(config_settings)
    return [*requires, "torch>=2.11"] if cuda_wanted() and torch_include_dir() is None else requires


def get_requires_for_build_editable(config_settings: dict[str, str] | None = None) -> list[str]:
    return get_requires_for_build_wheel(config_settings)
