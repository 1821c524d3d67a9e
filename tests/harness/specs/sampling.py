"""OpSpecs of sampling, and of what changes and reads logits."""

from __future__ import annotations

import torch

from fastattn import ops
from tests.harness import formulas
from tests.harness.lm_head_calls import bad_lm_head, lm_head_calls, verify_lm_head
from tests.harness.opspec import OpSpec, Role
from tests.harness.sampling_calls import (
    adjust_calls,
    bad_adjust,
    bad_bitmask,
    bad_sample,
    bad_speculative,
    bitmask_calls,
    logprob_calls,
    sample_calls,
    speculative_calls,
    verify_sample,
    verify_speculative,
)

SAMPLING = (
    OpSpec(
        "adjust_logits",
        ops.adjust_logits,
        adjust_calls,
        {"logits": Role((0,)), "token_ids": Role((0,)), "counts": Role((0,)), "bias": Role((0,)), "indptr": Role((0,))}
        | {f"{kind}_penalty": Role((0,)) for kind in ("repetition", "presence", "frequency")},
        formulas.adjust_logits,
        mutates=("logits",),
        bad=bad_adjust,
        dtypes=(torch.float32,),
        cuda_dtypes=(torch.float32,),
    ),
    OpSpec(
        "apply_token_bitmask",
        ops.apply_token_bitmask,
        bitmask_calls,
        {"logits": Role(), "bitmask": Role((0, 1)), "rows": Role((0,))},
        formulas.apply_token_bitmask,
        mutates=("logits",),
        bad=bad_bitmask,
        dtypes=(torch.float32,),
        cuda_dtypes=(torch.float32,),
    ),
    OpSpec(
        "sample",
        ops.sample,
        sample_calls,
        {"logits": Role((0,))}
        | dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "seed", "position"), Role((0,))),
        verify=verify_sample,
        bad=bad_sample,
        keeps_dtype=False,
        cuda_dtypes=(torch.float32, torch.bfloat16, torch.float16),
    ),
    OpSpec(
        "lm_head_sample",
        ops.lm_head_sample,
        lm_head_calls,
        {"x": Role((-1,)), "weight": Role((1,)), "bias": Role((0,), optional=True)}
        | dict.fromkeys(("temperature", "seed", "position"), Role((0,))),
        verify=verify_lm_head,
        scalars={"first_id": "count"},
        bad=bad_lm_head,
        keeps_dtype=False,
    ),
    OpSpec(
        "speculative_sample",
        ops.speculative_sample,
        speculative_calls,
        {"logits": Role((0, 1)), "draft_logits": Role((1,))}
        | dict.fromkeys(
            ("draft_token_ids", "draft_rows", "temperature", "top_k", "top_p", "min_p", "seed", "position"), Role((0,))
        ),
        verify=verify_speculative,
        bad=bad_speculative,
        keeps_dtype=False,
        cuda_dtypes=(torch.float32, torch.bfloat16, torch.float16),
    ),
    OpSpec(
        "token_logprobs",
        ops.token_logprobs,
        logprob_calls,
        {"logits": Role((0,)), "token_ids": Role((0,))},
        formulas.token_logprobs,
        scalars={"num_top": "count"},
        keeps_dtype=False,
        cuda_dtypes=(torch.float32, torch.bfloat16, torch.float16),
    ),
)
