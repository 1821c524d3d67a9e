"""Where and with what a report was measured."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.harness import peers

ROOT = Path(__file__).resolve().parents[2]


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False, cwd=ROOT)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def commit() -> str | None:
    """HEAD, with "-dirty" if tracked files are changed; None outside a git checkout."""
    head = _output("git", "rev-parse", "HEAD")
    return head and head + ("-dirty" if _output("git", "status", "--porcelain", "--untracked-files=no") else "")


def processor() -> str:
    """The CPU's name and how many threads torch uses."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next(
            (x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), name
        )
    return f"{name}, {torch.get_num_threads()} threads"


def _without_place(words: list[str]) -> list[str]:
    """Without --out and its folder, which is one machine's and says nothing of how it was measured."""
    at = words.index("--out") if "--out" in words else len(words)
    return words[:at] + words[at + 2 :]


def meta(device: torch.device, method: str) -> dict[str, Any]:
    """The "meta" of a results file."""
    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "cpu": processor(),
        "load_average": round(os.getloadavg()[0], 2)
        if hasattr(os, "getloadavg")
        else None,  # of the minute before the run
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")
        if on_gpu
        else None,
        "peers": peers.versions(),
        "command": shlex.join(["python", "-m", "bench", *_without_place(sys.argv[1:])]),
        "method": method,
    }
