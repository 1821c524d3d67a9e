"""The benchmark harness on a CPU: ceilings, the 2× rule, reports, and what happens to a call that is wrong."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.harness import accuracy
from bench.harness.accuracy import WrongResultError, check_results, compare
from bench.harness.case import Case, CaseSpec, Checked, Context, Family, op_case
from bench.harness.ceilings import Work, measure_ceilings
from bench.harness.peers import PeerAbsentError, require, skip
from bench.harness.report import FAILED_US, Report, ratio
from bench.harness.runner import UnavailableError, device_for, run_family
from bench.harness.timing import Timing, WallTimer
from fastattn import ops
from tests.harness import compare as tests_compare
from tests.harness import formulas

CPU = torch.device("cpu")
TARGETS = {"all": {"match": ".*", "min": 1.05, "geomean": 1.12}, "peak": {"match": "big", "ceiling": 0.95}}


def held_against(path: Path, targets: dict[str, Any]) -> dict[str, bool]:
    """The reading rules of the targets' check.py: "name figure" → reached."""
    report = json.loads(path.read_text())
    assert report["meta"].keys() >= {"gpu", "date", "commit", "torch", "cuda", "driver", "peers", "command", "method"}
    assert report["ceilings"].keys() >= {"copy_tb_s", "bf16_tflop_s", "fp8_tflop_s", "int8_top_s"}
    reached = {}
    for name, target in targets.items():
        cases = [case for case in report["cases"] if re.search(target["match"], case["id"])]
        ratios = [min(p) / c["ours_us"] for c in cases if (p := [t for t in c["peers_us"].values() if t])]
        ceilings = [case["ceiling"] for case in cases if case.get("ceiling")]
        figures = {}
        if ratios:
            figures |= {"min": min(ratios), "geomean": math.exp(sum(map(math.log, ratios)) / len(ratios))}
        if ceilings:
            figures["ceiling"] = min(ceilings)
        for figure in target.keys() & {"min", "geomean", "ceiling"}:
            reached[f"{name} {figure}"] = figures.get(figure, 0.0) >= target[figure]
    return reached


def report_of(**meta: Any) -> Report:
    full = dict.fromkeys(("gpu", "cpu", "load_average", "date", "commit", "cuda", "driver")) | {
        "peers": {},
        "command": "",
        "method": "",
    }
    ceilings = {"copy_tb_s": 4.0, "bf16_tflop_s": 700.0, "fp8_tflop_s": None, "int8_top_s": None, "launch_us": 2.0}
    return Report("some", full | {"torch": "2"} | meta, ceilings)


# ---- the 2× rule ----


def test_the_rule_is_that_of_the_tests() -> None:
    """Both let pass and refuse the same results, on either side of the limit."""
    rng = torch.Generator().manual_seed(1)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        exact = torch.randn(40, 30, generator=rng, dtype=torch.float64)
        plain = (exact + torch.randn(40, 30, generator=rng, dtype=torch.float64) * 1e-2).to(dtype)
        allowed = accuracy.allowed_error(dtype, exact, plain)
        for factor, passes in ((0.9, True), (1.2, False)):
            actual = exact.clone().float()
            actual[3, 4] += factor * allowed
            actual = actual.to(dtype)
            for judge in (
                lambda a, e=exact, p=plain: check_results("op", [a], [e], [p]),
                lambda a, e=exact, p=plain: tests_compare.assert_as_accurate(a, e, p, "op"),
            ):
                with contextlib.nullcontext() if passes else pytest.raises(AssertionError, match=r"\(3, 4\)"):
                    judge(actual)


def test_an_fp32_result_of_16_bit_inputs_gets_no_16_bit_tolerance() -> None:
    exact = torch.full((4,), 5.0)
    plain = exact.to(torch.bfloat16) + 0.03
    assert check_results("lse", [exact + 1e-6], [exact], [plain]) < 0.5
    with pytest.raises(WrongResultError, match="4 of 4 differ"):
        check_results("lse", [exact + 1e-3], [exact], [plain])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0])
