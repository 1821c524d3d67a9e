"""All layers of a decoder for a few tokens as one operator, which on Hopper is one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastattn.ops._attention_checks import check_pages
from fastattn.ops._library import define, has_cuda_kernel
from fastattn.ops.checks import (
    FLOAT,
    FP32,
    INT32,
    AtLeast,
    NonNegative,
    TensorArg,
    check_range,
    compile_check,
    fail_type,
    fail_value,
    values_readable,
)
from fastattn.ops.four_bits import check_order
from fastattn.reference import decode_layers as reference
from fastattn.reference.w4_tiles import COLUMNS as TILE_COLUMNS
from fastattn.reference.w4_tiles import ROWS as TILE_ROWS

MAX_DECODE_TOKENS = 4
_MAX_LAYERS = 128
_MAX_SPLITS, _MAX_GROUP = 32, 4
_UNIT, _MAX_UNITS = 8, 16  # rows of a weight that are computed together, and how many of the stream a CTA has
# Of a Hopper GPU, and of the kernel: what a stage of weights takes, how many it needs, and how many pay.
_SHARED_MEMORY, _STAGE_BYTES, _TILED_STAGE_BYTES, _MIN_STAGES, _PAYING_STAGES = 227 * 1024, 16896, 18432, 3, 4
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

_check = compile_check(
    "decode_layers",
    TensorArg("residual", "T N", FLOAT, mutated=True),
    TensorArg("cos_sin", "max_position D", FP32),
    TensorArg("positions", "T", INT32),
    TensorArg("slot_mapping", "T", INT32),
    TensorArg("seqused_k", "T", INT32),
    TensorArg("block_table", "T max_blocks", INT32),
    TensorArg("workspace", "words", INT32, optional=True, mutated=True),
    AtLeast("num_heads", 1),
    NonNegative("softmax_scale"),
    NonNegative("norm_eps"),
    NonNegative("qk_norm_eps"),
)


@dataclass(frozen=True)
class DecoderWeights:
    """Of each layer: qkv ((H + 2 Hk) D, N), out (N, H D), gate_up (2 I, N) in turns of eight rows (`fastattn.nn.interleave_gate_up`),
    down (N, I); qkv and gate_up with the norm's weight in front of them folded in (`fastattn.nn.fold_rms_norm`). Empty or one a layer:
    qkv_bias ((H + 2 Hk) D), q_norm and k_norm (D). All contiguous."""

    qkv: Sequence[Tensor]
    out: Sequence[Tensor]
    gate_up: Sequence[Tensor]
    down: Sequence[Tensor]
    qkv_bias: Sequence[Tensor] = field(default=())
    q_norm: Sequence[Tensor] = field(default=())
    k_norm: Sequence[Tensor] = field(default=())


@dataclass(frozen=True)
class Fp4Tiles:
    """A matrix (rows, K) of each layer in NVFP4, as `pack_w4_tiles` and `pack_w4_scales` make it: codes (rows/16, K/64, 512) and scale
    (rows/16, K/64, 64) uint8, global_scale (rows) fp32, which sums are divided by. All contiguous."""

    codes: Sequence[Tensor]
    scale: Sequence[Tensor]
    global_scale: Sequence[Tensor]


@dataclass(frozen=True)
class DecoderFp4Weights:
    """Of each layer: qkv ((H + 2 Hk) D, N), out (N, H D), gate_up (2 I, N), gates in front of all ups, down (N, I), in tiles of
    tile_order, and the norms' weights in front of qkv and gate_up, (N) in the stream's dtype, as is what may be empty: qkv_bias
    ((H + 2 Hk) D), q_norm and k_norm (D). All contiguous."""

    qkv: Fp4Tiles
    out: Fp4Tiles
    gate_up: Fp4Tiles
    down: Fp4Tiles
    input_norm: Sequence[Tensor]
    mlp_norm: Sequence[Tensor]
    tile_order: int = 16
    qkv_bias: Sequence[Tensor] = field(default=())
    q_norm: Sequence[Tensor] = field(default=())
    k_norm: Sequence[Tensor] = field(default=())


@dataclass(frozen=True)
class DecoderHead:
    """What is in front of the layers and behind them: the stream begins as `embedding(token_ids, embedding, drawn=drawn)`, and
    logits become `linear(rms_norm(stream, norm), weight)`. token_ids (T) int32, drawn (R) int32 or None; embedding and weight
    (V, N), which may be the same, V a multiple of 8, norm (N); logits (T, V), written. All contiguous, in the stream's dtype."""

    token_ids: Tensor
    drawn: Tensor | None
    embedding: Tensor
    norm: Tensor
    weight: Tensor
    logits: Tensor


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
    unit = TILE_ROWS if in_tiles else _UNIT
    fits = (
        head_dim in ((128,) if in_tiles else (64, 128))
        and hidden_size % 64 == 0
        and intermediate_size % 64 == 0
        and num_heads % num_kv_heads == 0
        and num_heads // num_kv_heads <= _MAX_GROUP
        and intermediate_size >= unit * num_sms
        and hidden_size <= _UNIT * _MAX_UNITS * num_sms
    )
    for tokens in range(MAX_DECODE_TOKENS if fits else 0, 0, -1):
        if tokens * num_heads <= num_sms and widest <= _most_columns(tokens, head_dim, _PAYING_STAGES, in_tiles):
            return tokens
    return 0


