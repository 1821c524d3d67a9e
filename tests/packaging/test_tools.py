"""The checks that a build must pass can fail: each is shown what it is there to find, and what it must let through."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import check_abi  # noqa: E402
import check_ptxas  # noqa: E402

CLEAN = """\
ptxas info    : Compiling entry function '_ZN8fastattn4gemmEv' for 'sm_90a'
ptxas info    : Function properties for _ZN8fastattn4gemmEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""
SPILL = CLEAN.replace("0 bytes spill stores, 0 bytes spill loads", "24 bytes spill stores, 40 bytes spill loads")


def test_a_clean_log_has_no_findings() -> None:
    assert check_ptxas.findings(CLEAN) == []


@pytest.mark.parametrize(
    ("log", "says"),
    [
        (SPILL, ("_ZN8fastattn4gemmEv", "sm_90a", "24", "40")),
        (
            "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x",
            ("serialized",),
        ),
        ("ptxas info : (C7508) something else", ("lost speed", "C7508")),
        ("ptxas info : setmaxnreg ignored to maintain minimum register requirement", ("setmaxnreg",)),
    ],
)
def test_what_costs_speed_is_found(log: str, says: tuple[str, ...]) -> None:
    (finding,) = check_ptxas.findings(log)
    assert all(word in finding for word in says)


def test_a_kernel_that_two_objects_compile_is_found() -> None:
    first, second = (
        "[1/9] Building CUDA object a/first.cu.o\n" + CLEAN,
        "[2/9] Building CUDA object a/second.cu.o\n" + CLEAN,
    )
    assert check_ptxas.findings(first + first) == []
    assert check_ptxas.findings(first + second.replace("sm_90a", "sm_80")) == []
    (finding,) = check_ptxas.findings(first + second)
    assert all(
        word in finding for word in ("a/first.cu.o", "a/second.cu.o", "1 kernels", "_ZN8fastattn4gemmEv (sm_90a)")
    )


def test_an_allowed_spill_is_let_through_up_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_ptxas, "SPILLS_ALLOWED", {"gemm": (64, "measured: faster than fewer registers")})
    assert check_ptxas.findings(SPILL) == []
    monkeypatch.setattr(check_ptxas, "SPILLS_ALLOWED", {"gemm": (63, "measured")})
    assert len(check_ptxas.findings(SPILL)) == 1


def test_of_a_kernel_that_was_compiled_again_the_last_time_counts() -> None:
    assert check_ptxas.findings(SPILL + CLEAN) == []
    assert len(check_ptxas.findings(CLEAN + SPILL)) == 1


@pytest.mark.parametrize(("log", "code"), [(CLEAN, 0), (SPILL, 1), ("nvcc ran", 1)])
def test_exit_status_of_check_ptxas(log: str, code: int, tmp_path: Path) -> None:
    path = tmp_path / "build.log"
    path.write_text(log)
    done = subprocess.run([sys.executable, ROOT / "tools/check_ptxas.py", path], capture_output=True, check=False)
    assert done.returncode == code


STABLE = "                 U aoti_torch_empty_strided\n                 U torch_library_impl\n                 U memcpy@GLIBC_2.14\n"
NEEDED = " 0x0000000000000001 (NEEDED)             Shared library: [libtorch_cpu.so]\n"


def test_the_stable_interface_is_no_leak() -> None:
    assert check_abi.leaks(STABLE, NEEDED) == []


@pytest.mark.parametrize(
    ("symbols", "dependencies", "says"),
    [
        ("                 U _ZN2at5emptyEv\n", "", "_ZN2at5emptyEv"),
        ("                 U _ZN3c105ErrorC1Ev\n", "", "_ZN3c105ErrorC1Ev"),
        ("                 U _ZNK5torch8autograd4NodeEv\n", "", "torch8autograd"),
        ("                 U THPTorch_call\n", "", "unknown torch symbol"),
        ("", NEEDED.replace("libtorch_cpu", "libc10"), "libc10.so"),
        ("", NEEDED.replace("libtorch_cpu", "libtorch_python"), "libtorch_python.so"),
        ("", " 0x000000000000001d (RUNPATH)            Library runpath: [/home/me/torch/lib]\n", "search path"),
    ],
)
def test_what_ties_the_library_to_one_torch_is_found(symbols: str, dependencies: str, says: str) -> None:
    (finding,) = check_abi.leaks(STABLE + symbols, NEEDED + dependencies)
    assert says in finding


def test_check_abi_reads_real_libraries() -> None:
    """torch's own Python library uses what ours must not."""
    import torch

    library = Path(torch.__file__).parent / "lib/libtorch_python.so"
    if not library.exists():
        pytest.skip(f"{library} is not there")
    done = subprocess.run(
        [sys.executable, ROOT / "tools/check_abi.py", library], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "unstable symbol" in done.stdout
