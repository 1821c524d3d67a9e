"""Every operator on every case, with gaps between the rows, for NVIDIA's compute-sanitizer:

    compute-sanitizer --tool memcheck --kernel-regex kns=fastattn --error-exitcode 9 python -m tests.harness.sanitize
    compute-sanitizer --tool racecheck --kernel-regex kns=fastattn --error-exitcode 9 python -m tests.harness.sanitize

The filter keeps torch's own kernels out: they fill the inputs, and are not what is examined. Arguments choose operators.
`decode_layers` is examined where it is named, by memcheck: racecheck cannot see that lanes of a warp have waited for each
other (docs/design/decode_layers.md).
"""

from __future__ import annotations

import sys

import torch

from fastattn import ops
from tests.harness.decode_layers import few_calls
from tests.harness.generators import Gen
from tests.harness.opspec import fresh, with_gaps
from tests.harness.specs import SPECS


def decode_layers() -> int:
    """As they are: tensors of this operator are contiguous."""
    count, device = 0, torch.device("cuda")
    for dtype in (torch.bfloat16, torch.float16):
        for call in few_calls(device, dtype):
            call.run(ops.decode_layers_workspace(*call.sizes, device))
            count += 1
    return count


def main(names: list[str]) -> int:
    known = [*(spec.name for spec in SPECS), "decode_layers"]
    if unknown := sorted(set(names) - set(known)):
        raise SystemExit(f"unknown operator {unknown[0]!r}, known are {', '.join(known)}")
    count = decode_layers() if "decode_layers" in names else 0
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
