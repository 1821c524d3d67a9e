"""What the machine itself reaches, measured with the timer of the cases, in the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from bench.harness.timing import Timer, Timing

Ceilings = dict[str, float | None]


@dataclass(frozen=True)
class Work:
    """What a call must do at least. num_bytes: each input read once, each output written once. num_ops: multiplications and
    additions. rate: which ceiling bounds the operations. items, unit: what a user counts ("tok")."""

    num_bytes: int = 0
    num_ops: int = 0
    rate: str = "bf16_tflop_s"
    items: int = 0
    unit: str = ""

    def floor_us(self, ceilings: Mapping[str, float | None]) -> tuple[float, str]:
        """The least time in µs, and what sets it: "memory", "matrix" or "launch"; (0, "") where nothing is known."""
        floors = [(ceilings.get("launch_us") or 0.0, "launch")]
        if copy := ceilings.get("copy_tb_s"):
            floors.append((self.num_bytes / copy / 1e6, "memory"))
        if ops := ceilings.get(self.rate):
            floors.append((self.num_ops / ops / 1e6, "matrix"))
        us, bound = max(floors)
        return (us, bound) if self.num_bytes or self.num_ops else (0.0, "")

    def achieved(self, us: float, bound: str) -> str:
        """The speed in the unit that says most: "3.91 TB/s", "702 TFLOP/s", "351 tok/s"."""
        if self.items:
            return f"{self.items / us * 1e6:.4g} {self.unit}/s"
        if bound == "matrix":
            return f"{self.num_ops / us / 1e6:.3g} TFLOP/s"
        return f"{self.num_bytes / us / 1e6:.3g} TB/s" if self.num_bytes else ""


def measure_ceilings(timer: Timer, device: torch.device, quick: bool = False) -> Ceilings:
    """copy_tb_s (bytes read + written), bf16/fp8_tflop_s and int8_top_s of 8192³ products by torch, launch_us of the smallest
    kernel that reads and writes memory. On the CPU: copy and fp32 product alone. None: could not be measured."""
    names = ("copy_tb_s", "bf16_tflop_s", "fp8_tflop_s", "int8_top_s")
    if device.type == "cpu":
        n, num_bytes = (512, 32 << 20) if quick else (2048, 256 << 20)
        probes = {"copy_tb_s": _copy(num_bytes, device), "fp32_tflop_s": _product(n, torch.float32, device)}
    else:
        n, num_bytes = 8192, (1 if quick else 2) << 30
        probes = {
            "copy_tb_s": _copy(num_bytes, device),
            "bf16_tflop_s": _product(n, torch.bfloat16, device),
            "fp8_tflop_s": _fp8(n, device),
            "int8_top_s": _int8(n, device),
            "launch_us": _launch(device),
        }
    found: Ceilings = dict.fromkeys(names)
    for name, make in probes.items():  # one at a time: each holds up to 4 GiB
        try:
            call, amount = make()
        except Exception:  # a torch or a GPU without fp8 or int8 products
            found[name] = None
            continue
        result = timer.measure({name: call})[name]
        found[name] = _rate(name, result, amount)
    return found


def _rate(name: str, result: Timing | Exception, amount: float) -> float | None:
    if isinstance(result, Exception) or result.us <= 0:
        return None
    return round(result.us if name == "launch_us" else amount / result.us / 1e6, 4)


Probe = Callable[[], tuple[Callable[[], object], float]]  # → the call, and its bytes or operations


def _copy(num_bytes: int, device: torch.device) -> Probe:
    def make() -> tuple[Callable[[], object], float]:
        source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source), 2.0 * num_bytes

    return make


def _product(n: int, dtype: torch.dtype, device: torch.device) -> Probe:
    def make() -> tuple[Callable[[], object], float]:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        return lambda: F.linear(a, b), 2.0 * n**3

    return make


def _fp8(n: int, device: torch.device) -> Probe:
    def make() -> tuple[Callable[[], object], float]:
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16).to(torch.float8_e4m3fn) for _ in range(2))
        rows, columns = torch.ones(n, 1, device=device), torch.ones(1, n, device=device)
        return lambda: torch._scaled_mm(a, b.t(), rows, columns, out_dtype=torch.bfloat16), 2.0 * n**3

    return make


def _int8(n: int, device: torch.device) -> Probe:
    def make() -> tuple[Callable[[], object], float]:
        a, b = (torch.randint(-127, 128, (n, n), device=device, dtype=torch.int8) for _ in range(2))
        return lambda: torch._int_mm(a, b.t()), 2.0 * n**3

    return make


def _launch(device: torch.device) -> Probe:
    def make() -> tuple[Callable[[], object], float]:
        one = torch.zeros(1, device=device)
        return lambda: one.add_(1.0), 0.0

    return make