def test_compare_names_position_and_values(bad: float) -> None:
    exact = torch.arange(1.0, 7.0).view(2, 3)
    actual = exact.clone()
    actual[1, 2] = bad
    with pytest.raises(WrongResultError, match=rf"1 of 6 differ, first at \(1, 2\): got {bad!r}, expected 6.0"):
        compare(actual, exact, 0.5, "x")


def test_compare_takes_equal_infinities_and_nan() -> None:
    special = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    assert compare(special.clone(), special, 0.0, "x") == 0.0
    with pytest.raises(WrongResultError, match="shape"):
        compare(special[:3], special, 0.0, "x")


# ---- ceilings and floors ----


def test_work_knows_its_floor() -> None:
    ceilings = {"copy_tb_s": 4.0, "bf16_tflop_s": 700.0, "fp8_tflop_s": None, "launch_us": 2.0}
    assert Work(num_bytes=400_000_000).floor_us(ceilings) == (pytest.approx(100.0), "memory")
    assert Work(num_bytes=1, num_ops=7 * 10**12).floor_us(ceilings) == (pytest.approx(10_000.0), "matrix")
    assert Work(num_bytes=100).floor_us(ceilings) == (2.0, "launch")
    assert Work(num_bytes=1, num_ops=7 * 10**12, rate="fp8_tflop_s").floor_us(ceilings) == (2.0, "launch")
    assert Work(items=5, unit="tok").floor_us(ceilings) == (0.0, "")


def test_work_speaks_in_the_unit_of_its_bound() -> None:
    assert Work(num_bytes=400_000_000).achieved(100.0, "memory") == "4 TB/s"
    assert Work(num_bytes=1, num_ops=7 * 10**11).achieved(1000.0, "matrix") == "700 TFLOP/s"
    assert Work(items=50, unit="tok").achieved(1e6, "") == "50 tok/s"


def test_ceilings_of_a_cpu() -> None:
    found = measure_ceilings(WallTimer(rounds=1), CPU, quick=True)
    assert found["copy_tb_s"] is not None
    assert 1e-4 < found["copy_tb_s"] < 10
    assert found["fp32_tflop_s"] is not None
    assert 1e-4 < found["fp32_tflop_s"] < 1000
    assert found["bf16_tflop_s"] is None


# ---- peers ----


