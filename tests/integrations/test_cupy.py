"""Arrays in, arrays out, nothing copied, on the array's stream. NumPy stands for any library that speaks DLPack."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

import fastattn
from fastattn import cupy, ops


def arrays(*shapes: tuple[int, ...]) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def test_numpy_in_numpy_out() -> None:
    q, k, v = arrays((2, 5, 4, 16), (2, 7, 2, 16), (2, 7, 2, 16))
    out, lse, _ = cupy.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    expected, expected_lse, _ = fastattn.flash_attn_func(
        *map(torch.from_numpy, (q, k, v)), causal=True, return_attn_probs=True
    )
    assert isinstance(out, np.ndarray) and isinstance(lse, np.ndarray)
    np.testing.assert_array_equal(out, expected.numpy())
    np.testing.assert_array_equal(lse, expected_lse.numpy())


def test_nothing_is_copied() -> None:
    q, k = arrays((2, 5, 4, 16), (2, 7, 2, 16))
    seen: list[Any] = []

    def spy(q: torch.Tensor, *, other: torch.Tensor) -> torch.Tensor:
        seen.extend((q.data_ptr(), other.data_ptr()))
        return q

    out = cupy.call(spy, q, other=k)
    assert seen == [q.ctypes.data, k.ctypes.data] and out.ctypes.data == q.ctypes.data


def test_varlen_and_operators() -> None:
    q, k, v = arrays((5, 4, 16), (7, 2, 16), (7, 2, 16))
    cu_q, cu_k = np.array([0, 2, 5], np.int32), np.array([0, 3, 7], np.int32)
    out = cupy.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 3, 4, causal=True)
    again, lse = cupy.call(ops.varlen_attention, q, k, v, cu_q, cu_k, 3, 4, causal=True)
    np.testing.assert_array_equal(out, again)
    assert lse.shape == (4, 5)


def test_the_cache_is_changed_itself() -> None:
    q, k_cache, v_cache, k, v = arrays((1, 1, 4, 16), (1, 8, 2, 16), (1, 8, 2, 16), (1, 1, 2, 16), (1, 1, 2, 16))
    out = cupy.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=np.array([3], np.int32))
    assert isinstance(out, np.ndarray)
    np.testing.assert_array_equal(k_cache[0, 3], k[0, 0])
    np.testing.assert_array_equal(v_cache[0, 3], v[0, 0])


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_a_cache_that_is_read_only_is_not_written(name: str) -> None:
    q, k_cache, v_cache, k, v = arrays((1, 1, 4, 16), (1, 8, 2, 16), (1, 8, 2, 16), (1, 1, 2, 16), (1, 1, 2, 16))
    {"k_cache": k_cache, "v_cache": v_cache}[name].setflags(write=False)
    lengths = np.array([3], np.int32)
    with pytest.raises(ValueError, match=f"flash_attn_with_kvcache: {name} is read-only"):
        cupy.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths)
    assert cupy.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths).shape == q.shape


def test_rows_backwards_are_refused() -> None:
    """torch would end the process: an exception of its own that nobody catches."""
    x, weight = arrays((5, 64), (48, 64))
    for args, kwargs, name in (
        ((x[::-1], weight), {}, "argument 0"),
        ((x, weight[:, ::-1]), {}, "argument 1"),
        ((x, weight), {"bias": weight[::-1, 0]}, "bias"),
    ):
        with pytest.raises(
            ValueError, match=rf"cupy.call: {name} has strides \(.*-\d+.*\), in bytes, expected none below 0"
        ):
            cupy.call(fastattn.linear, *args, **kwargs)


def test_what_is_no_tensor_comes_back_as_it_is() -> None:
    tiles, global_scale = cupy.call(ops.pack_w4_scales, np.zeros((16, 4), np.uint8), 16)
    assert isinstance(tiles, np.ndarray) and global_scale is None
    assert cupy.call(lambda x: x.shape[0], *arrays((5, 64))) == 5


def test_a_type_that_the_library_has_not_is_named() -> None:
    with pytest.raises(
        TypeError, match=r"cupy.call: a result in torch\.float8_e4m3fn cannot be returned as an array of numpy"
    ):
        cupy.call(ops.quantize_fp8, *arrays((5, 64)))


def test_tensors_stay_tensors() -> None:
    q = torch.randn(1, 3, 2, 16)
    assert isinstance(cupy.flash_attn_func(q, q, q), torch.Tensor)


class Array:
    """A library's array that records what is asked of it; on a GPU it would be told the stream."""

    def __init__(self, data: Any) -> None:
        self.data, self.asked = data, []

    def __dlpack__(self, **options: Any) -> Any:
        self.asked.append(options)
        return self.data.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __array_namespace__(self) -> Any:
        return types.SimpleNamespace(from_dlpack=lambda tensor: Array(np.from_dlpack(tensor)))


def test_any_array_that_speaks_dlpack() -> None:
    q, k, v = (Array(x) for x in arrays((1, 5, 4, 16), (1, 7, 2, 16), (1, 7, 2, 16)))
    out = cupy.flash_attn_func(q, k, v)
    assert isinstance(out, Array) and out.data.shape == (1, 5, 4, 16)
    assert all(len(x.asked) == 1 and x.asked[0].get("stream") is None for x in (q, k, v))  # a CPU has no streams


def test_an_array_that_cannot_come_back_is_refused() -> None:
    class Mute:
        __dlpack__ = __dlpack_device__ = None

    mute = Mute()
    mute.__dlpack__, mute.__dlpack_device__ = (f := arrays((1, 1, 1, 8))[0]).__dlpack__, f.__dlpack_device__  # type: ignore[assignment]
    with pytest.raises(TypeError, match="Mute cannot be returned: tests has no from_dlpack"):
        cupy.call(lambda x: x, mute)


def test_runs_on_cupys_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through stand-ins for CuPy and torch's streams: the stream is CuPy's, for the whole call."""
    current, used = [0], []

    class ndarray:  # noqa: N801
        __module__ = "cupy"
        device = types.SimpleNamespace(id=3)

        def __init__(self, data: Any) -> None:
            self.data = data

        def __dlpack__(self, **_: Any) -> Any:
            used.append(current[0])
            return self.data.__dlpack__()

        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

    class Scope:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            current[0] = self.stream

        def __exit__(self, *_: object) -> None:
            current[0] = 0

    library = types.ModuleType("cupy")
    library.cuda = types.SimpleNamespace(get_current_stream=lambda: types.SimpleNamespace(ptr=0xABC))
    library.from_dlpack = lambda tensor: (used.append(current[0]), ndarray(np.from_dlpack(tensor)))[1]
    monkeypatch.setitem(sys.modules, "cupy", library)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda pointer, device: (pointer, device))
    monkeypatch.setattr(torch.cuda, "stream", Scope)
    devices: list[int] = []
    monkeypatch.setattr(torch.cuda, "device", lambda index: (devices.append(index), Scope(None))[1])
    q = ndarray(arrays((1, 3, 2, 16))[0])
    out = cupy.flash_attn_func(q, q, q)
    assert isinstance(out, ndarray) and devices == [3]
    assert used == [(0xABC, 3)] * 4  # three arrays in, one out
