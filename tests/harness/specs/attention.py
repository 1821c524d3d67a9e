"""OpSpecs of attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fastattn import ops
from tests.harness import formulas
from tests.harness.attention_calls import (
    batch_backward_calls,
    batch_calls,
    merge_calls,
    paged_8bit_calls,
    paged_calls,
    paged_e4m3_calls,
    varlen_backward_calls,
    varlen_calls,
    verify_e4m3,
)
from tests.harness.bad_attention_calls import (
    bad_batch,
    bad_batch_backward,
    bad_merge,
    bad_out_scale,
    bad_paged,
    bad_scales,
    bad_varlen,
    bad_varlen_backward,
)
from tests.harness.opspec import OpSpec, Role

_SCALE: dict[str, Any] = {"softmax_scale": "nonnegative", "softcap": "nonnegative", "causal": "flag"}
_LONGEST = {"max_seqlen_q": "count", "max_seqlen_k": "count"}
_BATCH_ROLES = {
    "q": Role((0, 3), grad=True),
    "k": Role((0, 1, 2, 3), grad=True),
    "v": Role((0, 1, 2, 3), grad=True),
    "alibi_slopes": Role((0, 1), optional=True),
}
_PACKED_ROLES = {
    "q": Role((2,), grad=True),
    "k": Role((0, 1, 2), grad=True),
    "v": Role((0, 1, 2), grad=True),
    "alibi_slopes": Role((0, 1), optional=True),
}
_SEQUENCE_ROLES = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), Role((0,))) | dict.fromkeys(
    ("seqused_q", "seqused_k"), Role((0,), optional=True)
)


def _without_grad(roles: dict[str, Role]) -> dict[str, Role]:
    return {name: replace(role, grad=False) for name, role in roles.items()}


ATTENTION = (
    OpSpec(
        "paged_attention",
        ops.paged_attention,
        paged_8bit_calls,
        {
            "q": Role((2,)),
            "k_cache": Role((0, 1, 2, 3)),
            "v_cache": Role((0, 1, 2, 3)),
            "k_scale": Role((0, 1, 2), optional=True, layout=False),
            "v_scale": Role((0, 1, 2), optional=True, layout=False),
        },
        formulas.paged_attention,
        scalars=_SCALE | {"max_seqlen_q": "count", "batch_invariant": "flag"},
        bad=bad_scales,
    ),
    OpSpec(
        "paged_attention",
        ops.paged_attention,
        paged_calls,
        {
            "q": Role((2,)),
            "k_cache": Role((0, 1, 2, 3)),
            "v_cache": Role((0, 1, 2, 3)),
            "cu_seqlens_q": Role((0,)),
            "seqused_k": Role((0,)),
            "block_table": Role((0,)),
            "alibi_slopes": Role((0, 1), optional=True),
            "sinks": Role((0,), optional=True),
            "tree_mask": Role((0,), optional=True),
        },
        formulas.paged_attention,
        scalars=_SCALE | {"max_seqlen_q": "count", "batch_invariant": "flag"},
        bad=bad_paged,
    ),
    OpSpec(
        "paged_attention",
        ops.paged_attention,
        paged_e4m3_calls,
        {"q": Role((2,)), "out_scale": Role((0,), optional=True, layout=False)},
        verify=verify_e4m3,
        scalars=_SCALE | {"max_seqlen_q": "count"},
        bad=bad_out_scale,
        keeps_dtype=False,
    ),
    OpSpec(
        "batch_attention",
        ops.batch_attention,
        batch_calls,
        _BATCH_ROLES | {"sinks": Role((0,), optional=True, grad=True)},
        formulas.batch_attention,
        scalars=_SCALE | {"deterministic": "flag"},
        bad=bad_batch,
        keeps_dtype=False,
    ),
    OpSpec(
        "varlen_attention",
        ops.varlen_attention,
        varlen_calls,
        _PACKED_ROLES | _SEQUENCE_ROLES | {"sinks": Role((0,), optional=True, grad=True)},
        formulas.varlen_attention,
        scalars=_SCALE | _LONGEST | {"deterministic": "flag"},
        bad=bad_varlen,
        keeps_dtype=False,
    ),
    OpSpec(
        "batch_attention_backward",
        ops.batch_attention_backward,
        batch_backward_calls,
        _without_grad(_BATCH_ROLES)
        | dict.fromkeys(("dout", "out"), Role((0, 1, 2, 3)))
        | {"lse": Role((0, 1, 2)), "dlse": Role((0, 1, 2), optional=True)},
        formulas.batch_attention_backward,
        scalars=_SCALE | {"deterministic": "flag"},
        bad=bad_batch_backward,
        noise=1e-4,
    ),
    OpSpec(
        "varlen_attention_backward",
        ops.varlen_attention_backward,
        varlen_backward_calls,
        _without_grad(_PACKED_ROLES)
        | _SEQUENCE_ROLES
        | dict.fromkeys(("dout", "out"), Role((0, 1, 2)))
        | {"lse": Role((0, 1)), "dlse": Role((0, 1), optional=True)},
        formulas.varlen_attention_backward,
        scalars=_SCALE | _LONGEST | {"deterministic": "flag"},
        bad=bad_varlen_backward,
        noise=1e-4,
    ),
    OpSpec(
        "merge_attention_states",
        ops.merge_attention_states,
        merge_calls,
        dict.fromkeys(("out_a", "out_b"), Role((0, 1, 2, 3), grad=True))
        | dict.fromkeys(("lse_a", "lse_b"), Role((0, 1, 2), grad=True)),
        formulas.merge_attention_states,
        bad=bad_merge,
        cuda_dtypes=(torch.bfloat16, torch.float16, torch.float32),
    ),
)
