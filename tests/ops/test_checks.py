"""The checks themselves: what they say, when they look at values, and that the fast path is never laxer than the slow one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastattn import config, ops
from fastattn.ops import checks
from fastattn.ops._args import overlaps


def _message(fn: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises((TypeError, ValueError)) as caught:
        fn(*args, **kwargs)
    return str(caught.value)


def test_messages() -> None:
    x = torch.ones(3, 8)
    weight = torch.ones(8)
    assert (
        _message(ops.rms_norm, x, weight[:5])
        == "rms_norm: weight has shape (5,), expected (N,) with N = 8 from x (3, 8)"
    )
    assert _message(ops.rms_norm, x, weight.half()) == "rms_norm: weight is torch.float16, expected torch.float32 as x"
    assert _message(ops.rms_norm, x, weight, -1.0) == "rms_norm: eps is -1.0, expected a finite number ≥ 0"
    assert _message(ops.rms_norm, x, [1.0]) == "rms_norm: weight is a list, expected a torch.Tensor"
    assert _message(ops.rms_norm, x.to("meta"), weight) == "rms_norm: x is on meta, expected cpu or cuda"
    assert _message(ops.swiglu, x[:, :7]) == "swiglu: x has shape (3, 7), expected (..., 2N): an even last dimension"
    assert (
        _message(ops.linear, x, torch.ones(4, 8), torch.ones(5))
        == "linear: bias has shape (5,), expected (N,) with N = 4 from weight (4, 8)"
    )
    assert (
        _message(ops.rms_norm, x.t(), torch.ones(3))
        == "rms_norm: x has strides (1, 8), expected a contiguous last dimension (stride 1)"
    )


def test_order_of_checks() -> None:
    """With several things wrong, type comes before dims, device, dtype, shape, stride, grad and range."""
    x, weight = torch.ones(3, 8), torch.ones(8)
    bad_shape = torch.ones(5, dtype=torch.int64)
    assert "list" in _message(ops.rms_norm, x, [1.0], -1.0)
    assert "2 dimensions" in _message(ops.rms_norm, x, torch.ones(2, 5, device="meta"), -1.0)
    assert "meta" in _message(ops.rms_norm, x, bad_shape.to("meta"), -1.0)
    assert "int64" in _message(ops.rms_norm, x, bad_shape, -1.0)
    assert "shape (5,)" in _message(ops.rms_norm, x.clone().requires_grad_(), bad_shape.float(), -1.0)
    assert "strides" in _message(ops.rms_norm, torch.ones(8, 3).t().requires_grad_(), weight, -1.0)
    assert "requires grad" in _message(ops.rms_norm, x.clone().requires_grad_(), weight, -1.0)


def test_grad_is_fine_where_it_is_off() -> None:
    x, weight = torch.ones(3, 8, requires_grad=True), torch.nn.Parameter(torch.ones(8))
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            ops.rms_norm(x, weight)


def test_ints_are_numbers_too() -> None:
    assert torch.equal(ops.rms_norm(torch.ones(3, 8), torch.ones(8), 0), torch.ones(3, 8))  # type: ignore[arg-type]


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_fast_path_is_never_laxer(data: st.DataObject) -> None:
    """Random tensors of random rank, dtype and strides: check() returns exactly where explain() does."""
    reached: list[bool] = []

    def tensor(like: tuple[int, ...]) -> Any:
        kind = data.draw(st.integers(0, 9))
        if kind == 0:
            return data.draw(st.sampled_from([None, 1, [1.0]]))
        shape = like if kind > 3 else tuple(data.draw(st.lists(st.integers(0, 3), max_size=4)))
        dtype = torch.float32 if kind > 2 else data.draw(st.sampled_from([torch.float16, torch.int32, torch.float64]))
        t = torch.ones(shape, dtype=dtype)
        if kind == 4 and t.dim():
            t = t[..., None].expand(*t.shape, 2)[..., 0].transpose(0, -1).contiguous().transpose(0, -1)
        if kind == 5 and t.dim() and t.shape[0]:
            t = t[:1].expand(t.shape)
        if kind == 6 and t.is_floating_point():
            t.requires_grad_()
        return t

    rows, width = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 4))
    eps = data.draw(st.sampled_from([0.0, 1e-6, 1, -1.0, float("nan"), "x", True]))
    scales = (data.draw(st.integers(0, 3)), width)[data.draw(st.integers(0, 1)) :]
    call = (tensor((rows, width)), tensor((rows, width)), tensor((width,)), tensor(scales), tensor((rows,)), eps)
    args = (
        checks.TensorArg("x", "... N", checks.FLOAT),
        checks.TensorArg("y", "like x", "x", mutated=True),
        checks.TensorArg("w", "N", "x", optional=True),
        checks.TensorArg("s", "[N] N", "x", optional=True, any_strides=True),
        checks.TensorArg("g", "M", "x", grad=True),
        checks.NonNegative("eps"),
    )
    check = checks.compile_check("rms_norm", *args)
    try:
        checks.explain("rms_norm", "rms_norm", args, call)
        valid = True
    except (TypeError, ValueError):
        valid = False
    try:
        check(*call)
        reached.append(True)
    except (TypeError, ValueError):
        reached.append(False)
    assert reached == [valid]


@pytest.mark.parametrize(
    ("shape", "stride", "expected"),
    [
        ((3, 4), (4, 1), False),
        ((3, 4), (9, 1), False),
        ((3, 4), (3, 1), True),
        ((3, 4), (0, 1), True),
        ((1, 4), (0, 1), False),
        ((2, 3, 4), (4, 8, 1), False),
        ((2, 3, 4), (4, 4, 1), True),
        ((0, 4), (0, 1), False),
        ((5,), (1,), False),
        ((5,), (0,), True),
    ],
)
def test_overlaps(shape: tuple[int, ...], stride: tuple[int, ...], expected: bool) -> None:
    assert overlaps(torch.zeros(100).as_strided(shape, stride)) is expected


def test_unused_pages_may_be_anything() -> None:
    q, cache = torch.ones(1, 2, 8), torch.ones(2, 4, 2, 8)
    table = torch.tensor([[1, -7, 2**31 - 1]], dtype=torch.int32)
    ints: Tensor = torch.tensor([0, 1], dtype=torch.int32)
    for length in (1, 4):
        out, _ = ops.paged_attention(q, cache, cache, ints, ints[1:] * length, table, 1)
        assert torch.equal(out, torch.ones_like(q))
    with pytest.raises(ValueError, match=r"block_table\[0, 1\] is -7, expected 0 ≤ block < 2, num_blocks from k_cache"):
        ops.paged_attention(q, cache, cache, ints, ints[1:] * 5, table, 1)


@pytest.mark.parametrize(
    ("read", "name", "text", "value"),
    [
        (config.validate_inputs, "FASTATTN_VALIDATE_INPUTS", "1", True),
        (config.validate_inputs, "FASTATTN_VALIDATE_INPUTS", "0", False),
        (config.validate_inputs, "FASTATTN_VALIDATE_INPUTS", None, False),
        (config.validate_inputs, "FASTATTN_VALIDATE_INPUTS", "yes", None),
        (config.validate_inputs, "FASTATTN_VALIDATE_INPUTS", "", None),
        (config.log_level, "FASTATTN_LOGLEVEL", "debug", "DEBUG"),
        (config.log_level, "FASTATTN_LOGLEVEL", None, "WARNING"),
        (config.log_level, "FASTATTN_LOGLEVEL", "loud", None),
        (config.cache_dir, "FASTATTN_CACHE_DIR", "/x/y", Path("/x/y")),
        (config.cache_dir, "FASTATTN_CACHE_DIR", "x/y", None),
        (config.cache_dir, "FASTATTN_CACHE_DIR", "~nobody-of-this-name/y", None),
    ],
)
def test_environment(read: Any, name: str, text: str | None, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    if text is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, text)
    read.cache_clear()
    try:
        if value is None:
            with pytest.raises(ValueError, match=f"environment variable {name} is '{text}', expected"):
                read()
        else:
            assert read() == value
    finally:
        read.cache_clear()


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As containers have them: a cache folder that is named is all that is needed."""

    def fails() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fails)
    monkeypatch.setenv("FASTATTN_CACHE_DIR", "/x/y")
    config.cache_dir.cache_clear()
    try:
        assert config.cache_dir() == Path("/x/y")
        config.cache_dir.cache_clear()
        monkeypatch.delenv("FASTATTN_CACHE_DIR")
        with pytest.raises(FileNotFoundError, match="no home directory: set environment variable FASTATTN_CACHE_DIR"):
            config.cache_dir()
    finally:
        config.cache_dir.cache_clear()
