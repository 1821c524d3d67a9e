"""The operators once more, as plainly as possible and apart from fastattn.reference: no masks, no batching, loops over rows.

Each takes a call's arguments and a dtype to compute in: fp64 gives the exact result, the result's own dtype gives the "plain
torch version" of the 2× rule. Everything is on the CPU. What is returned: the results, then the arguments that are changed.
"""

# ruff: noqa: F401 -- what stands here is for those who import it
from tests.harness.formulas.attention import (
    attention_matrix,
    batch_attention,
    batch_attention_backward,
    errors_from_rounded_out,
    gradients,
    merge_attention_states,
    paged_attention,
    varlen_attention,
    varlen_attention_backward,
)
from tests.harness.formulas.dense import gated_linear, layer_norm_linear, linear, rms_norm_gated_linear, rms_norm_linear
from tests.harness.formulas.elementwise import (
    add_rms_norm,
    embedding,
    geglu,
    layer_norm,
    numbers_of_cache,
    rms_norm,
    rope_kv_write,
    swiglu,
)
from tests.harness.formulas.quantized import (
    fp4_fp8_linear,
    fp4_linear,
    fp8_block_linear,
    fp8_linear,
    int4_linear,
    int8_linear,
    sparse_24_weight,
    sparse_fp8_linear,
    sparse_int8_linear,
    sparse_linear,
)
from tests.harness.formulas.sampling import adjust_logits, apply_token_bitmask, token_logprobs
