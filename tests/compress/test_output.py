"""A model folder is whole or not there, whatever happens while it is written, and what was done is not done again."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastattn.compress import CalibrationOptions, QuantizeOptions, quantize, read_receipt
from fastattn.compress.output import OutputFolder
from tests.engine.tiny import TinySource

ROOT = Path(__file__).resolve().parents[2]


def contents(folder: Path) -> dict[str, Any]:
    """Every file, but what a receipt says of the time, and the order of a header's keys, which safetensors leaves to chance."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    receipt = json.loads(found["receipt.json"])
    found["receipt.json"] = {k: v for k, v in receipt.items() if k not in ("created", "seconds")}
    for name, data in found.items():
        if name.endswith(".safetensors"):
            end = 8 + int.from_bytes(data[:8], "little")
            found[name] = json.loads(data[8:end]), data[end:]
    return found


class Killed(BaseException):
    """As kill -9: no handler of ours takes it, and nothing is tidied up."""


def dying(monkeypatch: pytest.MonkeyPatch, after: int) -> Callable[[], int]:
    """Every call that changes the disk counts; the ``after``-th does not happen, and neither does anything later."""
    count = 0

    def wrap(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count >= after:
                raise Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((Path, "rename"), (Path, "mkdir"), (Path, "unlink"), (os, "fsync"), (shutil, "rmtree")):
        wrap(owner, name)
    return lambda: count


def killed_at(point: int, call: Callable[[], object]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        dying(patch, point)
        with pytest.raises(Killed):
            call()


@pytest.fixture
def run(source: TinySource, calibration: CalibrationOptions) -> Callable[..., Path]:
    options = QuantizeOptions(scheme="nvfp4", calibration=calibration)
    return lambda out, force=False: quantize(source, out, options, force=force)


def points(run: Callable[..., Path], folder: Path, force: bool) -> Iterator[int]:
    """Each call of a whole run at which it can be killed."""
    with pytest.MonkeyPatch.context() as patch:
        counted = dying(patch, 10**9)
        run(folder, force=force)
        total = counted()
    assert total > 20
    yield from range(1, total + 1)


def test_killed_anywhere_it_goes_on_to_the_same_folder(run: Callable[..., Path], tmp_path: Path) -> None:
    expected = contents(run(tmp_path / "expected"))
    for point in points(run, tmp_path / "count", False):
        out = tmp_path / f"out{point}"
        killed_at(point, lambda out=out: run(out))
        if out.exists():  # the last rename was done: what is missing is tidying up
            left = contents(out)
            assert {name: left[name] for name in expected} == expected
            assert set(left) - set(expected) <= {"job.json", "lock"}
        else:
            assert contents(run(out)) == expected, point
            assert not out.with_name(out.name + ".partial").exists()


def test_killed_anywhere_the_old_folder_or_the_new_one_is_there(
    run: Callable[..., Path], source: TinySource, tmp_path: Path
) -> None:
    expected = contents(run(tmp_path / "expected"))
    old = quantize(source, tmp_path / "old", QuantizeOptions(scheme="none"))
    before = contents(old)
    shutil.copytree(old, tmp_path / "count")
    for point in points(run, tmp_path / "count", True):
        out = tmp_path / f"out{point}"
        shutil.copytree(old, out)
        killed_at(point, lambda out=out: run(out, force=True))
        if out.exists():
            found = contents(out)
            assert found == before or {name: found.get(name) for name in expected} == expected, point
        assert contents(run(out, force=True)) == expected, point
        left = sorted(path.name for path in tmp_path.iterdir() if out.name in path.name)
        assert left == [out.name], point


def test_files_that_a_kill_cut_short_do_not_stay(run: Callable[..., Path], tmp_path: Path) -> None:
    """safetensors writes under a name of its own first, which kill -9 leaves behind."""
    expected = contents(run(tmp_path / "expected"))
    killed_at(12, lambda: run(tmp_path / "out"))
    for name in (".tmpA1b2C3", "checkpoint.safetensors.tmp"):
        (tmp_path / "out.partial" / name).write_bytes(b"half")
    assert contents(run(tmp_path / "out")) == expected


def test_what_was_written_is_not_computed_again(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastattn.compress.quantize import Quantizer

    real, layers = Quantizer.rewrite, []

    def rewrite(self: Quantizer, weights: Any, products: Any, inputs: Any) -> Any:
        layers.append(products[0].names[0])
        if len(layers) == 2:
            raise Killed
        return real(self, weights, products, inputs)

    monkeypatch.setattr(Quantizer, "rewrite", rewrite)
    with pytest.raises(Killed):
        run(tmp_path / "out")
    run(tmp_path / "out")
    assert [name.split(".")[2] for name in layers] == ["0", "1", "1"]


def test_another_job_starts_over(source: TinySource, calibration: CalibrationOptions, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wanted = QuantizeOptions(scheme="mxfp4", calibration=calibration)
    expected = contents(quantize(source, tmp_path / "expected", wanted))
    killed_at(12, lambda: quantize(source, out, QuantizeOptions(scheme="int4", calibration=calibration)))
    assert (tmp_path / "out.partial").is_dir()
    assert contents(quantize(source, out, wanted)) == expected


def test_a_real_kill(tmp_path: Path) -> None:
    """SIGKILL in the middle of a process's work: the next one goes on."""
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
torch.set_num_threads(1)
from dataclasses import replace
from fastattn.compress import CalibrationOptions, QuantizeOptions, quantize, read_receipt
from fastattn.compress.output import OutputFolder
from tests.engine.tiny import CONFIG, TinySource
real = OutputFolder.write_shard
def write_shard(self, index, tensors, record):
    real(self, index, tensors, record)
    print(index, flush=True)
    if index == 1: sys.stdin.read()
OutputFolder.write_shard = write_shard
quantize(TinySource(config=replace(CONFIG, intermediate_size=64)), {str(tmp_path / "out")!r},
         QuantizeOptions(scheme="nvfp4", calibration=CalibrationOptions(samples=8, length=48)))
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline().strip() for _ in range(2)] == ["0", "1"]
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    assert not (tmp_path / "out").exists()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["2", "3"]
    assert "going on after 2 of 4 shards" in done.stderr
    assert (tmp_path / "out" / "receipt.json").is_file()


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    job = {"command": "test"}
    with OutputFolder(tmp_path / "out", job, 1), pytest.raises(ValueError, match="another process is writing there"):
        OutputFolder(tmp_path / "out", job, 1).__enter__()


def test_a_folder_is_not_replaced_without_force(run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    run(tmp_path / "out")  # an empty one may be used
    with pytest.raises(ValueError, match="is there already; --force replaces it"):
        run(tmp_path / "out")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(ValueError, match="is not a model folder"):
        run(tmp_path / "photos", force=True)
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"


def test_what_lies_in_a_folder_of_that_name_is_not_swept_away(run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="is no job of ours"):
        run(tmp_path / "out")
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "precious"


def test_a_link_stays_and_what_it_leads_to_is_replaced(
    run: Callable[..., Path], source: TinySource, tmp_path: Path
) -> None:
    expected = contents(run(tmp_path / "expected"))
    quantize(source, tmp_path / "disk" / "model", QuantizeOptions(scheme="none"))
    for name in ("model", "new"):  # one leads to a model, the other to nothing yet
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
        run(tmp_path / name, force=True)
        assert (tmp_path / name).is_symlink() and contents(tmp_path / "disk" / name) == expected
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["model", "new"]


def test_the_model_that_is_read_is_not_replaced(source: TinySource, tmp_path: Path) -> None:
    """Compared with its source afterwards it would be compared with itself."""
    plain = quantize(source, tmp_path / "plain", QuantizeOptions(scheme="none"))
    (tmp_path / "link").symlink_to(plain)
    before = contents(plain)
    for out in ("plain", "link"):
        with pytest.raises(ValueError, match="holds the model that is read"):
            quantize(str(plain), tmp_path / out, QuantizeOptions(scheme="mxfp4", rounding="nearest"), force=True)
    assert contents(plain) == before


def test_others_may_read_it(run: Callable[..., Path], tmp_path: Path) -> None:
    """The umask says who, as for every other file; safetensors alone would make files for their owner only."""
    before = os.umask(0o027)
    try:
        out = run(tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}


def test_the_receipt_of_a_resumed_run_claims_no_time(run: Callable[..., Path], tmp_path: Path) -> None:
    assert "seconds" in (read_receipt(run(tmp_path / "whole")) or {})
    killed_at(12, lambda: run(tmp_path / "out"))
    assert "seconds" not in (read_receipt(run(tmp_path / "out")) or {})  # nobody knows how long the first part took


def test_what_safetensors_makes_of_a_full_disk_is_an_os_error(run: Callable[..., Path], tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    expected = contents(run(tmp_path / "expected"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))  # the largest file that may be written
    try:
        with pytest.raises(OSError, match=r"model-00001-of-00004.*File too large"):
            run(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert contents(run(tmp_path / "out")) == expected


def test_a_full_disk_is_an_error_that_loses_nothing(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(run(tmp_path / "expected"))
    real, calls = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert contents(run(tmp_path / "out")) == expected
