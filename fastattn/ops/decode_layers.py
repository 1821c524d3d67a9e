"""All layers of a decoder for a few tokens as one operator, which on Hopper is one kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.ops._decode_layers_checks import (
    MAX_DECODE_TOKENS,
    MAX_GROUP,
    MAX_UNITS,
    PAYING_STAGES,
    UNIT,
    check_arguments,
    check_caches,
    check_head,
    check_kernel_sizes,
    check_rows,
    check_weights,
    most_columns,
    needed_words,
)
from fastattn.ops._library import define, has_cuda_kernel
from fastattn.ops.checks import fail_type, fail_value, values_readable
from fastattn.ops.decoder_weights import DecoderFp4Weights, DecoderHead, DecoderWeights
from fastattn.reference import decode_layers as reference
from fastattn.reference.w4_tiles import ROWS as TILE_ROWS

_ACTIVATIONS = ("silu", "gelu_tanh")


def _fake(*_: object) -> None:
    return None


_decode_layers = define(
    "decode_layers(Tensor(a!) residual, Tensor[] qkv_weight, Tensor[] qkv_bias, Tensor[] q_norm_weight, "
    "Tensor[] k_norm_weight, Tensor[] out_weight, Tensor[] gate_up_weight, Tensor[] down_weight, Tensor cos_sin, "
    "Tensor positions, Tensor slot_mapping, Tensor seqused_k, Tensor block_table, Tensor(b!)[] k_cache, "
    "Tensor(c!)[] v_cache, Tensor(d!)? workspace, int num_heads, str activation, float softmax_scale, float norm_eps, float qk_norm_eps, "
    "Tensor? token_ids, Tensor? drawn, Tensor? embedding, Tensor? final_norm_weight, Tensor? head_weight, Tensor(e!)? logits, "
    "Tensor[] tile_scales, Tensor[] global_scales, Tensor[] norm_weights, int tile_order) -> ()",
    reference.decode_layers,
    _fake,
)


def decode_layers_max_tokens(
    hidden_size: int,
    intermediate_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_sms: int = 132,
    *,
    in_tiles: bool = False,
) -> int:
    """For how many tokens the kernel is the better choice for layers of these sizes on a GPU of so many SMs (an H100 of PCIe has 114),
    0 if it does not take them: beside what is multiplied, shared memory must have room for the weights that come in the meantime.
    in_tiles: of `DecoderFp4Weights`."""
    widest = max(intermediate_size, hidden_size, num_heads * head_dim)
    unit = TILE_ROWS if in_tiles else UNIT
    fits = (
        head_dim in ((128,) if in_tiles else (64, 128))
        and hidden_size % 64 == 0
        and intermediate_size % 64 == 0
        and num_heads % num_kv_heads == 0
        and num_heads // num_kv_heads <= MAX_GROUP
        and intermediate_size >= unit * num_sms
        and hidden_size <= UNIT * MAX_UNITS * num_sms
    )
    for tokens in range(MAX_DECODE_TOKENS if fits else 0, 0, -1):
        if tokens * num_heads <= num_sms and widest <= most_columns(tokens, head_dim, PAYING_STAGES, in_tiles):
            return tokens
    return 0


def decode_layers_workspace(
    hidden_size: int, intermediate_size: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> Tensor:
    """Memory in which the kernel's CTAs hand results to each other, int32 zeros: for all calls of a model on one stream, one
    after the other; whoever runs two at a time has one for each."""
    words = needed_words(hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim)
    return torch.zeros(words, dtype=torch.int32, device=device)


def decode_layers(
    residual: Tensor,
    weights: DecoderWeights | DecoderFp4Weights,
    k_cache: Sequence[Tensor],
    v_cache: Sequence[Tensor],
    cos_sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    workspace: Tensor | None = None,
    head: DecoderHead | None = None,
    *,
    num_heads: int,
    softmax_scale: float,
    activation: str = "silu",
    norm_eps: float = 1e-6,
    qk_norm_eps: float = 1e-6,
) -> None:
    """All layers of a Llama-like decoder for the newest token of each of T sequences, in place on the residual stream:

        h += out(attention(rope(norm(qkv(h)))))      h += down(act(gate(h)) * up(h))      of each layer, h normalized (RMS)

    On Hopper one launch, cooperative: a CTA on each SM, which hand their results to each other, while the weights of what
    comes next are on their way (as HazyResearch's megakernel, https://hazyresearch.stanford.edu/blog/2025-05-27-no-bubbles).
    It needs T ≤ 4, D 64 or 128, H ≤ 4 Hk, N and I multiples of 64, a block_size that is a power of two, and as many SMs, and
    rows of eight gates (16 in tiles), as T H at least; and shared memory for T rows of N, I and H D numbers beside three stages of
    weights: with T = 4 and D = 128 up to 17568 numbers, in tiles 16992. `decode_layers_max_tokens` says for how many tokens it is the
    better choice. On the CPU the operators one after the other.

    With a head a whole step of a language model: what is in residual does not matter then, and logits are made of what it is
    in the end.

    residual: (T, N), bf16 or fp16, on the CPU also fp32; contiguous, changed in place.
    weights: `DecoderWeights`, in residual's dtype; or `DecoderFp4Weights`, whose products are `fp4_linear`'s, on a GPU for bf16 and
      D 128.
    k_cache, v_cache: of each layer (num_blocks, block_size, Hk, D), residual's dtype, contiguous; the tokens' keys and values
      are written to them.
    cos_sin: (max_position, D) fp32, as in `rope_kv_write`, all dims rotated. positions, slot_mapping: (T) int32, as there.
    seqused_k: (T) int32, keys of each sequence, the newest counted; 0 for a row of padding, whose result says nothing.
    block_table: (T, max_blocks) int32, pages as in `paged_attention`.
    workspace: `decode_layers_workspace`, needed on a GPU.
    head: `DecoderHead`. An id that does not exist is what it is for `embedding`.

    Raises TypeError for what is not a tensor or has another dtype, ValueError for anything else that does not fit.
    Values in the int32 tensors are checked on the CPU, and on the GPU only with FASTATTN_VALIDATE_INPUTS=1.
    """
    check_arguments(
        residual, cos_sin, positions, slot_mapping, seqused_k, block_table, workspace, num_heads, softmax_scale, norm_eps,
        qk_norm_eps,
    )  # fmt: skip
    check_caches(residual, cos_sin, k_cache, v_cache, num_heads)
    check_weights(residual, weights, k_cache, num_heads)
    if head is not None:
        check_head(residual, head)
    if activation not in _ACTIVATIONS:
        fail_value(
            "decode_layers", f"activation is {activation!r}, expected one of {', '.join(map(repr, _ACTIVATIONS))}"
        )
    if residual.is_cuda:
        if not has_cuda_kernel("decode_layers"):
            fail_value("decode_layers", f"residual is on {residual.device}, and the CUDA kernels are not built")
        if workspace is None:
            fail_value("decode_layers", "workspace is None, expected a tensor of decode_layers_workspace on a GPU")
        num_sms = torch.cuda.get_device_properties(residual.device).multi_processor_count
        in_tiles = isinstance(weights, DecoderFp4Weights)
        if in_tiles and residual.dtype is not torch.bfloat16:
            fail_type(
                "decode_layers", f"residual is {residual.dtype}, expected torch.bfloat16 with 4-bit weights on a GPU"
            )
        check_kernel_sizes(
            residual.shape, weights.intermediate_size, num_heads, k_cache[0].shape, workspace.numel(), num_sms,
            in_tiles=in_tiles,
        )  # fmt: skip
    if values_readable(positions):
        check_rows(positions, slot_mapping, seqused_k, block_table, cos_sin, k_cache[0])
    of_head: tuple[Tensor | None, ...] = (None,) * 6
    if head is not None:
        of_head = (head.token_ids, head.drawn, head.embedding, head.norm, head.weight, head.logits)
    matrices: tuple[Sequence[Tensor], ...]
    of_tiles: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], int] = (), (), (), 16
    if isinstance(weights, DecoderFp4Weights):
        four = weights.qkv, weights.out, weights.gate_up, weights.down
        matrices = tuple(matrix.codes for matrix in four)
        of_tiles = (
            _by_layer(*(matrix.scale for matrix in four)),
            _by_layer(*(matrix.global_scale for matrix in four)),
            _by_layer(weights.input_norm, weights.mlp_norm),
            weights.tile_order,
        )
    else:
        matrices = weights.qkv, weights.out, weights.gate_up, weights.down
    _decode_layers(
        residual, matrices[0], weights.qkv_bias, weights.q_norm, weights.k_norm, *matrices[1:], cos_sin, positions,
        slot_mapping, seqused_k, block_table, k_cache, v_cache, workspace, num_heads, activation, softmax_scale,
        norm_eps, qk_norm_eps, *of_head, *of_tiles,
    )  # fmt: skip


def _by_layer(*lists: Sequence[Tensor]) -> list[Tensor]:
    """Of the first layer one of each, then of the second."""
    return [t for of_layer in zip(*lists, strict=True) for t in of_layer]
