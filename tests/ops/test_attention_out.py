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


@pytest.mark.parametrize("spec", PAGED, ids=["8 bits", "16 bits"])
def test_same_bits_in_the_callers_memory(spec: OpSpec, device: str) -> None:
    for dtype in spec.device_dtypes(device):
        for name, call in spec.calls(Gen(device, seed=1), dtype):
            out = torch.full_like(call["q"], torch.nan, memory_format=torch.contiguous_format)
            expected, lse = ops.paged_attention(**fresh(call))
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
