"""Every operator, from the one table: right results, refused mistakes, hostile memory, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import ops
from fastattn.ops import checks, has_cuda_kernels
from tests.harness.compare import assert_as_accurate, assert_equal, bits
from tests.harness.generators import Gen
from tests.harness.opspec import Call, OpSpec, bad_calls, fresh, to_device, with_gaps
from tests.harness.specs import SPECS

DENSE = ("linear", "rms_norm_linear", "layer_norm_linear", "int4_linear", "fp4_linear")
GATED = ("gated_linear", "rms_norm_gated_linear")
PRODUCTS = (*DENSE, *GATED, *(spec.name for spec in SPECS if "_attention" in spec.name))
each_op = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


class Recorder(TorchDispatchMode):
    """Notes each call of an operator of ours, with the arguments that the operator sees."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastattn":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def check_results(spec: OpSpec, call: Call, results: list[Tensor], what: str) -> None:
    """The results of `call`, whose arguments are as they were before it, against the independent formula."""
    host = to_device(call, "cpu")
    if spec.verify is not None:
        spec.verify(host, [r.cpu() for r in results])
        return
    assert spec.formula is not None
    exact = spec.formula(torch.float64, **host)
    assert len(results) == len(exact)
    plain: dict[torch.dtype, list[Tensor]] = {}
    for i, (result, right) in enumerate(zip(results, exact, strict=True)):
        name = f"{what}, result {i}"
        if not result.is_floating_point():
            assert_equal(result, right, name)
            continue
        if result.dtype not in plain:
            plain[result.dtype] = spec.formula(result.dtype, **host)
        # Hopper's tensor cores add fp8 products with fewer bits than fp32 has; that shows in an LSE.
        fp8 = result.is_cuda and any(isinstance(v, Tensor) and v.dtype is torch.float8_e4m3fn for v in host.values())
        noise = max(spec.noise, 1e-3) if fp8 and result.dtype is torch.float32 else spec.noise
        if fp8 and "weight_scale" in host and right.numel():
            # A step of 32 columns cuts the sum so far to 14 bits, towards zero: half of the last one on average.
            columns = host["x"].shape[-1] if host.get("fast_accum") else 128
            noise += columns / 32 * 2.0**-14 * float(right.abs().max())
        assert_as_accurate(result, right, plain[result.dtype][i], name, noise)


@each_op
def test_results(spec: OpSpec, device: str) -> None:
    for dtype in spec.device_dtypes(device):
        for name, call in spec.calls(Gen(device, seed=1), dtype):
            before = fresh(call)
            results = spec.run(call)
            assert not spec.keeps_dtype or results[0].dtype is dtype
            check_results(spec, before, results, f"{spec.name} {dtype} {name}")
            for key, value in call.items():
                if isinstance(value, Tensor) and key not in spec.mutates:
                    assert torch.equal(bits(value), bits(before[key])), f"{spec.name} {name} changed {key}"


@each_op
def test_hostile_strides(spec: OpSpec, device: str) -> None:
    """Rows with gaps of NaN between them give the very bits that packed rows give."""
    dtype = spec.device_dtypes(device)[0]
    for name, call in spec.calls(Gen(device, seed=2), dtype):
        gaps = with_gaps(call)
        for packed, gapped in zip(spec.run(fresh(call)), spec.run(gaps), strict=True):
            # a CPU matrix product may take another path for other strides: equal up to its rounding
            if device == "cpu" and spec.name in PRODUCTS:
                rtol = 2**-3 if packed.dtype is torch.float8_e4m3fn else 1e-4  # that is the next one
                right = packed.float()
                scale = float(right.nan_to_num(0.0, 0.0, 0.0).abs().max()) if right.numel() else 0.0
                torch.testing.assert_close(gapped.float(), right, rtol=rtol, atol=1e-5 * scale, equal_nan=True)
            elif device == "cuda" and spec.name == "fp4_linear":
                # gaps of 8 bytes: rows are not 16-byte aligned and take the plain kernel, which sums in another order
                scale = float(packed.abs().max()) if packed.numel() else 0.0
                torch.testing.assert_close(gapped, packed, rtol=2 * torch.finfo(dtype).eps, atol=1e-4 * scale)
            else:
                assert torch.equal(bits(packed), bits(gapped)), f"{spec.name} {name}"


