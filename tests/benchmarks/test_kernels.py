"""The operators' table: every operator is in it, with sizes that can be checked by hand."""

from __future__ import annotations

import pytest
import torch

from fastattn import ops
from fastattn.benchmarks import kernels
from fastattn.benchmarks.kernel_cases import cases

SHAPES = kernels.Shapes(
    num_tokens=3, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=50, context_len=20, block_size=8
)  # fmt: skip
CPU = torch.device("cpu")


def test_every_operator_is_measured(device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    found = list(cases(SHAPES, torch.device(device), dtype))
    # Without a sensible size of its own: it touches a handful of logits. And what is made of other operators.
    others = {"has_cuda_kernels", "adjust_logits", "cascade_attention", "shared_prefix_levels", "CascadeLevel"}
    others |= {"pack_sparse_24", "unpack_sparse_24", "pack_w4_tiles", "unpack_w4_tiles"}  # once a weight
    others |= {"pack_w4_scales", "unpack_w4_scales", "quantize_int4", "quantize_nvfp4", "quantize_mxfp4"}
    others |= {"dequantize_int4", "dequantize_fp4"}
    # All layers at once, which engines' benchmarks time, and what belongs to it.
    others |= {"decode_layers", "decode_layers_max_tokens", "decode_layers_workspace"}
    others |= {"DecoderWeights", "DecoderFp4Weights", "Fp4Tiles", "DecoderHead"}
    assert {case.operator for case in found} >= set(ops.__all__) - others
    timer = kernels.Timer(torch.device(device), min_seconds=0.0)
    limits = {"memory": 0.01, "matrix": 1.0}
    for case in found:
        row = kernels.measure(case, timer, limits)
        assert row.us > 0 and row.rate > 0
        assert row.bound == ("memory" if case.num_bytes / 0.01 >= case.num_flop else "matrix")
        floor = max(case.num_bytes / 0.01, case.num_flop) / 1e6
        assert row.share == pytest.approx(floor / row.us)


def test_bytes_and_operations() -> None:
    found = {(case.operator, case.shape): case for case in cases(SHAPES, CPU, torch.float32)}
    linear = found["linear", "3 × 32 → 96"]
    assert (linear.num_bytes, linear.num_flop) == (4 * (3 * 32 + 96 * 32 + 3 * 96), 2 * 3 * 32 * 96)
    prefill = found["varlen_attention", "prefill of 3"]
    assert (prefill.num_bytes, prefill.num_flop) == (4 * 3 * 8 * (2 * 4 + 2 * 2), 2 * 3 * 3 * 4 * 8)
    decode = found["paged_attention", "decode, 3 × 20 keys"]
    assert decode.num_bytes == 4 * (3 * 20 * 2 * 8 * 2 + 2 * 3 * 4 * 8)
    assert decode.num_flop == 3 * 20 * 4 * 8 * 4


def test_no_step_decodes_thousands() -> None:
    large = kernels.Shapes(num_tokens=2048)
    shapes = {case.operator: case.shape for case in cases(large, CPU, torch.float32)}  # nothing is allocated yet
    assert shapes["paged_attention"] == "decode, 256 × 2048 keys" and shapes["varlen_attention"] == "prefill of 2048"


def test_ceilings_are_rates() -> None:
    limits = kernels.ceilings(kernels.Timer(CPU, min_seconds=0.0), CPU, torch.float32)
    assert 1e-5 < limits["memory"] < 100 and 1e-5 < limits["matrix"] < 1e4


def test_unknown_operators_and_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"operator is 'softmax', allowed are .*rms_norm"):
        kernels.choose(list(cases(SHAPES, CPU, torch.float32)), ["softmax"])
    with pytest.raises(ValueError, match="num_kv_heads is 3"):
        kernels.Shapes(num_heads=4, num_kv_heads=3)
    with pytest.raises(ValueError, match="head_dim is 0"):
        kernels.Shapes(head_dim=0)
