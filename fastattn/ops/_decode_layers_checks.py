"""What `decode_layers` checks before it runs, and the sizes that its kernel takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.ops._attention_checks import check_pages
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
from fastattn.ops.decoder_weights import DecoderFp4Weights, DecoderHead, DecoderWeights, Fp4Tiles
from fastattn.ops.four_bits import check_order
from fastattn.reference.w4_tiles import COLUMNS as TILE_COLUMNS
from fastattn.reference.w4_tiles import ROWS as TILE_ROWS

MAX_DECODE_TOKENS = 4
_MAX_LAYERS = 128
MAX_SPLITS, MAX_GROUP = 32, 4
UNIT, MAX_UNITS = 8, 16  # rows of a weight that are computed together, and how many of the stream a CTA has
# Of a Hopper GPU, and of the kernel: what a stage of weights takes, how many it needs, and how many pay.
_SHARED_MEMORY, _STAGE_BYTES, _TILED_STAGE_BYTES, _MIN_STAGES, PAYING_STAGES = 227 * 1024, 16896, 18432, 3, 4

check_arguments = compile_check(
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


def most_columns(tokens: int, head_dim: int, num_stages: int, in_tiles: bool) -> int:
    """Of what is multiplied, that shared memory has room for beside so many stages of weights."""
    stages = num_stages * (_TILED_STAGE_BYTES if in_tiles else _STAGE_BYTES)
    of_token = (_SHARED_MEMORY - stages - 40 * head_dim * 4 - 12 * 1024) // tokens
    return (of_token - 64 - 2048) // 2


def needed_words(hidden_size: int, intermediate_size: int, num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    rows = (num_heads + 2 * num_kv_heads) * head_dim + num_heads * head_dim + 2 * hidden_size + intermediate_size
    partial = num_heads * MAX_SPLITS * (head_dim // 2 + 1) * 4
    return 4 + MAX_DECODE_TOKENS * (rows + partial)


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
    num_ctas = min(num_sms, intermediate_size // (TILE_ROWS if in_tiles else UNIT))
    widest = max(hidden_size, intermediate_size, num_heads * head_dim)
    columns = most_columns(max(tokens, 1), head_dim, _MIN_STAGES, in_tiles)
    words = needed_words(hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim)
    most = UNIT * MAX_UNITS * num_ctas
    for holds, found, expected in (
        (tokens <= MAX_DECODE_TOKENS, f"residual has {tokens} tokens", f"at most {MAX_DECODE_TOKENS}"),
        (head_dim in (64, 128), f"k_cache has D = {head_dim}", "64 or 128"),
        (not in_tiles or head_dim == 128, f"k_cache has D = {head_dim}", "128 with 4-bit weights"),
        (block_size.bit_count() == 1, f"k_cache has pages of {block_size} keys", "a power of two"),
        (_in_panels(hidden_size), f"residual has N = {hidden_size} columns", "a multiple of 64"),
        (_in_panels(intermediate_size), f"weights.down has I = {intermediate_size} columns", "a multiple of 64"),
        (
            num_heads <= MAX_GROUP * num_kv_heads,
            f"num_heads is {num_heads}",
            f"at most {MAX_GROUP * num_kv_heads}, {MAX_GROUP} for each of {num_kv_heads} KV heads",
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


def check_rows(
    positions: Tensor, slot_mapping: Tensor, seqused_k: Tensor, block_table: Tensor, cos_sin: Tensor, cache: Tensor
) -> None:
    """The values that say where rows are, as the operators one by one check them; cache: of any layer."""
    op, last_slot = "decode_layers", cache.shape[0] * cache.shape[1] - 1
    check_range(op, "positions", positions, 0, cos_sin.shape[0] - 1, "max_position - 1 from cos_sin", cos_sin)
    check_range(op, "slot_mapping", slot_mapping, -1, last_slot, "num_blocks * block_size - 1 from k_cache", cache)
    check_pages(op, cache, seqused_k, block_table)


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


def check_caches(
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


def check_weights(
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
    intermediate = weights.intermediate_size
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


def check_head(residual: Tensor, head: DecoderHead) -> None:
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
