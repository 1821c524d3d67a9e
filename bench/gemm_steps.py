"""Where one more row of x costs `linear` more than a tenth: `python -m bench.gemm_steps [N K]...`, on a Hopper GPU.

Times every M from 1 to 512, rows 64 and more by eights and one behind each, and says of each step of more than 10 % what the choice of
tiles did there. A step is explained where the tiles' own rows and columns, padding and waves included, grew as much. Writes
bench/results/gemm_steps.json, weight by weight; exit code 1 if a step is not explained.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench.families.gemm_bf16 import WEIGHTS
from bench.harness import environment
from bench.harness.timing import GraphTimer, Timer, Timing, WallTimer
from fastattn import _runtime, ops

RESULTS = Path(__file__).parent / "results" / "gemm_steps.json"
ROWS = (*range(1, 64), *(m for first in range(64, 512, 8) for m in (first, first + 1)), 512)
LARGEST_STEP = 1.10
_AT_ONCE = 16  # calls that take turns


def tile_work(config: Mapping[str, int], num_sms: int) -> int:
    """Rows × columns that the SMs' tiles take, one wave behind the other; with many rows a pair of CTAs has two tiles of rows."""
    of_cta = config["block_m"] * config["weight_rows"]
    places = num_sms * config["ctas_per_sm"]
    if config["few_rows"]:
        return -(-config["num_ctas"] // places) * of_cta // config["num_splits"]
    tiles = 2 * config["m_tiles"] * config["n_tiles"]
    return of_cta * tiles // places if config["stream_k"] else of_cta * -(-tiles // places)


def steps(times: Mapping[int, float], work: Mapping[int, int]) -> list[dict[str, Any]]:
    """Of times and tiles by M, the steps from one to the next of more than `LARGEST_STEP`, and whether the tiles grew so, too."""
    found = []
    for before, after in pairwise(sorted(times)):
        ratio, grown = times[after] / times[before], work[after] / work[before]
        if ratio > LARGEST_STEP:
            step = {"m": [before, after], "us": [times[before], times[after]], "ratio": round(ratio, 3)}
            found.append(step | {"tiles": round(grown, 3), "explained": ratio <= LARGEST_STEP * grown and grown > 1})
    return found


def measure(n: int, k: int, device: torch.device, timer: Timer, rows: Sequence[int] = ROWS) -> dict[int, float]:
    """µs of `linear` by M; neighbours take turns, so that a step is not one of clocks."""
    rng = torch.Generator(device).manual_seed(0)
    x = torch.randn(max(rows), k, generator=rng, device=device, dtype=torch.bfloat16)
    weight = torch.randn(n, k, generator=rng, device=device, dtype=torch.bfloat16) * k**-0.5
    times: dict[int, float] = {}
    for start in range(0, len(rows), _AT_ONCE):
        timed = timer.measure({str(m): (lambda m=m: ops.linear(x[:m], weight)) for m in rows[start : start + _AT_ONCE]})
        for name, timing in timed.items():
            if not isinstance(timing, Timing):
                raise timing
            times[int(name)] = round(timing.us, 2)
    return times


def run(weights: Sequence[tuple[int, int]], device: torch.device, out: Path, rows: Sequence[int] = ROWS) -> bool:
    """Writes after each weight; True if every step is explained."""
    on_gpu = device.type == "cuda"
    timer: Timer = GraphTimer(device, rounds=2, budget_us=8_000.0) if on_gpu else WallTimer(rounds=3)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 132
    found: dict[str, Any] = {"meta": environment.meta(device, timer.method), "weights": {}}
    for n, k in weights:
        times = measure(n, k, device, timer, rows)
        work = {m: tile_work(_runtime.gemm_sm90_config(m, n, k, num_sms), num_sms) for m in rows}
        here = steps(times, work)
        found["weights"][f"n{n}_k{k}"] = {"us": times, "steps": here}
        out.write_text(json.dumps(found, indent=1) + "\n")
        print(
            f"n{n}_k{k}: {len(here)} steps above {LARGEST_STEP}, {sum(not s['explained'] for s in here)} not explained"
        )
        for step in here:
            print(f"  {step}")
    return all(step["explained"] for weight in found["weights"].values() for step in weight["steps"])


if __name__ == "__main__":
    sizes = [int(text) for text in sys.argv[1:]]
    if len(sizes) % 2 or not torch.cuda.is_available():
        sys.exit("usage: python -m bench.gemm_steps [N K]..., with a GPU")
    chosen = list(zip(sizes[::2], sizes[1::2], strict=True)) or list(WEIGHTS)
    sys.exit(0 if run(chosen, torch.device("cuda"), RESULTS) else 1)
