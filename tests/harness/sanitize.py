"""Every operator on every case, with gaps between the rows, for NVIDIA's compute-sanitizer:

    compute-sanitizer --tool memcheck --kernel-regex kns=fastattn --error-exitcode 9 python -m tests.harness.sanitize
    compute-sanitizer --tool racecheck --kernel-regex kns=fastattn --error-exitcode 9 python -m tests.harness.sanitize

The filter keeps torch's own kernels out: they fill the inputs, and are not what is examined. Arguments choose operators.
"""

from __future__ import annotations

import sys

import torch

from tests.harness.generators import Gen
from tests.harness.opspec import fresh, with_gaps
from tests.harness.specs import SPECS


def main(names: list[str]) -> int:
    known = [spec.name for spec in SPECS]
    if unknown := sorted(set(names) - set(known)):
        raise SystemExit(f"unknown operator {unknown[0]!r}, known are {', '.join(known)}")
    count = 0
    for spec in SPECS:
        if names and spec.name not in names:
            continue
        for dtype in spec.cuda_dtypes:
            for _, call in spec.calls(Gen("cuda", seed=1), dtype):
                spec.run(with_gaps(call))
                spec.run(fresh(call))
                count += 2
    torch.cuda.synchronize()
    return count


if __name__ == "__main__":
    print(f"{main(sys.argv[1:])} calls")