def _most_columns(tokens: int, head_dim: int, num_stages: int, in_tiles: bool) -> int:
    """Of what is multiplied, that shared memory has room for beside so many stages of weights."""
    stages = num_stages * (_TILED_STAGE_BYTES if in_tiles else _STAGE_BYTES)
    of_token = (_SHARED_MEMORY - stages - 40 * head_dim * 4 - 12 * 1024) // tokens
    return (of_token - 64 - 2048) // 2


def decode_layers_workspace(
    hidden_size: int, intermediate_size: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> Tensor:
    """Memory in which the kernel's CTAs hand results to each other, int32 zeros: for all calls of a model on one stream, one
    after the other; whoever runs two at a time has one for each."""
    words = _workspace_words(hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim)
    return torch.zeros(words, dtype=torch.int32, device=device)


def _workspace_words(hidden_size: int, intermediate_size: int, num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    rows = (num_heads + 2 * num_kv_heads) * head_dim + num_heads * head_dim + 2 * hidden_size + intermediate_size
    partial = num_heads * _MAX_SPLITS * (head_dim // 2 + 1) * 4
    return 4 + MAX_DECODE_TOKENS * (rows + partial)


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
    _check(
        residual, cos_sin, positions, slot_mapping, seqused_k, block_table, workspace, num_heads, softmax_scale, norm_eps,
        qk_norm_eps,
    )  # fmt: skip
    _check_caches(residual, cos_sin, k_cache, v_cache, num_heads)
    _check_weights(residual, weights, k_cache, num_heads)
    if head is not None:
        _check_head(residual, head)
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
            residual.shape, _intermediate_size(weights), num_heads, k_cache[0].shape, workspace.numel(), num_sms,
            in_tiles=in_tiles,
        )  # fmt: skip
    if values_readable(positions):
        _check_rows(positions, slot_mapping, seqused_k, block_table, cos_sin, k_cache[0])
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


def _intermediate_size(weights: DecoderWeights | DecoderFp4Weights) -> int:
    if isinstance(weights, DecoderFp4Weights):
        return int(weights.down.codes[0].shape[1]) * TILE_COLUMNS
    return int(weights.down[0].shape[-1])


def check_kernel_sizes(
    residual: Sequence[int],
    intermediate_size: int,
    num_heads: int,
    cache: Sequence[int],
    workspace_words: int,
    num_sms: int,
    *,
    in_tiles: bool = False,
) -> None:
    """That the kernel takes what fits together: shapes of the stream and of a cache, and how many CTAs can run at once."""
    (tokens, hidden_size), (_, block_size, num_kv_heads, head_dim) = residual, cache
    num_ctas = min(num_sms, intermediate_size // (TILE_ROWS if in_tiles else _UNIT))
    widest = max(hidden_size, intermediate_size, num_heads * head_dim)
    columns = _most_columns(max(tokens, 1), head_dim, _MIN_STAGES, in_tiles)
    words = _workspace_words(hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim)
    most = _UNIT * _MAX_UNITS * num_ctas
    for holds, found, expected in (
        (tokens <= MAX_DECODE_TOKENS, f"residual has {tokens} tokens", f"at most {MAX_DECODE_TOKENS}"),
        (head_dim in (64, 128), f"k_cache has D = {head_dim}", "64 or 128"),
        (not in_tiles or head_dim == 128, f"k_cache has D = {head_dim}", "128 with 4-bit weights"),
        (block_size.bit_count() == 1, f"k_cache has pages of {block_size} keys", "a power of two"),
        (_in_panels(hidden_size), f"residual has N = {hidden_size} columns", "a multiple of 64"),
        (_in_panels(intermediate_size), f"weights.down has I = {intermediate_size} columns", "a multiple of 64"),
        (
            num_heads <= _MAX_GROUP * num_kv_heads,
            f"num_heads is {num_heads}",
            f"at most {_MAX_GROUP * num_kv_heads}, {_MAX_GROUP} for each of {num_kv_heads} KV heads",
        ),
        (
            tokens * num_heads <= num_ctas,
            f"residual has {tokens} tokens of {num_heads} heads",
            f"at most {num_ctas} heads in all, the CTAs of {num_sms} SMs and I = {intermediate_size}",
        ),
        (hidden_size <= most, f"residual has N = {hidden_size} columns", f"at most {most} with {num_ctas} CTAs"),
        (
            widest <= columns,
            f"residual has {tokens} tokens of N = {hidden_size} columns, weights.down I = {intermediate_size}",
            f"N, I and H D up to {columns}, of which shared memory has room for {tokens} tokens,",
        ),
        (
            workspace_words >= words,
            f"workspace has {workspace_words} elements",
            f"the {words} of decode_layers_workspace",
        ),
    ):
        if not holds:
            fail_value("decode_layers", f"{found}, expected {expected} on a GPU")


def _in_panels(columns: int) -> bool:
    return columns > 0 and columns % 64 == 0


def _check_rows(
    positions: Tensor, slot_mapping: Tensor, seqused_k: Tensor, block_table: Tensor, cos_sin: Tensor, cache: Tensor
) -> None:
    """The values that say where rows are, as the operators one by one check them; cache: of any layer."""
    op, last_slot = "decode_layers", cache.shape[0] * cache.shape[1] - 1
    check_range(op, "positions", positions, 0, cos_sin.shape[0] - 1, "max_position - 1 from cos_sin", cos_sin)
    check_range(op, "slot_mapping", slot_mapping, -1, last_slot, "num_blocks * block_size - 1 from k_cache", cache)
    try:
        check_pages(cache, seqused_k, block_table)
    except ValueError as error:
        raise ValueError(f"{op}: {error}") from None


def _check_tensor(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        fail_type("decode_layers", f"{name} is a {type(t).__name__}, expected a Tensor")
    if t.requires_grad and torch.is_grad_enabled():
        message = f"{name} requires grad, expected no grad: decode_layers has no backward; use torch.no_grad()"
        fail_value("decode_layers", message)


def _check_list(name: str, tensors: Sequence[Tensor], num_layers: int | None = None, optional: bool = False) -> None:
    if not isinstance(tensors, (list, tuple)):
        fail_type("decode_layers", f"{name} is a {type(tensors).__name__}, expected a list of tensors")
    if num_layers is not None and len(tensors) != num_layers and not (optional and len(tensors) == 0):
        fail_value("decode_layers", f"{name} has {len(tensors)} tensors, expected {num_layers} as k_cache")
    for i, t in enumerate(tensors):
        _check_tensor(f"{name}[{i}]", t)


def _check_caches(
    residual: Tensor, cos_sin: Tensor, k_cache: Sequence[Tensor], v_cache: Sequence[Tensor], num_heads: int
) -> None:
    _check_list("k_cache", k_cache)
    if not 1 <= len(k_cache) <= _MAX_LAYERS:
        fail_value("decode_layers", f"k_cache has {len(k_cache)} tensors, expected 1 to {_MAX_LAYERS}, one a layer")
    _check_list("v_cache", v_cache, len(k_cache))
    shape = tuple(k_cache[0].shape)
    for name, caches in (("k_cache", k_cache), ("v_cache", v_cache)):
        for i, t in enumerate(caches):
            if t.dtype is not residual.dtype:
                fail_type("decode_layers", f"{name}[{i}] is {t.dtype}, expected {residual.dtype} as residual")
            if tuple(t.shape) != shape or len(shape) != 4 or t.device != residual.device or not t.is_contiguous():
                fail_value(
                    "decode_layers",
                    f"{name}[{i}] is {tuple(t.shape)} on {t.device}, expected a contiguous (num_blocks, block_size, Hk, D) "
                    f"on {residual.device}, the same for all layers",
                )
    if 0 in shape[1:]:
        fail_value("decode_layers", f"k_cache[0] is {shape}, expected at least one key a page, KV head and dim")
    if shape[3] != cos_sin.shape[1]:
        fail_value(
            "decode_layers", f"cos_sin has {cos_sin.shape[1]} columns, expected D = {shape[3]} from k_cache {shape}"
        )
    if num_heads < 1 or num_heads % shape[2]:
        fail_value(
            "decode_layers", f"num_heads is {num_heads}, expected a multiple of Hk = {shape[2]} from k_cache {shape}"
        )


def _check_weights(
    residual: Tensor, weights: DecoderWeights | DecoderFp4Weights, k_cache: Sequence[Tensor], num_heads: int
) -> None:
    if not isinstance(weights, (DecoderWeights, DecoderFp4Weights)):
        fail_type(
            "decode_layers",
            f"weights is a {type(weights).__name__}, expected DecoderWeights or DecoderFp4Weights",
        )
    num_layers, (num_kv_heads, head_dim) = len(k_cache), k_cache[0].shape[2:]
    n, rows = residual.shape[1], (num_heads + 2 * num_kv_heads) * head_dim
    if isinstance(weights, DecoderFp4Weights):
        for name in ("qkv", "out", "gate_up", "down"):
            if not isinstance(found := getattr(weights, name), Fp4Tiles):
                fail_type(
                    "decode_layers",
                    f"weights.{name} is a {type(found).__name__}, expected Fp4Tiles in DecoderFp4Weights",
                )
        of_down, down, num_dims, dims = "down.codes", weights.down.codes, 3, "(N/16, I/64, 512)"
    else:
        of_down, down, num_dims, dims = "down", weights.down, 2, "(N, I)"
    _check_list(f"weights.{of_down}", down, num_layers)
    if down[0].dim() != num_dims:
        fail_value("decode_layers", f"weights.{of_down}[0] has shape {tuple(down[0].shape)}, expected {dims}")
    intermediate = _intermediate_size(weights)
    matrices = (
        ("qkv", rows, n),
        ("out", n, num_heads * head_dim),
        ("gate_up", 2 * intermediate, n),
        ("down", n, intermediate),
    )
    expected: list[tuple[str, Sequence[Tensor], tuple[int, ...], torch.dtype, bool]] = []
    for name, its_rows, columns in matrices:
        found = getattr(weights, name)
        if isinstance(weights, DecoderWeights):
            expected.append((name, found, (its_rows, columns), residual.dtype, False))
            continue
        if its_rows % TILE_ROWS or columns % TILE_COLUMNS:
            fail_value(
                "decode_layers",
                f"weights.{name} is of {its_rows} rows and {columns} columns, expected multiples of {TILE_ROWS} and {TILE_COLUMNS}",
            )
        tiles = its_rows // TILE_ROWS, columns // TILE_COLUMNS
        expected += [
            (f"{name}.codes", found.codes, (*tiles, 512), torch.uint8, False),
            (f"{name}.scale", found.scale, (*tiles, 64), torch.uint8, False),
            (f"{name}.global_scale", found.global_scale, (its_rows,), torch.float32, False),
        ]
    if isinstance(weights, DecoderFp4Weights):
        expected += [(name, getattr(weights, name), (n,), residual.dtype, False) for name in ("input_norm", "mlp_norm")]
        check_order("decode_layers", "weights.tile_order", weights.tile_order)
    for name, length in (("qkv_bias", rows), ("q_norm", head_dim), ("k_norm", head_dim)):
        expected.append((name, getattr(weights, name), (length,), residual.dtype, True))
    for name, tensors, shape, dtype, optional in expected:
        _check_list(f"weights.{name}", tensors, num_layers, optional)
        for i, t in enumerate(tensors):
            if t.dtype is not dtype:
                of = " as residual" if dtype is residual.dtype else ""
                fail_type("decode_layers", f"weights.{name}[{i}] is {t.dtype}, expected {dtype}{of}")
            if tuple(t.shape) != shape or t.device != residual.device or not t.is_contiguous():
                fail_value(
                    "decode_layers",
                    f"weights.{name}[{i}] is {tuple(t.shape)} on {t.device}, expected a contiguous {shape} on "
                    f"{residual.device}",
                )
    if len(weights.q_norm) != len(weights.k_norm):
        fail_value(
            "decode_layers",
            f"weights.k_norm has {len(weights.k_norm)} tensors, expected {len(weights.q_norm)} as q_norm",
        )


def _check_head(residual: Tensor, head: DecoderHead) -> None:
    if not isinstance(head, DecoderHead):
        fail_type("decode_layers", f"head is a {type(head).__name__}, expected a DecoderHead or None")
    for name in ("token_ids", "embedding", "norm", "weight", "logits", "drawn"):
        if name != "drawn" or head.drawn is not None:
            _check_tensor(f"head.{name}", getattr(head, name))
    (tokens, n), vocab_size = residual.shape, head.weight.shape[0] if head.weight.dim() else 0
    drawn = 0 if head.drawn is None else head.drawn.numel()
    if vocab_size == 0 or vocab_size % 8:
        fail_value("decode_layers", f"head.weight has {vocab_size} rows, expected a multiple of 8")
    for name, t, shape, dtype in (
        ("token_ids", head.token_ids, (tokens,), torch.int32),
        ("drawn", head.drawn, (drawn,), torch.int32),
        ("embedding", head.embedding, (vocab_size, n), residual.dtype),
        ("norm", head.norm, (n,), residual.dtype),
        ("weight", head.weight, (vocab_size, n), residual.dtype),
        ("logits", head.logits, (tokens, vocab_size), residual.dtype),
    ):
        if t is None:
            continue
        if t.dtype is not dtype:
            fail_type("decode_layers", f"head.{name} is {t.dtype}, expected {dtype}")
        if tuple(t.shape) != shape or t.device != residual.device or not t.is_contiguous():
            fail_value(
                "decode_layers",
                f"head.{name} is {tuple(t.shape)} on {t.device}, expected a contiguous {shape} on {residual.device}",
            )
    if values_readable(head.token_ids):
        check_range(
            "decode_layers",
            "head.token_ids",
            head.token_ids,
            -drawn,
            vocab_size - 1,
            "V - 1 from head.weight",
            head.weight,
        )
