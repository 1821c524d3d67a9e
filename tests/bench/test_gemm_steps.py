"""Steps in the time of products, row by row: what is found, and what tiles explain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import gemm_steps
from bench.families.gemm_bf16 import WEIGHTS
from fastattn import _runtime


def test_a_step_is_explained_by_tiles_that_grow_as_much() -> None:
    times = {1: 10.0, 2: 10.9, 3: 13.0, 4: 20.0, 5: 30.0}
    work = {1: 100, 2: 100, 3: 100, 4: 200, 5: 210}
    found = gemm_steps.steps(times, work)
    assert [(step["m"], step["explained"]) for step in found] == [([2, 3], False), ([3, 4], True), ([4, 5], False)]
    assert found[0]["ratio"] == 1.193 and found[1]["tiles"] == 2.0


@pytest.mark.parametrize(("n", "k"), WEIGHTS)
def test_tiles_have_all_of_the_product(n: int, k: int) -> None:
    """On all SMs together at least the rows and columns that there are, and of few rows not more than one wave's."""
    for m in gemm_steps.ROWS:
        config = _runtime.gemm_sm90_config(m, n, k, 132)
        work = gemm_steps.tile_work(config, 132)
        places = 132 * config["ctas_per_sm"]
        assert work * places * 1.02 >= m * n, (m, config)
        assert work * places <= 6 * max(m, 64) * n, (m, config)


def test_a_run_writes_times_and_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gemm_steps.json"
    gemm_steps.run([(48, 64)], torch.device("cpu"), out, rows=range(1, 20))
    saved = json.loads(out.read_text())["weights"]["n48_k64"]
    assert list(map(int, saved["us"])) == list(range(1, 20)) and all(us > 0 for us in saved["us"].values())
    assert capsys.readouterr().out.startswith(f"n48_k64: {len(saved['steps'])} steps above 1.1, ")