@each_op
def test_gaps_stay_untouched(spec: OpSpec, device: str) -> None:
    """What lies between the rows of an argument that is changed is not written."""
    dtype = spec.device_dtypes(device)[0]
    for name, call in spec.calls(Gen(device, seed=2), dtype):
        gaps = with_gaps(call)
        for key in spec.mutates:
            whole = torch.as_strided(gaps[key], (gaps[key].untyped_storage().nbytes() // gaps[key].itemsize,), (1,), 0)
            inside = torch.zeros_like(whole, dtype=torch.bool)
            inside.as_strided(gaps[key].shape, gaps[key].stride(), gaps[key].storage_offset()).fill_(True)
            before = whole[~inside].clone()
            spec.run(fresh(gaps) | {key: gaps[key]})
            assert torch.equal(bits(whole[~inside]), bits(before)), (
                f"{spec.name} {name} wrote between the rows of {key}"
            )


@each_op
def test_repeatable_and_fresh(spec: OpSpec, device: str) -> None:
    """Twice the same bits; results are contiguous and share no memory with an argument."""
    dtype = spec.device_dtypes(device)[0]
    for name, call in spec.calls(Gen(device, seed=3), dtype):
        first, second = spec.run(fresh(call)), spec.run(fresh(call))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(bits(a), bits(b)), f"{spec.name} {name}"
        own = {t.untyped_storage().data_ptr() for t in call.values() if isinstance(t, Tensor) and t.numel()}
        for result in spec.run(call)[: len(first) - len(spec.mutates)]:
            assert result.is_contiguous() and (result.numel() == 0 or result.untyped_storage().data_ptr() not in own)


@each_op
def test_mistakes_are_refused(spec: OpSpec, device: str) -> None:
    """At least 40 bad calls: the right error, which names the argument, and no implementation is reached."""
    count = 0
    for case in bad_calls(spec, Gen(device, seed=4), spec.device_dtypes(device)[0]):
        count += 1
        with Recorder() as recorder:
            try:
                spec.fn(**case.call)
            except case.error as error:
                message = str(error)
            except Exception as error:
                raise AssertionError(f"{spec.name}, {case.name}: raised {error!r}") from error
            else:
                raise AssertionError(f"{spec.name}, {case.name}: accepted")
        missing = [word for word in case.says if word not in message]
        assert not missing, f"{spec.name}, {case.name}: {message!r} lacks {missing}"
        assert not recorder.calls, f"{spec.name}, {case.name}: reached the implementation"
    assert count >= 40, f"only {count} bad calls of {spec.name}"


@each_op
def test_valid_calls_take_the_fast_path(spec: OpSpec, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparisons of the fast path accept what is valid, and the slow one agrees with them."""
    slow: list[str] = []
    explain = checks.explain

    def spy(op: str, *rest: Any) -> None:
        slow.append(op)
        explain(op, *rest)

    monkeypatch.setattr(checks, "explain", spy)
    for dtype in spec.device_dtypes(device):
        for name, call in spec.calls(Gen(device, seed=5), dtype):
            spec.run(with_gaps(call) if "1)" not in name and "1 1" not in name else call)
            assert not slow, f"{spec.name} {dtype} {name}"


@each_op
def test_opcheck(spec: OpSpec, device: str) -> None:
    """torch's own checks of the schema, its mutation marks, the fake and AOT dispatch with dynamic shapes."""
    dtypes = spec.device_dtypes(device)
    for index, (_, call) in enumerate(spec.calls(Gen(device, seed=6), dtypes[-1])):
        if index in (0, 2):
            with Recorder() as recorder:
                spec.run(fresh(call))
            (op, args, kwargs) = recorder.calls[0]
            tests = ("test_schema", "test_autograd_registration", "test_faketensor")
            if any(isinstance(arg, Tensor) and arg.dtype is torch.float8_e4m3fn for arg in args):
                tests = tests[1:]  # it compares the arguments before and after, which torch cannot in fp8
            torch.library.opcheck(
                op, args, kwargs, test_utils=(*tests, "test_aot_dispatch_dynamic") if not index else tests
            )


def test_deterministic_algorithms_are_torchs_too() -> None:
    q = Gen(seed=1).randn(1, 3, 2, 8)
    asked = []
    for mode, argument in ((False, False), (True, False), (False, True)):
        torch.use_deterministic_algorithms(mode)
        try:
            with Recorder() as recorder:
                ops.batch_attention(q, q, q, deterministic=argument)
        finally:
            torch.use_deterministic_algorithms(False)
        asked.append(recorder.calls[0][1][-2])
    assert asked == [False, True, True]


@each_op
def test_compile_fullgraph(spec: OpSpec, device: str) -> None:
    """One graph, checks and all, and the same bits as without."""
    torch._dynamo.reset()
    compiled = torch.compile(spec.fn, fullgraph=True, backend="aot_eager", dynamic=False)
    _, call = next(iter(spec.calls(Gen(device, seed=7), spec.device_dtypes(device)[0])))
    eager, traced = fresh(call), fresh(call)
    expected = spec.run(eager)
    out = compiled(**traced)
    results = [] if out is None else [out] if isinstance(out, Tensor) else list(out)
    for a, b in zip(expected, results + [traced[name] for name in spec.mutates], strict=True):
        assert torch.equal(bits(a), bits(b)), spec.name


@each_op
def test_cuda_without_kernels_says_how_to_build(spec: OpSpec) -> None:
    """Fake CUDA tensors stand in for real ones: this is checked on machines without a GPU."""
    if has_cuda_kernels():
        pytest.skip("the CUDA kernels are built")
    call = next(iter(spec.calls(Gen("cpu", seed=8), spec.cuda_dtypes[0])))[1]
    with FakeTensorMode():
        call = fresh(call, lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))
        with pytest.raises(RuntimeError, match=r"cuda.*no CUDA kernel.*FASTATTN_CUDA=on pip install"):
            spec.fn(**call)
