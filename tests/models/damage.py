"""Damages a model's files in a process of its own, where a signal or a gigabyte too much would be seen.

``python -m tests.models.damage MODEL FILE HEADER_BYTES CUTS FLIPS``: MODEL is opened, its tokenizer built and its weights loaded
once for every cut and every flipped bit of FILE (MODEL itself, or a file in that folder). Prints {"read", "refused", "others": errors
that are not ours, "growth_mib": of the memory in use} as JSON.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import warnings
from pathlib import Path

import torch

from fastattn.models.loader import open_model
from fastattn.models.registry import load_model

_LIMIT = 3 << 30  # address space beyond what the process has at the start: reserving more fails, even untouched


def damaged(whole: bytes, header: int, case: int, cuts: int, rng: random.Random) -> tuple[str, bytes]:
    if case < cuts:
        size = rng.randrange(header if case % 2 else len(whole))
        return f"cut to {size} bytes", whole[:size]
    bit = rng.randrange(8 * (header if case % 2 else len(whole)))
    data = bytearray(whole)
    data[bit // 8] ^= 1 << bit % 8
    return f"bit {bit % 8} of byte {bit // 8} flipped", bytes(data)


def load(model: Path) -> None:
    source = open_model(model)
    source.tokenizer().encode("hello")
    load_model(source, torch.device("cpu"), torch.float32, 32)


def main(model: Path, file: Path, header: int, cuts: int, flips: int) -> dict[str, object]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of scales that are no numbers any more
    load(model)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    whole, rng = file.read_bytes(), random.Random(2)
    read, refused, others = 0, 0, []
    for case in range(cuts + flips):
        what, data = damaged(whole, header, case, cuts, rng)
        file.unlink()  # an earlier case may still have the old one mapped
        file.write_bytes(data)
        try:
            load(model)
            read += 1
        except ValueError as error:  # ModelFileError is one
            refused += 1
            if "\n" in str(error) or not str(error):
                others.append(f"{what}: {error!r} is not one line")
        except BaseException as error:  # a Rust panic is no Exception
            others.append(f"{what}: {error!r}")
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    return {"read": read, "refused": refused, "others": others, "growth_mib": growth}


if __name__ == "__main__":
    report = main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
    sys.stdout.write(json.dumps(report))
    sys.stdout.flush()
    os._exit(0)
