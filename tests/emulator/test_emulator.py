"""The kernels' own CUDA sources, compiled for the CPU and run on drawn calls; and broken ones, which must be found out.

What the emulator is, and what it cannot see, is in device.h. By hand, after a run of this file with --basetemp=DIR:
`DIR/*/flash_fwd_sm90 0 1000`, with the seeds of the calls; a failing call is printed whole, and its seed runs it again.
"""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.emulator.mistakes import MISTAKES, Mistake
from tests.emulator.programs import CSRC, CXX, HERE, INCLUDE, KERNELS, NUM_CPUS, Build, run, sources

NUM_CALLS = int(os.environ.get("FASTATTN_EMULATOR_CALLS", "64"))  # of each kernel

# Beside the first ones: many rows with one key, whose LSE is a score as wgmma adds it up, which 2e-4 did not allow.
FURTHER_CALLS = {"flash_fwd_sm90": 144}
# And as many of sizes that are not among them, or seldom: of products gates in 8 bits, of attention copies of eight rows.
FURTHER_SIZES = {"gemm_sm90": ("4",), "flash_fwd_sm90": ("8",)}

pytestmark = [
    pytest.mark.timeout(1800),  # compiling counts, and waiting for another worker's
    pytest.mark.long,
    pytest.mark.skipif(CXX is None, reason="no g++"),
    pytest.mark.skipif(INCLUDE is None, reason="no CUDA headers: nvcc is neither on the PATH nor in CUDA_HOME"),
]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulator"
    folder.mkdir(exist_ok=True)
    return Build(folder)


@pytest.mark.parametrize("kernel", KERNELS)
def test_drawn_calls(build: Build, kernel: str) -> None:
    program = build.program(kernel, build.objects(sources(kernel)))
    parts = 4 * NUM_CPUS
    edges = [NUM_CALLS * part // parts for part in range(parts + 1)]
    with ThreadPoolExecutor(NUM_CPUS) as pool:
        sizes = ("0", *FURTHER_SIZES.get(kernel, ()))
        calls = [(edges[part], edges[part + 1], size) for size in sizes for part in range(parts)]
        reports = list(pool.map(lambda call: run(program, *call), calls))
    if kernel in FURTHER_CALLS:
        reports.append(run(program, FURTHER_CALLS[kernel], FURTHER_CALLS[kernel] + 1))
    assert not any(reports), "\n".join(filter(None, reports))


def test_what_is_chosen_for_a_product_can_be_launched(build: Build) -> None:
    program = build.program("gemm_choices", build.objects([HERE / "gemm_choices.cpp", HERE / "runtime.cpp"]))
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name.replace(" ", "-"))
def test_a_mistake_is_found(build: Build, tmp_path: Path, mistake: Mistake) -> None:
    kernel = mistake.header.kernel
    text = (CSRC / mistake.header.path).read_text()
    assert text.count(mistake.before) == 1
    header = tmp_path / mistake.header.path
    header.parent.mkdir()
    header.write_text(text.replace(mistake.before, mistake.after))
    unit = next(source for source in sources(kernel) if source.name == mistake.unit)
    objects = build.objects([unit], tmp_path)
    objects += build.objects(source for source in sources(kernel) if source != unit)
    program = Build(tmp_path).program(kernel, objects)
    ranges = [(mistake.call, mistake.call + 1), (0, 300)]
    assert any(mistake.finds in run(program, first, last, mistake.size) for first, last in ranges)
