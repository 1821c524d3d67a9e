"""Drawn cases of the GPU tests, other ones each time, on all cores for so many seconds; and runs that must be bitwise equal:

    python -m tests.harness.soak grids 80      flash-attn's own grids (tests/integrations/test_flash_attn_api.py)
    python -m tests.harness.soak pages 60      drawn calls over pages (tests/gpu/test_paged_attention.py)
    python -m tests.harness.soak repeats 1000  so many runs of each form in tests/harness/repeats.py

Exit status 1 if a case failed or a run differed.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.harness.generators import Gen
from tests.harness.repeats import all_forms, differing_runs

NUM_PROCESSES = 12
Job = Callable[[], None]


def grids(seed: int) -> Iterator[tuple[str, Job]]:
    """A case of each family in turns, none twice."""
    from tests.integrations import test_flash_attn_api
    from tests.integrations.cases import FAMILIES, label, whole

    rng = random.Random(seed)
    assert test_flash_attn_api.FAMILIES is FAMILIES  # filled by the import
    left = {name: list(whole(name)) for name in FAMILIES}
    for cases in left.values():
        rng.shuffle(cases)
    while any(left.values()):
        for name, cases in left.items():
            if cases:
                case = cases.pop()
                yield f"{name} {label(case)}", lambda name=name, case=case: FAMILIES[name][1](case, "cuda")


def pages(seed: int) -> Iterator[tuple[str, Job]]:
    from tests.gpu import test_paged_attention

    while True:
        for family in test_paged_attention.FAMILIES:
            seed += 1
            yield family.__name__, lambda family=family, seed=seed: test_paged_attention.run_drawn(family, seed)


def work(jobs: Callable[[int], Iterator[tuple[str, Job]]], seed: int, seconds: float, results: Any) -> None:
    torch.cuda.set_per_process_memory_fraction(1 / (NUM_PROCESSES + 2))
    end, total, failed = time.time() + seconds, 0, []
    for name, job in jobs(seed):
        if time.time() > end:
            break
        try:
            job()
        except torch.OutOfMemoryError:  # of this process' share: a case that is too large for it
            torch.cuda.empty_cache()
            continue
        except Exception as error:
            failed.append(f"{name}: {error}"[:400])
        total += 1
    results.put((total, failed))


def on_all_cores(jobs: Callable[[int], Iterator[tuple[str, Job]]], seconds: float) -> int:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    seeds = [int.from_bytes(os.urandom(4), "little") for _ in range(NUM_PROCESSES)]
    processes = [context.Process(target=work, args=(jobs, seed, seconds, results)) for seed in seeds]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    failed = [line for _, lines in found for line in lines]
    print(f"{sum(total for total, _ in found)} cases, {len(failed)} failed", *failed[:20], sep="\n")
    return 1 if failed else 0


def repeats(count: float) -> int:
    hopper = torch.cuda.get_device_capability() == (9, 0)
    worst = 0
    for name, form in all_forms(Gen("cuda"), ("sm80", "sm90") if hopper else ("sm80",)).items():
        differ = differing_runs(form, int(count))
        print(f"{name}: {differ} of {int(count)} runs differ")
        worst = max(worst, differ)
    return 1 if worst else 0


def main(arguments: list[str]) -> int:
    parts: dict[str, Callable[[float], int]] = {
        "grids": lambda seconds: on_all_cores(grids, seconds),
        "pages": lambda seconds: on_all_cores(pages, seconds),
        "repeats": repeats,
    }
    if len(arguments) != 2 or arguments[0] not in parts:
        raise SystemExit(__doc__)
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    return parts[arguments[0]](float(arguments[1]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
