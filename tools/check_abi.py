#!/usr/bin/env python3
"""Fails if a built library needs anything of torch but its stable C interface: check_abi.py fastattn/_C.so.

One binary serves every torch from 2.11 on only while it imports nothing of torch's C++ (`at::`, `c10::`, `torch::`),
whose symbols change from release to release. Of torch's libraries it may need libtorch_cpu.so alone, which exports that interface.
"""

from __future__ import annotations

import subprocess
import sys

_STABLE_PREFIXES = ("aoti_torch_", "torch_")


def leaks(symbols: str, dependencies: str) -> list[str]:
    """From `nm -D --undefined-only` and `readelf -d`: what ties the library to one version of torch."""
    found = []
    for line in symbols.splitlines():
        name = line.split()[-1].split("@")[0] if line.split() else ""
        if any(part in name for part in ("2at", "3c10", "5torch")) and name.startswith("_Z"):
            found.append(f"unstable symbol {name}")
        elif "torch" in name.lower() and not name.startswith("_Z") and not name.startswith(_STABLE_PREFIXES):
            found.append(f"unknown torch symbol {name}")
    for line in dependencies.splitlines():
        if "NEEDED" in line and ("torch" in line or "c10" in line) and "[libtorch_cpu.so]" not in line:
            found.append(f"depends on {line.split('[')[-1].rstrip(']')}")
        if "RPATH" in line or "RUNPATH" in line:
            found.append(f"has a search path: {line.strip()}")
    return found


def main() -> int:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    library = sys.argv[1]

    def output(*command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    symbols = output("nm", "-D", "--undefined-only", library)
    found = leaks(symbols, output("readelf", "-d", library))
    for line in found:
        print(line)
    stable = sum(line.split()[-1].startswith(_STABLE_PREFIXES) for line in symbols.splitlines())
    print(f"{library}: {stable} symbols of torch's stable interface, {len(found)} leaks")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
