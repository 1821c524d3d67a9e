#!/usr/bin/env python3
"""Fails a build whose log shows speed that was lost silently: check_ptxas.py LOG.

Looks, in what nvcc and ptxas printed with `-Xptxas -v`, for wgmma instructions that were serialized, a `setmaxnreg` that was
ignored, and kernels that spill registers to memory. A spill that is known and meant stands in SPILLS_ALLOWED with its reason.
And for time that the build lost: kernels that several objects compile, of which the linker keeps one.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path

# Part of a kernel's demangled or mangled name → (most bytes it may spill, why).
SPILLS_ALLOWED: dict[str, tuple[int, str]] = {
    "flash_fwd_sm90_kernelI13__nv_bfloat16Li64": (
        300,
        "between tiles and in rare branches; with extras one load in the loop",
    ),
    "flash_fwd_sm90_kernelI6__halfLi64": (300, "the same"),
    "flash_fwd_sm90_kernelI13__nv_bfloat16Li80ELi80ELi3": (140, "the same: three groups leave 160 registers"),
    "flash_fwd_sm90_kernelI6__halfLi80ELi80ELi3": (140, "the same"),
    "flash_fwd_sm90_kernelI13__nv_bfloat16Li96ELi96ELi3": (80, "the same"),
    "flash_fwd_sm90_kernelI6__halfLi96ELi96ELi3": (80, "the same"),
    "flash_fwd_sm90_kernelI13__nv_fp8_e4m3Li96ELi96ELi3": (32, "four values of who turns V, once a block"),
    "flash_fwd_sm90_kernelI13__nv_fp8_e4m3Li128": (
        48,
        "with extras, outside the loop of the groups that compute",
    ),
    "flash_bwd_sm90_kernel": (400, "the producer, which has 24 registers and time, and five loads in the loop"),
    "flash_sm80_kernel": (80, "a few values that do not change in the loop"),
    "paged_decode_kernelI13__nv_bfloat16S1_Li256": (48, "the same, on sm_80"),
    "paged_decode_kernelI6__halfS1_Li256": (48, "the same"),
    "paged_decode_kernelIt13__nv_fp8_e4m3Li256": (
        450,
        "Q and O take 192 registers: loads and a few values of the sequence",
    ),
    "paged_decode_kernelItaLi256": (450, "the same"),
    "paged_decode_cluster_kernelIt13__nv_fp8_e4m3Li256": (352, "the same"),
    "paged_decode_cluster_kernelItaLi256": (280, "the same"),
    "Li64ENS_7PagedKvIS1_EENS_8TreeMaskEEEvNS_15FlashSm80Params": (
        200,
        "a path has three values where a range has two; calls without trees have instances of their own",
    ),
    "Li256ENS_8TreeMaskELb0ELb0EEEvNS_17PagedDecodeParams": (490, "the same"),
    "Li256ENS_8TreeMaskELb0ELb1EEEvNS_17PagedDecodeParams": (600, "batch-invariant: where splits are"),
    "Li256ENS_13AttentionMaskELb0ELb1EEEvNS_17PagedDecodeParams": (560, "the same"),
    "decode_layers_kernelI13__nv_bfloat16Li128ELi4": (
        340,
        "K and V on their way, looks and sums of four tokens, beside what lives from layer to layer",
    ),
    "decode_layers_kernelI6__halfLi128ELi4": (264, "the same"),
    "decode_layers_kernelI13__nv_bfloat16Li64ELi4": (136, "the same"),
    "decode_layers_kernelI6__halfLi64ELi4": (136, "the same"),
    "rope_kv_write_kernel": (32, "on sm_80, around the division by a scale"),
    "quantize_rows_in_turns_kernel": (36, "the same, and where the next row lies"),
    "quantize_rows_kernel": (16, "one value, where gated rows take 32 registers"),
    "Li64ELi128ELi2EEEvNS_14GemmSm90W4ArgsE": (8, "one value, where two CTAs share an SM"),
}

_WARNINGS = (
    (re.compile(r"wgmma.*serializ", re.IGNORECASE), "wgmma is serialized"),
    (re.compile(r"C75(08|10|11|15)"), "ptxas warns of lost speed"),
    (re.compile(r"setmaxnreg.*ignored", re.IGNORECASE), "setmaxnreg is ignored"),
)
_FUNCTION = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'|Function properties for (\S+)")
_OBJECT = re.compile(r"Building CUDA object (\S+)")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def findings(log: str) -> list[str]:
    """One line for each thing that must not be; of the spills of a kernel that was compiled several times the last ones count."""
    found = []
    spills: dict[tuple[str, ...], tuple[int, int]] = {}
    objects: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    kernel, arch, function, built = "?", "?", "?", "?"
    for line in log.splitlines():
        for pattern, meaning in _WARNINGS:
            if pattern.search(line):
                found.append(f"{meaning}: {line.strip()}")
                break
        if match := _OBJECT.search(line):
            built = match[1]
        if match := _FUNCTION.search(line):
            if match[1]:
                kernel, arch, function = match[1], match[2], match[1]
                objects[kernel, arch].add(built)
            else:
                function = match[3]
        if match := _SPILLS.search(line):
            spills[kernel, arch, function] = int(match[2]), int(match[3])
    for (_, arch, function), (out, back) in spills.items():
        allowed = max((limit for part, (limit, _) in SPILLS_ALLOWED.items() if part in function), default=0)
        if out + back > allowed:
            found.append(f"{function} ({arch}) spills {out} bytes out and {back} in, allowed are {allowed}")
    shared: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for (name, arch), names in objects.items():
        if len(names) > 1:
            shared[tuple(sorted(names))].append(f"{name} ({arch})")
    for names, kernels in shared.items():
        found.append(f"{' and '.join(names)} all compile {len(kernels)} kernels, one is {kernels[0]}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    log = parser.parse_args().log.read_text(errors="replace")
    found = findings(log)
    for line in found:
        print(line)
    kernels = len(set(re.findall("Compiling entry function .*", log)))
    print(f"ptxas: {kernels} kernels, {len(found)} findings")
    if kernels == 0:
        print("the log holds no kernel: was it made with -Xptxas -v?")
    return 1 if found or kernels == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
