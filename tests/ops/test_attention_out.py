"""`paged_attention` into the caller's memory: the same bits as without, on every call of the table, and bad memory refused."""

from __future__ import annotations

import pytest
import torch

from fastattn import ops
from tests.harness.compare import bits
from tests.harness.generators import Gen
from tests.harness.opspec import OpSpec, fresh
from tests.harness.specs import SPECS
from tests.ops.test_ops import Recorder

PAGED = [spec for spec in SPECS if spec.name == "paged_attention"]


@pytest.mark.parametrize("spec", PAGED, ids=["8 bits", "16 bits", "out in 8 bits"])
def test_same_bits_in_the_callers_memory(spec: OpSpec, device: str) -> None:
    for dtype in spec.device_dtypes(device):
        for name, call in spec.calls(Gen(device, seed=1), dtype):
            expected, lse = ops.paged_attention(**fresh(call))
            out = torch.full_like(expected, torch.nan)
            found, found_lse = ops.paged_attention(**call, out=out)
            assert found is out, name
            assert torch.equal(bits(out), bits(expected)) and torch.equal(bits(found_lse), bits(lse)), name


def test_out_under_opcheck_and_compile(device: str) -> None:
    _, call = next(iter(PAGED[1].calls(Gen(device, seed=6), torch.bfloat16)))
    out, compiled_out = torch.empty_like(call["q"]), torch.empty_like(call["q"])
    with Recorder() as recorder:
        ops.paged_attention(**call, out=out)
    op, args, kwargs = recorder.calls[0]
    torch.library.opcheck(op, args, kwargs)
    torch._dynamo.reset()
    torch.compile(ops.paged_attention, fullgraph=True, backend="aot_eager")(**call, out=compiled_out)
    assert torch.equal(bits(compiled_out), bits(out))


def test_bad_out_is_refused(device: str) -> None:
    q = torch.zeros(3, 4, 8, dtype=torch.bfloat16, device=device)
    cache = torch.zeros(2, 16, 2, 8, dtype=torch.bfloat16, device=device)
    starts, lengths, table = (torch.tensor(values, dtype=torch.int32, device=device) for values in ([0, 3], [3], [[0]]))
    wide = torch.empty(3, 4, 16, dtype=q.dtype, device=device)
    for out, error, message in (
        (wide[..., :8], ValueError, r"out has shape \(3, 4, 8\) and strides \(64, 16, 1\), expected it contiguous"),
        (q[:2], ValueError, r"out has shape \(2, 4, 8\), expected \(3, 4, 8\), the shape of q"),
        (q.half(), TypeError, "out is torch.float16, expected torch.bfloat16 as q"),
        (3, TypeError, "out is a int, expected a torch.Tensor or None"),
    ):
        with pytest.raises(error, match=message):
            ops.paged_attention(q, cache, cache, starts, lengths, table, 3, out=out)  # type: ignore[arg-type]


def test_out_in_8_bits_is_rounded_once(device: str) -> None:
    """Not from 16 bits: of q that is exact in them, on the CPU the code of the result in fp32, in each number's place."""
    _, call = next(pair for pair in PAGED[2].calls(Gen(device, seed=9), torch.bfloat16) if "decode" in pair[0])
    scale = call.pop("out_scale").fill_(0.03)
    out, lse = ops.paged_attention(**call, out_scale=scale)
    in_16_bits, lse_16 = ops.paged_attention(**call)
    assert torch.equal(bits(lse), bits(lse_16))
    if device == "cpu":
        wide = {name: call[name].float() for name in ("q", "k_cache", "v_cache")}
        expected = (ops.paged_attention(**call | wide)[0] / scale).to(torch.float8_e4m3fn)
        assert torch.equal(bits(out), bits(expected))
        assert not torch.equal(bits(out), bits((in_16_bits / scale).to(torch.float8_e4m3fn)))
    torch.testing.assert_close(out.float() * scale, in_16_bits.float(), rtol=0.07, atol=2**-10 * 0.03)


def test_out_in_8_bits_keeps_nan_and_goes_into_fp8_linear(device: str) -> None:
    _, call = next(pair for pair in PAGED[2].calls(Gen(device, seed=9), torch.bfloat16) if "decode" in pair[0])
    call["v_cache"][call["block_table"][0, 0], 0, 0, 3] = torch.nan
    out, _ = ops.paged_attention(**call)
    tokens, heads, dim = out.shape
    weight = torch.zeros(16, heads * dim, device=device)
    weight[range(16), range(heads * dim - 16, heads * dim)] = 1.0  # the last head's last columns
    assert out[0, 0, 3].float().isnan() and int(out.float().isnan().sum()) == heads // call["k_cache"].shape[2]
    product = ops.fp8_linear(
        out.flatten(1)[1:], call["out_scale"], weight.to(torch.float8_e4m3fn), torch.ones(1, device=device),
        out_dtype=torch.bfloat16,
    )  # fmt: skip
    expected = (out[1:, -1, -16:].float() * call["out_scale"]).bfloat16()
    assert tokens > 1 and torch.equal(product, expected)
