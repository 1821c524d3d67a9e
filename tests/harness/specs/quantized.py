"""OpSpecs of quantizers and of products with numbers of 8 and 4 bits, and with weights 2:4."""

from __future__ import annotations

from fastattn import ops
from tests.harness import formulas
from tests.harness.opspec import OpSpec, Role
from tests.harness.quantized_calls import (
    bad_fp4,
    bad_fp4_fp8,
    bad_fp8_blocks,
    bad_fp8_linear,
    bad_int4,
    bad_int8_linear,
    bad_quantize,
    fp4_calls,
    fp4_fp8_calls,
    fp8_block_calls,
    fp8_calls,
    int4_calls,
    int8_calls,
    quantize_calls,
    quantize_group_calls,
    rms_norm_quantize_calls,
    verify_quantize_fp8,
    verify_quantize_fp8_groups,
    verify_quantize_int8,
    verify_quantize_int8_asymmetric,
    verify_rms_norm_quantize_fp8,
    verify_rms_norm_quantize_int8,
)
from tests.harness.sparse_calls import (
    bad_sparse,
    bad_sparse_fp8,
    bad_sparse_int8,
    sparse_calls,
    sparse_fp8_calls,
    sparse_int8_calls,
)
from tests.harness.specs.elementwise import NORM_ROLES

_METADATA = Role((0, 1, 2))
_SPARSE_8BIT_ROLES = {
    "x": Role((1,)),
    "x_scale": Role((0,)),
    "values": Role((1,)),
    "metadata": _METADATA,
    "weight_scale": Role((0,)),
    "bias": Role((0,), optional=True),
}
_FP4_ROLES = {
    "weight_packed": Role((0, 1)),
    "weight_scale": Role((0, 1)),
    "global_scale": Role((0,), optional=True),
    "bias": Role((0,), optional=True),
}

QUANTIZED = (
    *(
        OpSpec(op.__name__, op, calls, {"x": Role()}, verify=verify, bad=bad_quantize, keeps_dtype=False)
        for op, calls, verify in (
            (ops.quantize_int8, quantize_calls, verify_quantize_int8),
            (ops.quantize_int8_asymmetric, quantize_calls, verify_quantize_int8_asymmetric),
            (ops.quantize_fp8, quantize_calls, verify_quantize_fp8),
            (ops.quantize_fp8_groups, quantize_group_calls, verify_quantize_fp8_groups),
        )
    ),
    *(
        OpSpec(
            op.__name__,
            op,
            rms_norm_quantize_calls,
            NORM_ROLES | {"residual": Role((0, 1), optional=True)},
            verify=verify,
            mutates=("residual",),
            scalars={"eps": "nonnegative"},
            keeps_dtype=False,
        )
        for op, verify in (
            (ops.rms_norm_quantize_int8, verify_rms_norm_quantize_int8),
            (ops.rms_norm_quantize_fp8, verify_rms_norm_quantize_fp8),
        )
    ),
    OpSpec(
        "int8_linear",
        ops.int8_linear,
        int8_calls,
        {
            "x": Role((0, 1)),
            "x_scale": Role((0,)),
            "weight": Role((0, 1)),
            "weight_scale": Role((0,)),
            "bias": Role((0,), optional=True),
            "x_zero_point": Role((0,), optional=True),
            "weight_sum": Role((0,), optional=True),
        },
        formulas.int8_linear,
        bad=bad_int8_linear,
    ),
    OpSpec(
        "fp8_linear",
        ops.fp8_linear,
        fp8_calls,
        {
            "x": Role((1,)),
            "x_scale": Role((0,)),
            "weight": Role((1,)),
            "weight_scale": Role((0,)),
            "bias": Role((0,), optional=True),
        },
        formulas.fp8_linear,
        scalars={"fast_accum": "flag", "batch_invariant": "flag"},
        bad=bad_fp8_linear,
    ),
    OpSpec(
        "fp8_block_linear",
        ops.fp8_block_linear,
        fp8_block_calls,
        {
            "x": Role((1,)),
            "x_scale": Role((0, 1)),
            "weight": Role((1,)),
            "weight_scale": Role(layout=False),
            "bias": Role((0,), optional=True),
        },
        formulas.fp8_block_linear,
        bad=bad_fp8_blocks,
    ),
    OpSpec(
        "sparse_linear",
        ops.sparse_linear,
        sparse_calls,
        {"x": Role(), "values": Role((0, 1)), "metadata": _METADATA, "bias": Role((0,), optional=True)},
        formulas.sparse_linear,
        bad=bad_sparse,
    ),
    OpSpec(
        "sparse_int8_linear",
        ops.sparse_int8_linear,
        sparse_int8_calls,
        _SPARSE_8BIT_ROLES,
        formulas.sparse_int8_linear,
        bad=bad_sparse_int8,
    ),
    OpSpec(
        "sparse_fp8_linear",
        ops.sparse_fp8_linear,
        sparse_fp8_calls,
        _SPARSE_8BIT_ROLES,
        formulas.sparse_fp8_linear,
        scalars={"fast_accum": "flag"},
        bad=bad_sparse_fp8,
    ),
    OpSpec(
        "int4_linear",
        ops.int4_linear,
        int4_calls,
        {
            "x": Role(),
            "weight_packed": Role((0, 1)),
            "weight_scale": Role((0, 1)),
            "zero_point": Role((0, 1), optional=True),
            "bias": Role((0,), optional=True),
        },
        formulas.int4_linear,
        scalars={"group_size": "size"},
        bad=bad_int4,
    ),
    OpSpec(
        "fp4_linear",
        ops.fp4_linear,
        fp4_calls,
        {"x": Role(), **_FP4_ROLES},
        formulas.fp4_linear,
        scalars={"group_size": "size"},
        bad=bad_fp4,
    ),
    OpSpec(
        "fp4_fp8_linear",
        ops.fp4_fp8_linear,
        fp4_fp8_calls,
        {"x": Role(), "x_scale": Role((0,)), **_FP4_ROLES},
        formulas.fp4_fp8_linear,
        scalars={"group_size": "size", "fast_accum": "flag"},
        bad=bad_fp4_fp8,
    ),
)