def test_an_absent_peer_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PeerAbsentError, match="no_such_library is not installed"):
        require("no_such_library.kernels")
    (tmp_path / "peer_for_other_torch.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PeerAbsentError, match="cannot be imported: ImportError: undefined symbol"):
        require("peer_for_other_torch")
    with pytest.raises(PeerAbsentError, match="left out"):
        skip("left out")()


# ---- reports ----


def timed(us: float, how: str = "graph") -> Timing:
    return Timing(us, 0.01, 50, how)


def test_report_is_what_the_targets_read(tmp_path: Path) -> None:
    report = report_of()
    work = Work(num_bytes=4, num_ops=700 * 10**6 * 96)
    report.add("big_case", {"ours": timed(100.0), "fa3": timed(130.0), "cudnn": timed(120.0)}, {}, work, "big", 0.3)
    report.add("small", {"ours": timed(10.0), "fa3": timed(11.0)}, {"cudnn": "not installed"}, Work(), "small", 0.1)
    path = report.write(tmp_path)
    assert held_against(path, TARGETS) == {"all min": True, "all geomean": True, "peak ceiling": True}
    cases = {case["id"]: case for case in json.loads(path.read_text())["cases"]}
    assert cases["big_case"]["ceiling"] == pytest.approx(0.96)
    assert cases["small"]["peers_us"] == {"cudnn": None, "fa3": 11.0}
    assert cases["small"]["ceiling"] is None
    table = (tmp_path / "some.md").read_text()
    assert "| big_case | 100.0 | 672 TFLOP/s | 96% matrix | 130.0 | 120.0 | 1.20 | 0.30 |" in table
    assert "lowest 1.10, geometric mean 1.15, 2 cases" in table
    assert "- cudnn: not installed" in table
    assert "The run is not complete" in table


def test_a_failed_case_misses_every_target(tmp_path: Path) -> None:
    report = report_of()
    report.add("big_1", {"ours": timed(1.0), "peer": timed(9.0)}, {}, Work(num_bytes=4_000_000), "", 0.0)
    assert held_against(report.write(tmp_path), TARGETS)["all min"]
    report.fail("big_2", "WrongResultError: x | y")
    assert held_against(report.write(tmp_path), TARGETS) == dict.fromkeys(
        ["all min", "all geomean", "peak ceiling"], False
    )
    assert report.failed == ["big_2"]
    assert "| big_2 | FAILED: WrongResultError: x / y |" in report.as_table()


def test_a_peer_that_raised_is_null_with_the_reason() -> None:
    row = report_of().add("c", {"ours": timed(1.0), "peer": RuntimeError("bad\nmore")}, {}, Work(), "", 0.0)
    assert row["peers_us"] == {"peer": None}
    assert row["notes"] == {"peer": "RuntimeError: bad"}
    assert row["ratio"] is None


def test_another_way_to_launch_is_noted() -> None:
    row = report_of().add(
        "c", {"ours": timed(2.0), "peer": timed(3.0, "stream (not captured: x)")}, {}, Work(), "", 0.0
    )
    assert row["peers_us"] == {"peer": 3.0}
    assert row["notes"] == {"peer": "stream (not captured: x)"}


def test_own_target_is_shown() -> None:
    report = report_of()
    report.add("fast", {"ours": timed(1.0), "hf": timed(2.5)}, {}, Work(), "", 0.0, 2.0)
    report.add("slow", {"ours": timed(1.0), "hf": timed(1.5)}, {}, Work(), "", 0.0, 2.0)
    assert "2.50 of 2 ok" in report.as_table()
    assert "1.50 of 2 MISSED" in report.as_table()


def test_ratio_is_to_the_best_peer() -> None:
    assert ratio(2.0, {"a": 5.0, "b": 3.0, "c": None}) == 1.5
    assert ratio(2.0, {"c": None}) is None


# ---- a run ----


def rms_case(context: Context, op: Callable[..., Tensor], peers: dict[str, Any] | None = None) -> Case:
    rng = context.generator()
    x, weight = torch.randn(64, 256, generator=rng), torch.randn(256, generator=rng)
    return op_case(
        op,
        {"x": x, "weight": weight, "eps": 1e-6},
        formulas.rms_norm,
        peers={} if peers is None else {n: (lambda f=f: lambda: f(x, weight, 1e-6)) for n, f in peers.items()},
        work=Work(num_bytes=2 * x.nbytes),
        config="64 × 256",
    )


def norm_without_eps(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / x.abs().amax(-1, keepdim=True) * weight


def norm_that_forgets_a_row(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = forgotten[0] if forgotten else torch.empty_like(x)  # the same memory again, as an allocator gives it
    forgotten[:] = [out]
    out[:-1] = ops.rms_norm(x, weight, eps)[:-1]
    return out


forgotten: list[Tensor] = []


def run(tmp_path: Path, **builders: Callable[[Context], Case]) -> tuple[Report, dict[str, Any]]:
    specs = tuple(CaseSpec(name, build) for name, build in builders.items())
    family = Family("cpu_family", "cpu", "for a test", specs)
    report = run_family(family, specs, Context(CPU, quick=True), tmp_path, {})
    return report, {row["id"]: row for row in report.cases}


def test_a_wrong_operator_is_caught_and_the_others_are_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        raise RuntimeError("launch failed")

    report, rows = run(
        tmp_path,
        right=lambda c: rms_case(
            c, ops.rms_norm, {"torch": lambda x, w, eps: formulas.rms_norm(x.dtype, x, w, eps)[0]}
        ),
        wrong=lambda c: rms_case(c, norm_without_eps),
        unwritten=lambda c: rms_case(c, norm_that_forgets_a_row),
        raising=lambda c: rms_case(c, raises),
    )
    assert report.failed == ["wrong", "unwritten", "raising"]
    assert re.match(r"WrongResultError: norm_without_eps, result 0: \d+ of 16384 differ", rows["wrong"]["failed"])
    assert "256 of 16384 differ, first at (63, 0): got nan" in rows["unwritten"]["failed"]
    assert rows["raising"]["failed"] == "RuntimeError: launch failed"
    assert 0 < rows["right"]["ours_us"] < FAILED_US
    assert rows["right"]["peers_us"]["torch"] > 0
    assert rows["right"]["error_share"] <= 1
    saved = json.loads((tmp_path / "cpu_family.json").read_text())
    assert [case["id"] for case in saved["cases"]] == ["right", "wrong", "unwritten", "raising"]
    assert saved["meta"]["complete"] is True
    assert not held_against(tmp_path / "cpu_family.json", TARGETS)["all min"]
    assert "FAILED WrongResultError" in capsys.readouterr().out


def test_peers_that_are_absent_wrong_or_raise_become_null(tmp_path: Path) -> None:
    def raises(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        raise RuntimeError("needs sm_100")

    def build(context: Context) -> Case:
        case = rms_case(context, ops.rms_norm, {"wrong": norm_without_eps, "raising": raises})
        return Case(case.ours, case.check, {**case.peers, "absent": skip("not here")}, case.work, case.config)

    report, rows = run(tmp_path, case=build)
    assert report.failed == []
    assert rows["case"]["peers_us"] == {"wrong": None, "raising": None, "absent": None}
    assert rows["case"]["notes"]["wrong"].startswith("WrongResultError: wrong: relative error")
    assert rows["case"]["notes"]["raising"] == "RuntimeError: needs sm_100"
    assert rows["case"]["notes"]["absent"] == "not here"


def test_results_are_on_disk_after_every_case(tmp_path: Path) -> None:
    seen = []

    def second(context: Context) -> Case:
        seen.append(json.loads((tmp_path / "cpu_family.json").read_text()))
        return rms_case(context, ops.rms_norm)

    run(tmp_path, first=lambda c: rms_case(c, ops.rms_norm), second=second)
    assert [case["id"] for case in seen[0]["cases"]] == ["first"]
    assert seen[0]["meta"]["complete"] is False


def test_a_lost_context_ends_the_family_but_not_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.harness import runner

    broken = []

    def synchronize(device: torch.device) -> None:
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(runner, "_synchronize", synchronize)

    def breaks(context: Context) -> Case:
        def check() -> Checked:
            broken.append(1)
            return Checked(0.0)

        return Case(lambda: None, check, {}, Work(num_bytes=1), "")

    report, rows = run(
        tmp_path, fine=lambda c: rms_case(c, ops.rms_norm), breaks=breaks, after=lambda c: rms_case(c, ops.rms_norm)
    )
    assert report.failed == ["breaks", "after"]
    assert "context is lost (RuntimeError: CUDA error: an illegal memory access" in rows["breaks"]["failed"]
    assert rows["after"]["failed"].startswith("not run: the CUDA context is lost")
    assert rows["after"]["failed"].endswith("in breaks")


def test_a_gpu_family_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    family = Family("some_gpu_family", "cuda", "", ())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnavailableError, match=r"some_gpu_family needs an NVIDIA GPU, and torch .* sees none here"):
        device_for(family)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops, "has_cuda_kernels", lambda: False)
    with pytest.raises(UnavailableError, match="needs the CUDA kernels: FASTATTN_CUDA=on"):
        device_for(family)
