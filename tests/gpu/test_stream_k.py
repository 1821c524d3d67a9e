"""Products whose tiles CTAs share evenly (stream-K): of shapes that get it, right, the same again and again, in graphs and at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn import _runtime, ops

pytestmark = pytest.mark.gpu
M, N, K = 512, 1024, 28672
BF16 = torch.bfloat16


def halves(rows: int, columns: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(rows, columns, device="cuda") * scale).to(BF16)


def plain(norm: str, gated: bool) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Of x: what the operator gives, and torch in x's dtype, which is also the reference in fp64."""
    weight, bias = halves(N, K, K**-0.5), halves(1, N)[0]

    def ours(x: Tensor) -> Tensor:
        if gated:
            return (ops.rms_norm_gated_linear if norm else ops.gated_linear)(x, weight, bias)
        if norm == "layer":
            return ops.layer_norm_linear(x, weight, weight.float().sum(1), bias)
        if norm == "rms_given":
            return ops.rms_norm_linear(x, weight, bias, sums_of_squares=x.float().square().view(M, -1, 32).sum(-1))
        return (ops.rms_norm_linear if norm else ops.linear)(x, weight, bias)

    def torchs(x: Tensor) -> Tensor:
        w, b = weight.to(x.dtype), bias.to(x.dtype)
        if norm.startswith("rms"):
            x = F.rms_norm(x, (K,), eps=1e-6)
        if norm == "layer":
            x = F.layer_norm(x, (K,), eps=1e-5)
        y = F.linear(x, w, b)
        if gated:
            gate, up = y.unflatten(-1, (-1, 2, 8)).unbind(-2)
            y = (F.silu(gate) * up).flatten(-2)
        return y

    return ours, torchs


def at_once_and_again(run: Callable[[], Tensor]) -> Tensor:
    """Its result, which is the same in two graphs that are replayed on two streams at the same time."""
    expected = run()
    graphs, results, streams = [], [], [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in streams:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            results.append([run() for _ in range(3)])
    torch.cuda.synchronize()
    for _ in range(20):
        for result in results:
            for out in result:
                out.fill_(torch.nan)
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(out, expected) for result in results for out in result)
    return expected


@pytest.mark.parametrize(
    ("norm", "gated"),
    [("", False), ("rms", False), ("rms_given", False), ("layer", False), ("", True), ("rms", True)],
    ids=str,
)
def test_16_bits(norm: str, gated: bool) -> None:
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    assert _runtime.gemm_sm90_config(M, N, K, num_sms, norm=norm, gated=gated)["stream_k"]
    torch.manual_seed(1)
    ours, torchs = plain(norm, gated)
    x = halves(M, K) * 3 + 2
    exact = torchs(x.double())
    error = (at_once_and_again(lambda: ours(x)).double() - exact).abs().max()
    assert error <= 2 * (torchs(x).double() - exact).abs().max()


@pytest.mark.parametrize("kind", ["int8", "fp8", "fp8 fast"])
def test_8_bits(kind: str) -> None:
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    assert _runtime.gemm_sm90_config(M, N, K, num_sms, element_bytes=1, two_levels=kind == "fp8")["stream_k"]
    torch.manual_seed(2)
    quantize = ops.quantize_int8 if kind == "int8" else ops.quantize_fp8
    (x, x_scale), (weight, weight_scale) = quantize(halves(M, K)), quantize(halves(N, K))
    sums = x.double() @ weight.double().T
    exact = sums * x_scale[:, None].double() * weight_scale.double()
    if kind == "int8":
        out = at_once_and_again(lambda: ops.int8_linear(x, x_scale, weight, weight_scale, out_dtype=BF16))
    else:
        fast = kind == "fp8 fast"
        out = at_once_and_again(
            lambda: ops.fp8_linear(x, x_scale, weight, weight_scale, out_dtype=BF16, fast_accum=fast)
        )
    # Rounded once to bf16; the tensor cores cut sums in fp8 to 14 bits at each 32 columns, with fast_accum over all of K.
    lost = {"int8": 0.0, "fp8": 4.0, "fp8 fast": K / 32}[kind] * 2**-13
    magnitudes = (x.double().abs() @ weight.double().abs().T) * x_scale[:, None].double() * weight_scale.double()
    assert ((out.double() - exact).abs() <= exact.abs() * 2**-8 + magnitudes * lost + 1e-6).all()
